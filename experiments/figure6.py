"""Figure 6 of the CT paper: removed patches, the score meanwhile, and the class map.

python -m experiments.figure6 --run runs/b-full --images 12.png 7.png --out fig6.png

The run must have been scored with voting (config.tta.k > 0). Without --images it takes
the images with the most opposing votes. The paper's maps are by Gur et al. (2020);
here the class map stands in (A32).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cxai_jax.data import transforms
from cxai_jax.report import figures, pictures
from cxai_jax.voting import rules
from experiments.run_files import read_run, rows_of

STAGES = 3  # Masked images shown per row, evenly up to all k masks.


def draw(grays, cells, probs, maps, captions, *, patch: int, theta: float) -> Figure:
    """One row per image: masked images, score against removed cells, class map.

    Args:
      grays: uint8 [S, S, 1] per row, at the network's input size.
      cells: int [rows, k], best first.
      probs: per row [k+1], of the first label.
      maps: per row [h, w].
      captions: one per row.
      patch: pixels, side of a cell.
      theta: support threshold.
    """
    k = cells.shape[1]
    scale = pictures.common_scale(maps)
    counts = np.linspace(0, k, STAGES + 1).round().astype(int)[1:]
    with rc_context(figures.STYLE):
        figure = Figure((2.1 * (STAGES + 3), 2.3 * len(grays)), layout="constrained")
        widths = [1] * (STAGES + 1) + [1.6]
        grid = figure.subplots(
            len(grays), STAGES + 2, squeeze=False, width_ratios=widths
        )
        for row, axes in enumerate(grid):
            for place, count in zip(axes, counts, strict=False):
                masked = pictures.without_cells(
                    grays[row], cells[row, :count], patch=patch
                )
                place.imshow(masked, cmap="gray", vmin=0, vmax=255)
                place.set_xlabel(f"{count} cells removed", fontsize=8)
            axes[-2].imshow(pictures.overlay(grays[row], maps[row], scale))
            axes[-2].set_xlabel("class map", fontsize=8)
            for place in axes[:-1]:
                place.set(xticks=[], yticks=[])
            axes[0].set_title(captions[row], fontsize=8, loc="left")
            axes[-1].plot(probs[row])
            axes[-1].axhspan(0, theta, color=figures.INK, alpha=0.08, linewidth=0)
            axes[-1].set(ylim=(-0.02, 1.02), xlabel="cells removed", ylabel="score")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.figure6")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--images", nargs="*", default=[], help="names, or their ends")
    parser.add_argument("--count", type=int, default=4, help="without --images")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    config, results, predictions, records = read_run(given.run)
    probs, k = predictions["probs"], predictions["probs"].shape[1] - 1
    if k == 0:
        parser.error(f"{given.run} was scored without voting; use --config.tta.k=31")
    votes = rules.votes_for(probs, theta=config.tta.theta, k=k)
    before, after = np.asarray(votes.original), np.asarray(votes.labels)
    opposing = np.asarray(votes.opposing)
    rows = rows_of(predictions, given.images)
    rows = np.array(rows or np.argsort(-opposing, kind="stable")[: given.count])
    maps = predictions["class_maps"][rows, :, :, before[rows]]
    size, patch = config.data.image_size, config.tta.patch
    names = results["data"]["class_names"]
    figure = draw(
        [transforms.squash(records.images[int(row)], size) for row in rows],
        np.asarray(rules.rank_cells(maps, grid=size // patch, k=k, patch=patch)),
        [probs[row, :, before[row]] for row in rows],
        maps,
        [
            f"true {names[predictions['labels'][row]]}, first {names[before[row]]}, "
            f"{opposing[row]} of {k} oppose: {names[after[row]]}"
            for row in rows
        ],
        patch=patch,
        theta=config.tta.theta,
    )
    figures.save(figure, given.out)
    print(f"{len(rows)} images: {given.out}")


if __name__ == "__main__":
    main()
