"""Figure 2 of the CT paper: one image while its best cells are masked, with scores.

python -m experiments.figure2 --workdir runs/b-full [--image 12.png]

The image, images 1 to 3 and the last four of the k masked ones (28 to 31 of 31), each
with the probability of the first label. Without --image it is the one with the most
opposing votes. The run must have been scored with voting (config.tta.k > 0).
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cxai_jax.report import figures
from cxai_jax.voting import rules
from experiments import figure_command
from experiments.figure_command import Drawn, outline, show
from experiments.run_files import (
    Run,
    gray_of,
    masked,
    need_votes,
    read_run,
    rows_of,
    seen,
    source,
)

FIRST, LAST = 4, 4  # Images of each row: 0 to 3, and the last four.
AGAINST = "#b02020"  # Colour of a vote against the label.
FILLS = {"min": "the image's minimum", "mean": "its mean", "zero": "the training mean"}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", default="", help="a name, or its end")


def make(given: argparse.Namespace) -> Drawn:
    run = read_run(given.workdir)
    need_votes(run)
    votes = rules.votes_for(
        run.predictions["probs"], theta=run.config.tta.theta, k=run.masks
    )
    wanted = [given.image] if given.image else []
    (row,) = rows_of(run.predictions["names"], wanted) or [
        int(np.argmax(np.asarray(votes.opposing)))
    ]
    before = int(votes.original[row])
    counts = [n for n in range(run.masks + 1) if n < FIRST or n > run.masks - LAST]
    probs, theta = run.predictions["probs"][row], run.config.tta.theta
    gray, cells = gray_of(seen(run, run.records, [row])[0]), cells_of(run, [row])[0]
    figure = draw(
        [masked(run, gray, cells[:count]) for count in counts],
        probs[:, before],
        np.asarray(rules.opposes(probs[None, 1:], np.array([before]), theta=theta))[0],
        counts,
        name=run.class_names[before],
    )
    after = run.class_names[int(votes.labels[row])]
    caption = (
        f"Image {run.predictions['names'][row]}, truly "
        f"{run.class_names[run.predictions['labels'][row]]}, while the cells of the "
        f"largest evidence for {run.class_names[before]} are masked one by one "
        f"(outlined; {run.config.tta.patch} px a side, filled with "
        f"{FILLS[run.config.tta.fill]}). Red: at theta = {theta:g} the image votes "
        "against the label. "
        f"{int(votes.opposing[row])} of {run.masks} do: the label after voting is "
        f"{after}. {source(run)}"
    )
    return Drawn(figure, caption)


def cells_of(run: Run, rows: Sequence[int]) -> np.ndarray:
    """The cells that scoring masked in these images, best first, int [N, k]."""
    predictions, patch = run.predictions, run.config.tta.patch
    before = predictions["probs"][rows, 0].argmax(1)
    maps = predictions["class_maps"][rows, :, :, before]
    grid = run.config.data.image_size // patch
    return np.asarray(rules.rank_cells(maps, grid=grid, k=run.masks, patch=patch))


def draw(images, scores, against, counts, *, name: str) -> Figure:
    """Rows of masked images.

    Args:
      images: pairs of uint8 [S, S, 1] and where it is masked, bool [S, S].
      scores: p_0 .. p_k of the first label, [k + 1].
      against: whether p_1 .. p_k vote against it, bool [k].
      counts: masked cells of each image.
      name: of the first label.
    """
    with rc_context(figures.STYLE):
        lines = -(-len(counts) // FIRST)
        figure = Figure((8.0, 2.45 * lines), layout="constrained")
        for number, (count, (image, place)) in enumerate(
            zip(counts, images, strict=True), 1
        ):
            axes = figure.add_subplot(lines, FIRST, number)
            show(axes, image)
            outline(axes, place, figures.COLOURS[1])
            axes.set_title(f"image {count}" if count else "the image", fontsize=9)
            axes.set_xlabel(
                f"{name}: {scores[count]:.3f}",
                fontsize=9,
                color=AGAINST if count and against[count - 1] else figures.INK,
            )
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    figure_command.run(sys.modules[__name__], arguments)


if __name__ == "__main__":
    main()
