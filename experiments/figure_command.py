"""What the commands that draw a figure share: options, errors, caption, file.

A figure is a module: its `options(parser)` adds what it alone can be told, its
`make(given) -> Drawn` draws from a finished run, its `main` is `run` below.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cxai_jax.report import figures, pictures

DRAWN = 224  # Pixels at least to which an image is enlarged before a map lies on it.


class Drawn(NamedTuple):
    """A figure, and what one sees in it."""

    figure: Figure
    caption: str


def parse(figure: ModuleType, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a figure: --workdir, --out and its own."""
    name = figure.__spec__.name.rpartition(".")[2]
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=figure.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a finished run")
    parser.add_argument("--out", type=Path, help=f"default: WORKDIR/{name}.png")
    figure.options(parser)
    given = parser.parse_args(arguments)
    given.out = given.out or given.workdir / f"{name}.png"
    return given


def run(figure: ModuleType, arguments: Sequence[str] | None = None) -> None:
    """Draws one figure into its file; an error is one line."""
    given = parse(figure, arguments)
    try:
        drawn = figure.make(given)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    figures.save(drawn.figure, given.out)
    print(f"{drawn.caption}\n{given.out}")


def show(axes, image: np.ndarray, own: np.ndarray | None = None, scale: float = 0.0):
    """Draws an image into axes without ticks, in its own pixels, below a map or alone.

    Args:
      axes: of Matplotlib.
      image: uint8 [S, S], [S, S, 1] or [S, S, 3].
      own: its map [h, w]; None draws the image alone.
      scale: value of the highest colour.
    """
    side, size = len(image), max(len(image), DRAWN)
    channels = image.squeeze(-1) if image.shape[-1] == 1 else image
    large = np.asarray(Image.fromarray(channels).resize((size, size)))
    if own is not None:
        large = pictures.overlay(large, own, scale)
    edges = (-0.5, side - 0.5, side - 0.5, -0.5)
    axes.imshow(large, cmap="gray", vmin=0, vmax=255, extent=edges)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def outline(axes, place: np.ndarray, colour: str) -> None:
    """Draws the edge of a place, bool [S, S], over an image of `show`."""
    if place.any():
        axes.contour(place, levels=[0.5], colors=colour, linewidths=1)
