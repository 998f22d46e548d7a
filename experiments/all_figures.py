"""Every figure of both papers from a finished run, on one page.

python -m experiments.all_figures --workdir runs/b-full [--rows runs/b-baseline ...]
    [--patches runs/n3-* ...] [--on cxr --data_dir data] [--out figures.html]
    [--pictures DIR]

The page needs no network. A figure that the run cannot give is named with the reason,
the others are drawn; then the exit code is 1. Options beyond --workdir are handed to
the figures that know them. --pictures writes a small PNG of each as well.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from cxai_jax import disk
from cxai_jax.report import figures, page
from experiments import (
    figure1,
    figure2,
    figure3,
    figure4,
    figure5,
    figure6,
    figure_command,
    xray_figure1,
)

WIDTH = 840  # Pixels of a small picture.
FIGURES = {
    "CT paper, Figure 1: SnapMix": (figure1, ()),
    "CT paper, Figure 2: masked images": (figure2, ()),
    "CT paper, Figure 3: k, theta and n on the scored images": (figure3, ("patches",)),
    "CT paper, Figure 4: k, theta and n on training images": (figure4, ("patches",)),
    "CT paper, Figure 5: what the networks look at": (figure5, ("rows",)),
    "CT paper, Figure 6: maps of masked images": (figure6, ()),
    "X-ray paper, Figure 1: on another collection": (xray_figure1, ("on", "data_dir")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.all_figures", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a finished run")
    parser.add_argument("--out", type=Path, help="default: WORKDIR/figures.html")
    parser.add_argument("--rows", nargs="*", default=[], help="other runs of Figure 5")
    parser.add_argument("--patches", nargs="*", default=[], help="of Figures 3 and 4")
    parser.add_argument("--on", default="", help="data set of the X-ray figure")
    parser.add_argument("--data_dir", default="", help="where that is prepared")
    parser.add_argument("--pictures", type=Path, help="folder of small PNG files")
    given = parser.parse_args(arguments)
    out = given.out or given.workdir / "figures.html"
    sections, made = [], 0
    for heading, (figure, known) in FIGURES.items():
        own = figure_command.parse(figure, ["--workdir", str(given.workdir)])
        for name in known:
            value = getattr(given, name)
            value = [Path(one) for one in value] if isinstance(value, list) else value
            setattr(own, name, value)
        try:
            drawn = figure.make(own)
        except (ValueError, FileNotFoundError) as error:
            print(f"{heading}: not drawn: {error}")
            part = f"<p><mark>Not drawn: {escape(str(error))}</mark></p>"
        else:
            print(f"{heading}: drawn")
            made += 1
            if given.pictures:
                small_png(drawn.figure, given.pictures / own.out.name)
            part = page.chart(
                page.embedded(encoded(drawn.figure), heading), drawn.caption
            )
        sections.append(page.section(heading, part))
    if not made:
        sys.exit(f"error: {given.workdir} gives none of the figures; see above")
    whole = page.whole("Figures of both papers", f"Run {given.workdir.name}", sections)
    disk.write(out, whole)
    print(f"{made} of {len(FIGURES)} figures: {out}")
    return int(made < len(FIGURES))


def small_png(figure, path: Path) -> None:
    """The figure as wide as a README, in a palette, which halves the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(io.BytesIO(encoded(figure, "png"))).convert("RGB")
    picture.thumbnail((WIDTH, 2 * WIDTH), Image.Resampling.LANCZOS)
    # An octree keeps the few colours beside many grays.
    few = picture.quantize(256, method=Image.Quantize.FASTOCTREE)
    few.save(path, optimize=True)


def encoded(figure, kind: str = "jpeg") -> bytes:
    """The figure on white."""
    buffer = io.BytesIO()
    figures.save(figure, buffer, kind=kind)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
