"""The picture of the README: class maps with and without the method, and the truth.

python -m experiments.readme_picture [--runs=runs/readme] [--out=FILE]

Trains configs/demo.py twice, with plain cross-entropy and with SnapMix and CPE, and
draws the positive test slices of the largest opacities, as Figure 5 of the CT paper
does for patients. Above each column stands, over all positive test slices, how well the
map ranks opaque pixels above others (area under the ROC curve, 50 % is chance). Runs
that exist are not repeated. Minutes on a CPU.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from configs import demo
from cxai_jax import data
from cxai_jax.maps import quality as em
from cxai_jax.maps.grid import upsample
from cxai_jax.report import figures, pictures
from cxai_jax.scoring import evaluate
from cxai_jax.training.loop import train

ROWS = {"baseline": "cross-entropy", "full": "SnapMix + CPE"}
COUNT = 2  # Slices drawn, of as many patients.
SIDE = 224  # Pixels of each panel.
WIDTH = 840  # Pixels of the picture.


def main(arguments: Sequence[str] | None = None) -> None:
    default = Path(__file__).parent / "results" / "readme.png"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/readme"))
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args(arguments)
    cache = options.runs.absolute() / "xla_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    found = {}
    for row, title in ROWS.items():
        workdir = options.runs / row
        if not (workdir / "results.json").exists():
            train(demo.get_config(row), workdir)
        found[title] = evaluate.load_predictions(workdir / "predictions_test.npz")
    dataset = data.load(demo.get_config().data)
    figure = draw(dataset.splits["test"], found, dataset.class_names, dataset.positive)
    figures.save(figure, options.out)
    # A README is some 840 pixels wide; a palette halves the bytes.
    picture = Image.open(options.out).convert("RGB")
    picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    picture.quantize(256).save(options.out, optimize=True)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


def draw(records, found: dict, class_names: Sequence[str], positive: int) -> Figure:
    """One row per slice: the slice, its opacities, the positive class's maps.

    Args:
      records: the scored split, with lesion masks.
      found: title -> contents of the predictions file.
    """
    rows = np.flatnonzero(records.labels == positive)
    images = [square(records.images[i][..., 0]) for i in rows]
    masks = np.stack([square(records.lesion_masks[i] * 255) > 127 for i in rows])
    columns = {"slice": images, "opacities (truth)": list(map(outlined, images, masks))}
    captions = [[""] * len(rows), [""] * len(rows)]
    for title, predictions in found.items():
        maps = predictions["class_maps"][rows, :, :, positive]
        scale = pictures.common_scale(maps)
        auc, _ = em.mean_and_excluded(
            em.localisation_auc(np.asarray(upsample(maps, SIDE)), masks)
        )
        columns[f"{title}\n(maps: {100 * auc:.0f} %)"] = [
            pictures.overlay(image, one, scale)
            for image, one in zip(images, maps, strict=True)
        ]
        probs = predictions["probs"][rows, 0, positive]
        captions.append([f"{class_names[positive]}: {100 * p:.0f} %" for p in probs])
    shown = largest(masks.sum((1, 2)), records.patients[rows], COUNT)
    with rc_context(figures.STYLE):
        figure = Figure((2 * len(columns), 2.15 * COUNT + 0.3), layout="tight")
        grid = figure.subplots(COUNT, len(columns), squeeze=False)
        for column, (title, shown_here) in enumerate(columns.items()):
            grid[0, column].set_title(title, fontsize=10)
            for axes, i in zip(grid[:, column], shown, strict=True):
                axes.imshow(shown_here[i], cmap="gray")
                axes.set_xlabel(captions[column][i], fontsize=9)
                axes.set(xticks=[], yticks=[])
    return figure


def square(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w] squashed to [SIDE, SIDE], as the network's input is."""
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE)))


def outlined(gray: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with the mask's edge in the charts' second colour: uint8 [H, W, 3]."""
    padded = np.pad(mask, 2)
    neighbours = [
        padded[2 + dy : 2 + dy + SIDE, 2 + dx : 2 + dx + SIDE]
        for dy, dx in ((2, 0), (-2, 0), (0, 2), (0, -2))
    ]
    edge = mask & ~np.logical_and.reduce(neighbours)
    colour = [int(figures.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)]
    return np.where(edge[..., None], colour, gray[..., None]).astype(np.uint8)


def largest(areas: np.ndarray, patients: np.ndarray, count: int) -> list[int]:
    """The rows of the largest areas, at most one per patient."""
    order = np.argsort(-areas, kind="stable")
    _, first = np.unique(patients[order], return_index=True)
    return order[np.sort(first)[:count]].tolist()


if __name__ == "__main__":
    main()
