"""Figure 5 of the CT paper: what baseline, + CPE, + SnapMix and both look at.

python -m experiments.figure5 --workdir runs/b-full --rows runs/b-baseline runs/b-cpe \
    runs/b-snapmix [--images 12.png 7.png]

Two maps of each network's own label: its class map, and the attribution of Gur et al.
(2021), which is what the paper shows. All runs must be scored on the same images.
Without --images it takes those on which the runs differ most in the probability of the
true class, or, of one run, the surest of each class, right and wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cxai_jax.inference import predictor
from cxai_jax.report import figures, pictures
from experiments import figure_command, run_maps
from experiments.figure_command import Drawn, show
from experiments.run_files import (
    gray_of,
    read_run,
    rows_of,
    seen,
    source,
    title,
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=Path, nargs="*", default=[], help="other runs, drawn before it"
    )
    parser.add_argument("--images", nargs="*", default=[], help="names, or their ends")
    parser.add_argument("--count", type=int, default=4, help="without --images")


def make(given: argparse.Namespace) -> Drawn:
    workdirs = [*given.rows, given.workdir]
    runs = [read_run(workdir) for workdir in workdirs]
    first = runs[-1]
    names, labels = (first.predictions[name] for name in ("names", "labels"))
    for run in runs:
        if not np.array_equal(run.predictions["names"], names):
            raise ValueError(
                f"{run.workdir} was scored on other images than {first.workdir}"
            )
    probs = [run.predictions["probs"][:, 0] for run in runs]
    rows = rows_of(names, given.images)
    if not rows:
        choose = most_different if len(runs) > 1 else surest
        rows = choose(labels, probs, given.count)
    texts = [[f"true: {first.class_names[labels[row]]}"] for row in rows]
    columns = []
    for run, chances in zip(runs, probs, strict=True):
        decided = chances[rows].argmax(1)
        evidence = pictures.evidence(run.predictions["class_maps"][rows], decided)
        trained = predictor.load(run.workdir)
        inputs = run_maps.prepared(trained, seen(run, run.records, rows))
        attributed = run_maps.guided_factorization(
            trained, inputs, decided, run.predictions["sites"][rows]
        )
        columns += [(evidence, "CAM"), (attributed, "AGF")]
        for text, row, label in zip(texts, rows, decided, strict=True):
            text.append(
                f"{first.class_names[label]} ({100 * chances[row, label]:.0f} %)"
            )
    figure = draw(
        [gray_of(image) for image in seen(first, first.records, rows)],
        columns,
        texts,
        [title(run.config) for run in runs],
    )
    return Drawn(
        figure,
        "Maps of each network's own label, whose probability stands below, against the "
        "mean of all classes. CAM: class map, one scale for each network, so one with "
        "little evidence looks empty. AGF: attribution of Gur et al. (2021) in means "
        "over cells, each over its own maximum: it says where, not how much. Images"
        f" {', '.join(names[rows])} of {first.config.data.test}. "
        + " ".join(source(run) for run in runs),
    )


def most_different(labels: np.ndarray, probs: Sequence[np.ndarray], count: int):
    """Rows whose true-class probability [N, K] differs most between the runs."""
    true = np.stack([p[np.arange(len(labels)), labels] for p in probs])
    return np.argsort(-np.ptp(true, axis=0), kind="stable")[:count].tolist()


def surest(labels: np.ndarray, probs: Sequence[np.ndarray], count: int) -> list[int]:
    """Rows of one run, by turns of (true, decided) class, surest first."""
    (chances,) = probs
    kinds, order = {}, np.argsort(-chances.max(1), kind="stable")
    for row in order:
        kinds.setdefault((labels[row], chances[row].argmax()), []).append(int(row))
    turns = max(map(len, kinds.values()))
    rows = [
        of[turn] for turn in range(turns) for of in kinds.values() if turn < len(of)
    ]
    return rows[:count]


def draw(images, columns, texts, titles: Sequence[str]) -> Figure:
    """One row for each image: the image, then the two maps of each run.

    Args:
      images: gray uint8 [S, S, 1] per row.
      columns: two per run, (maps [rows, h, w], their name).
      texts: [row][0] under the image and [row][1 + run] under the run's maps.
      titles: one per run.
    """
    width = 1 + len(columns)
    with rc_context(figures.STYLE):
        figure = Figure((1.65 * width, 1.95 * len(images) + 0.4), layout="constrained")
        grid = figure.subplots(len(images), width, squeeze=False)
        for axes, gray, text in zip(grid[:, 0], images, texts, strict=True):
            show(axes, gray)
            axes.set_xlabel(text[0], fontsize=8)
        for place, (maps, name) in enumerate(columns, 1):
            of_run = pictures.common_scale(maps)
            for axes, gray, one, text in zip(
                grid[:, place], images, maps, texts, strict=True
            ):
                scale = one.max() if name == "AGF" else of_run
                show(axes, gray, one, float(scale))
                if name == "CAM":
                    axes.set_xlabel(text[1 + (place - 1) // 2], fontsize=8)
            heading = titles[(place - 1) // 2] if name == "CAM" else ""
            grid[0, place].set_title(f"{heading}\n{name}", fontsize=9)
        grid[0, 0].set_title("\nimage", fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    figure_command.run(sys.modules[__name__], arguments)


if __name__ == "__main__":
    main()
