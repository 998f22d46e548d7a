"""Figure 1 of the chest X-ray paper: a network on images of another collection.

python -m experiments.xray_figure1 --workdir runs/cxr [--on cxr --data_dir DIR]

Purwita and Qomariyah (2021) show that a network trained on one collection looks, by
Grad-CAM, at letters and borders of another's images. Here a run looks at a prepared
data set, --on with --data_dir, or else at its own scored split, and the share of its
Grad-CAM's positive energy on burnt-in text, in the border and outside the lungs is
measured, with the share of the image that each takes: a map without a place has that.

Text is found by its looks, not read: small, sharp and white marks outside the lungs
(`burnt_in`). It misses gray and very small letters and takes arrows and clips for text,
and on the phantoms, which are CT slices, ribs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy import ndimage

from cxai_jax import data
from cxai_jax.config import read_config
from cxai_jax.data.records import Records
from cxai_jax.data.transforms import squash
from cxai_jax.inference import predictor
from cxai_jax.maps import quality
from cxai_jax.maps.grid import upsample
from cxai_jax.report import figures, pictures
from cxai_jax.scoring import explanations
from experiments import figure_command, run_maps
from experiments.figure_command import Drawn, outline, show
from experiments.run_files import gray_of, trained_as

SHOWN = 6  # Images drawn.
BORDER = 0.1  # Of each side, as in `quality.border_mass`.
WHITE = 0.7  # Of the brightest pixel: how bright a letter is at least,
CONTRAST = 110  # gray levels above its surroundings;
LETTER = 0.09  # half of the longest side of its box, share of the image's.
REACH = 0.02  # Of the side: by which a letter's box grows.


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on", default="", help="another data set, as config.data.name"
    )
    parser.add_argument("--data_dir", default="", help="where it is prepared")
    parser.add_argument("--split", default="test", help="of it: train, val or test")
    parser.add_argument(
        "--limit", type=int, default=128, help="images measured at most"
    )


def make(given: argparse.Namespace) -> Drawn:
    trained = predictor.load(given.workdir)
    config = read_config(given.workdir)
    run, own = (
        trained_as(given.workdir, config),
        (config.data.name, config.data.data_dir),
    )
    if given.on:
        config.data.update({"name": given.on, "split": "", "fold": ""})
    if given.data_dir:
        config.data.data_dir = given.data_dir
    dataset = data.load(config.data)
    if given.split not in dataset.splits:
        raise ValueError(
            f"{config.data.name} has no split {given.split!r}; known: "
            f"{', '.join(dataset.splits)}"
        )
    records = dataset.splits[given.split]
    records = records.subset(explanations.evenly(len(records), given.limit))
    size = config.data.image_size
    lungs = explanations.lung_masks(records, size)
    if lungs is None or not lungs.any():
        raise ValueError(
            f"{config.data.name} has no lung masks in {given.split}, so what lies "
            "outside the lungs cannot be told; name one that has some with --on, cxr "
            "or phantom"
        )
    images = np.stack([squash(image, size) for image in records.images])
    inputs = run_maps.prepared(trained, images)
    probs, _ = run_maps.look(trained, inputs, records.sites)
    maps = run_maps.gradcam(trained, inputs, probs.argmax(1), records.sites)
    drawn = np.asarray(upsample(np.maximum(maps, 0), size))
    grays = [gray_of(image) for image in images]
    text = np.stack([text_of(records, row, size) for row in range(len(records))])
    found = energies(drawn, text, lungs)
    rows = evenly_ranked(found["outside the lungs"][0], SHOWN)
    figure = draw(
        [grays[row] for row in rows],
        [maps[row] for row in rows],
        [(text[row], lungs[row]) for row in rows],
        [caption_of(trained.class_names[probs[r].argmax()], found, r) for r in rows],
        summary(found),
    )
    other = own != (config.data.name, config.data.data_dir)
    return Drawn(figure, caption(given, run, records, found, other))


def text_of(records: Records, row: int, size: int) -> np.ndarray:
    """`burnt_in` of an image as it is stored, bool at the network's size [S, S]."""
    gray, mask = gray_of(records.images[row])[..., 0], records.lung_masks[row]
    lungs = np.zeros(gray.shape, bool) if mask is None else np.asarray(mask) > 0
    found = np.where(burnt_in(gray, lungs), 255, 0).astype(np.uint8)
    return squash(found[..., None], size)[..., 0] > 0


def burnt_in(gray: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """Boxes around small white marks that are brighter than what surrounds them.

    Args:
      gray: uint8 [H, W].
      lungs: bool [H, W]; what touches them is anatomy or a lead, not text.

    Returns:
      bool [H, W].
    """
    side = min(gray.shape)
    stroke = max(3, round(LETTER * side))
    raised = ndimage.white_tophat(gray.astype(np.int16), size=stroke) >= CONTRAST
    white = gray >= WHITE * gray.max()
    marks, _ = ndimage.label(raised & white, structure=np.ones((3, 3)))
    found, reach = np.zeros(gray.shape, bool), max(1, round(REACH * side))
    for number, (rows, columns) in enumerate(ndimage.find_objects(marks), 1):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        inside = lungs & (marks == number)
        # A letter has two strokes at least, and is no line across the image.
        small = max(height, width) <= 2 * stroke and min(height, width) >= 2
        if small and not inside.any():
            found[
                max(rows.start - reach, 0) : rows.stop + reach,
                max(columns.start - reach, 0) : columns.stop + reach,
            ] = True
    return found


def energies(drawn, text, lungs) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Place -> (share of each map's energy there, share of the image), [N] each.

    NaN where it cannot be said: for a map without positive values, an image without
    text, one without a lung mask.

    Args:
      drawn: rectified maps [N, S, S].
      text, lungs: bool [N, S, S].
    """
    border = np.ones(drawn.shape[1:], bool)
    edge = round(BORDER * len(border))
    border[edge:-edge, edge:-edge] = False
    known, some = lungs.any((1, 2), keepdims=True), drawn.any((1, 2))
    places = {
        "on text": text,
        "in the border": np.broadcast_to(border, text.shape),
        "outside the lungs": ~lungs & known,
    }
    found = {}
    for name, place in places.items():
        area = place.mean((1, 2))
        there = (area > 0) & some
        energy = quality.energy_pointing_game(drawn, place)
        found[name] = tuple(np.where(there, one, np.nan) for one in (energy, area))
    return found


def summary(found: dict) -> dict[str, tuple[float, float, int]]:
    """Place -> mean energy, mean area, and of how many images."""
    means = {}
    for name, (energy, area) in found.items():
        known = np.isfinite(energy)
        values = (energy[known].mean(), area[known].mean()) if known.any() else (0, 0)
        means[name] = (*map(float, values), int(known.sum()))
    return means


def evenly_ranked(values: np.ndarray, count: int) -> list[int]:
    """Rows from the largest to the smallest value in even steps; NaN are left out."""
    order = [int(row) for row in np.argsort(-values) if np.isfinite(values[row])]
    return [order[i] for i in explanations.evenly(len(order), count)] if order else []


def caption_of(label: str, found: dict, row: int) -> str:
    """Label and shares, below an image."""
    shares = {name: energy[row] for name, (energy, _) in found.items()}
    lines = (
        f"{name} {100 * share:.0f} %" if np.isfinite(share) else f"{name}: none found"
        for name, share in shares.items()
    )
    return "\n".join((label, *lines))


def draw(grays, maps, places, texts, means: dict) -> Figure:
    """Images under their maps, text and lungs outlined; beside them the means.

    Args:
      grays: uint8 [S, S, 1] per image.
      maps: signed [h, w] per image.
      places: (text, lungs), bool [S, S] each, per image.
      texts: one per image.
      means: what `summary` returned.
    """
    columns = max(1, -(-len(grays) // 2))
    with rc_context(figures.STYLE):
        figure = Figure((2.1 * columns + 3.4, 5.8), layout="constrained")
        grid = figure.add_gridspec(2, columns + 1, width_ratios=[1] * columns + [1.35])
        for place, (gray, one, (text, lungs), words) in enumerate(
            zip(grays, maps, places, texts, strict=True)
        ):
            axes = figure.add_subplot(grid[place // columns, place % columns])
            show(axes, gray, one, pictures.common_scale([one]))
            outline(axes, lungs, "white")
            outline(axes, text, "#e03030")
            axes.set_xlabel(words, fontsize=8)
        axes = figure.add_subplot(grid[:, -1])
        across = np.arange(len(means))
        values = np.array([value[:2] for value in means.values()])
        for shift, (column, label) in enumerate(
            ((0, "of the map's energy"), (1, "of the image"))
        ):
            colour = figures.COLOURS[1 if shift == 0 else 0]
            bars = axes.bar(
                across + 0.4 * shift - 0.2,
                100 * values[:, column],
                0.36,
                color=colour,
                label=label,
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=8)
        names = [f"{name}\n({value[2]})" for name, value in means.items()]
        axes.set_xticks(
            across, [name.replace(" ", "\n", 1) for name in names], fontsize=8
        )
        axes.set_ylabel("mean share, percent")
        axes.set_ylim(0, 108)
        axes.legend(loc="upper left", fontsize=8)
    return figure


def caption(given, run: str, records: Records, found: dict, other: bool) -> str:
    """What one sees; `run` says which network, `other` whether on another's images."""
    where = " ".join(
        part
        for part in (
            f"{len(records)} images of {given.split}",
            given.on and f"of {given.on}",
            given.data_dir and f"in {Path(given.data_dir).name}",
        )
        if part
    )
    means = summary(found)
    shares = "; ".join(
        f"{name} {100 * energy:.0f} % on {100 * area:.0f} % of the image "
        f"({count} images)"
        for name, (energy, area, count) in means.items()
    )
    which = "another collection" if other else "no other collection (see --on)"
    return (
        "Grad-CAM, one stage before the last, of the predicted label, positive part, "
        "each on its own scale. Lungs white, marks taken for text red (found by their "
        "looks, with errors). From most to least energy outside the lungs. Mean share "
        f"of the energy: {shares}. {run}; seen on {which}, {where}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    figure_command.run(sys.modules[__name__], arguments)


if __name__ == "__main__":
    main()
