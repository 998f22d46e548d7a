"""Figure 5 of the CT paper: class maps of baseline, +CPE, +SnapMix and both.

python -m experiments.figure5 --runs runs/b-baseline runs/b-cpe runs/b-snapmix \
    runs/b-full --images 12.png 7.png --out figure5.png

All runs must be scored on the same split. Without --images it takes those on which
the runs differ most in the probability of the true class. The paper's maps are by Gur
et al. (2020); here the class map stands in (A32).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cxai_jax.report import figures, pictures
from experiments.run_files import read_run, rows_of

TITLES = ("baseline", "+ CPE", "+ SnapMix", "+ CPE + SnapMix")


def most_different(labels: np.ndarray, probs: Sequence[np.ndarray], count: int):
    """Rows whose true-class probability [N, K] differs most between the runs."""
    true = np.stack([p[np.arange(len(labels)), labels] for p in probs])
    return np.argsort(-np.ptp(true, axis=0), kind="stable")[:count].tolist()


def draw(images, maps, captions, titles: Sequence[str]) -> Figure:
    """One row per image: the image, then its map of each run.

    Args:
      images: gray uint8 [H, W, 1] per row.
      maps: [row][run] class map [h, w] of the predicted class.
      captions: [row][0] under the image and [row][1 + run] under each map.
      titles: one per run.
    """
    scales = [pictures.common_scale(of_run) for of_run in zip(*maps, strict=True)]
    with rc_context(figures.STYLE):
        figure = Figure((2 * (1 + len(titles)), 2.3 * len(images)), layout="tight")
        grid = figure.subplots(len(images), 1 + len(titles), squeeze=False)
        for row, (gray, row_maps, texts) in enumerate(
            zip(images, maps, captions, strict=True)
        ):
            shown = [np.repeat(gray, 3, axis=2)]
            shown += [
                pictures.overlay(gray, class_map, scale)
                for class_map, scale in zip(row_maps, scales, strict=True)
            ]
            for axes, picture, text in zip(grid[row], shown, texts, strict=True):
                axes.imshow(picture)
                axes.set_xlabel(text, fontsize=8)
                axes.set(xticks=[], yticks=[])
        for axes, title in zip(grid[0], ("image", *titles), strict=True):
            axes.set_title(title, fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.figure5")
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--titles", nargs="+", default=TITLES)
    parser.add_argument("--images", nargs="*", default=[], help="names, or their ends")
    parser.add_argument("--count", type=int, default=6, help="without --images")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    runs = [read_run(workdir) for workdir in given.runs]
    _, results, first, records = runs[0]
    for workdir, (_, _, predictions, _) in zip(given.runs, runs, strict=True):
        if not np.array_equal(predictions["names"], first["names"]):
            parser.error(f"{workdir} was scored on other images than {given.runs[0]}")
    if len(given.titles) != len(runs):
        parser.error(f"{len(runs)} runs need {len(runs)} --titles")
    names = results["data"]["class_names"]
    probs = [predictions["probs"][:, 0] for _, _, predictions, _ in runs]
    rows = rows_of(first, given.images) or most_different(
        first["labels"], probs, given.count
    )
    maps, captions = [], []
    for row in rows:
        decided = [int(p[row].argmax()) for p in probs]
        maps.append(
            [
                predictions["class_maps"][row, :, :, label]
                for (_, _, predictions, _), label in zip(runs, decided, strict=True)
            ]
        )
        captions.append(
            [f"true: {names[first['labels'][row]]}"]
            + [
                f"{names[label]} ({100 * p[row, label]:.0f} %)"
                for p, label in zip(probs, decided, strict=True)
            ]
        )
    figure = draw([records.images[row] for row in rows], maps, captions, given.titles)
    figures.save(figure, given.out)
    print(f"{len(rows)} images, {len(runs)} runs: {given.out}")


if __name__ == "__main__":
    main()
