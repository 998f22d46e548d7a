"""Figure 6 of the CT paper: removed patches, the map of each image, and the score.

python -m experiments.figure6 --workdir runs/b-full [--images 12.png 7.png]

For each image its masked forms, evenly up to all k masks, under the class map and under
the attribution of Gur et al. (2021) that the network gives for that very form and the
first label. Without --images it takes those with the most opposing votes. The run must
have been scored with voting (config.tta.k > 0).
"""

import argparse
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cxai_jax.inference import predictor
from cxai_jax.report import figures, pictures
from cxai_jax.voting import rules
from experiments import figure_command, run_maps
from experiments.figure2 import cells_of
from experiments.figure_command import Drawn, outline, show
from experiments.run_files import (
    gray_of,
    masked,
    need_votes,
    read_run,
    rows_of,
    seen,
    source,
)

FORMS = 4  # Of an image: the whole one, and three with cells removed.


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", nargs="*", default=[], help="names, or their ends")
    parser.add_argument("--count", type=int, default=2, help="without --images")


def make(given: argparse.Namespace) -> Drawn:
    run = read_run(given.workdir)
    need_votes(run)
    predictions, tta = run.predictions, run.config.tta
    votes = rules.votes_for(predictions["probs"], theta=tta.theta, k=run.masks)
    before, after, opposing = map(
        np.asarray, (votes.original, votes.labels, votes.opposing)
    )
    rows = np.array(
        rows_of(predictions["names"], given.images)
        or np.argsort(-opposing, kind="stable")[: given.count]
    )
    counts = np.unique(np.linspace(0, run.masks, FORMS).round().astype(int))
    cells, images = cells_of(run, rows), seen(run, run.records, rows)
    trained = predictor.load(given.workdir)
    side = run.config.data.image_size // tta.patch
    inputs = np.asarray(
        rules.masked_images(
            jnp.asarray(run_maps.prepared(trained, images)),
            jnp.asarray(cells),
            grid=side,
            fill=tta.fill,
        )
    )[:, counts]
    inputs = inputs.reshape(-1, *inputs.shape[2:])
    labels, sites = (
        np.repeat(values, len(counts))
        for values in (before[rows], predictions["sites"][rows])
    )
    _, class_maps = run_maps.look(trained, inputs, sites)
    cams = class_maps[np.arange(len(labels)), :, :, labels]
    attributed = run_maps.guided_factorization(trained, inputs, labels, sites)
    names = run.class_names
    figure = draw(
        [
            [masked(run, gray_of(image), own[:count]) for count in counts]
            for image, own in zip(images, cells, strict=True)
        ],
        counts,
        [predictions["probs"][row, :, before[row]] for row in rows],
        {
            "CAM": cams.reshape(len(rows), -1, *cams.shape[1:]),
            "AGF": attributed.reshape(len(rows), -1, *attributed.shape[1:]),
        },
        [
            f"true {names[predictions['labels'][row]]}, first {names[before[row]]}, "
            f"{opposing[row]} of {run.masks} oppose: {names[after[row]]}"
            for row in rows
        ],
        theta=tta.theta,
    )
    return Drawn(
        figure,
        "Images while the best cells of their first class map are removed "
        "(outlined), each under the map of that very form for the first label. CAM: "
        "class map, which ranks the cells, one scale for all forms of an image. AGF: "
        "attribution of Gur et al. (2021) in means over cells, each over its own "
        "maximum. Right: probability of the first label; below theta = "
        f"{tta.theta:g} (gray) a form of one of two classes votes against it. "
        f"Images {', '.join(predictions['names'][rows])}. {source(run)}",
    )


def draw(forms, counts, scores, maps: dict, captions, *, theta: float) -> Figure:
    """For each image a row for each kind of map, and its score beside them.

    Args:
      forms: per image pairs of uint8 [S, S, 1] and where it is masked, bool [S, S].
      counts: removed cells of each form, int [forms].
      scores: per image [k + 1], of the first label.
      maps: name -> [N, forms, h, w].
      captions: one per image.
      theta: support threshold.
    """
    with rc_context(figures.STYLE):
        width, height = 1.7 * len(counts) + 2.9, 1.95 * len(maps) + 0.35
        figure = Figure((width, height * len(forms)), layout="constrained")
        for number, part in enumerate(
            np.atleast_1d(figure.subfigures(len(forms), 1, hspace=0.03))
        ):
            part.suptitle(captions[number], fontsize=9, x=0.01, ha="left")
            grid = part.add_gridspec(
                len(maps), len(counts) + 1, width_ratios=[1] * len(counts) + [1.5]
            )
            for line, (name, of_all) in enumerate(maps.items()):
                own = pictures.common_scale(of_all[number])
                for place, count in enumerate(counts):
                    axes = part.add_subplot(grid[line, place])
                    one = of_all[number, place]
                    image, removed = forms[number][place]
                    scale = float(one.max()) if name == "AGF" else own
                    show(axes, image, one, scale)
                    outline(axes, removed, figures.COLOURS[1])
                    if not place:
                        axes.set_ylabel(name)
                    if line == len(maps) - 1:
                        axes.set_xlabel(f"{count} removed", fontsize=8)
            axes = part.add_subplot(grid[:, -1])
            axes.plot(scores[number])
            axes.plot(
                counts, scores[number][counts], "o", color=figures.COLOURS[0], ms=4
            )
            axes.axhspan(0, theta, color=figures.INK, alpha=0.08, linewidth=0)
            axes.set(ylim=(-0.02, 1.02), xlabel="cells removed", ylabel="score")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    figure_command.run(sys.modules[__name__], arguments)


if __name__ == "__main__":
    main()
