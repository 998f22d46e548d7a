"""Figure 1 of the CT paper: how SnapMix makes an image and its two weights.

python -m experiments.figure1 --workdir runs/b-full [--images 12.png 7.png] [--seed 3]

Two training images, the box that each gives or receives, their semantic percent maps by
the run's network, and what comes of them. Without --images they are a positive one and
one of another class, of another site where there is one. Boxes are drawn as in
training; --seed draws others. The maps are of the finished network with its running
statistics, while training takes those of the batch and of the weights at that step.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cxai_jax.inference import predictor
from cxai_jax.maps import cam
from cxai_jax.objectives import mixing
from cxai_jax.report import figures, pictures
from experiments import figure_command, run_maps
from experiments.figure_command import Drawn, show
from experiments.run_files import Run, gray_of, read_run, rows_of, seen, source

AREAS = (0.08, 0.5)  # Of the image: boxes that can be seen are drawn until they fit.


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", nargs=2, default=[], help="names, or their ends")
    parser.add_argument("--seed", type=int, default=0, help="of the boxes")


def make(given: argparse.Namespace) -> Drawn:
    run = read_run(given.workdir)
    records = run.dataset.splits["train"]
    rows = rows_of(records.names, given.images) or two_images(
        records.labels, records.sites, run.dataset.positive
    )
    images, labels = seen(run, records, rows), records.labels[rows]
    trained = predictor.load(given.workdir)
    _, maps = run_maps.look(
        trained, run_maps.prepared(trained, images), records.sites[rows]
    )
    own = cam.of_class(jnp.asarray(maps), jnp.asarray(labels))
    boxes = draw_boxes(given.seed, images.shape[1], run.config.mix.beta)
    mixed = jax.jit(mixing.snapmix, static_argnames="same_class")(
        jnp.asarray(images),
        jnp.asarray(labels),
        own,
        permutation=jnp.array([1, 0]),
        box_dst=boxes[0],
        box_src=boxes[1],
        same_class=run.config.mix.same_class,
    )
    percent = np.asarray(cam.semantic_percent_map(own, images.shape[1]))
    weights = float(mixed.weight_a[0]), float(mixed.weight_b[0])
    names = [run.class_names[label] for label in labels]
    result = np.asarray(mixed.images[0]).round().astype(np.uint8)
    figure = draw(images, percent, np.asarray(boxes), result, names, weights)
    doubled = labels[0] == labels[1] and run.config.mix.same_class == "double"
    return Drawn(figure, caption(run, weights, doubled, records.names[rows]))


def two_images(labels: np.ndarray, sites: np.ndarray, positive: int) -> list[int]:
    """A positive image and one of another class, of another site if there is one.

    Raises:
      ValueError: if all images are of one class.
    """
    first, others = (
        np.flatnonzero(labels == positive),
        np.flatnonzero(labels != positive),
    )
    if not len(first) or not len(others):
        raise ValueError("SnapMix is shown on two classes, and all images are of one")
    elsewhere = others[sites[others] != sites[first[0]]]
    return [int(first[0]), int((elsewhere if len(elsewhere) else others)[0])]


def draw_boxes(seed: int, size: int, beta: float) -> tuple:
    """Destination and source box, int32 [4] each, of areas within AREAS."""
    boxes, key = [], jax.random.key(seed)
    while len(boxes) < 2:
        key, for_lam, for_box = jax.random.split(key, 3)
        lam = jax.random.beta(for_lam, beta, beta)
        box = mixing.sample_box(for_box, lam, size)
        if AREAS[0] <= mixing.box_area(box[None])[0] / size**2 <= AREAS[1]:
            boxes.append(box)
    return tuple(boxes)


def draw(images, percent, boxes, mixed, names, weights) -> Figure:
    """Two rows, receiver and donor: image and map with the box; beside them the mix.

    Args:
      images: uint8 [2, S, S, C], receiver and donor.
      percent: semantic percent maps [2, S, S].
      boxes: (row0, col0, row1, col1) of destination and source.
      mixed: uint8 [S, S, C].
      names: class of each.
      weights: of the receiver's and the donor's label.
    """
    scale = pictures.common_scale(percent)
    words = ("receives", "gives")
    with rc_context(figures.STYLE):
        figure = Figure((8.4, 5.2), layout="constrained")
        grid = figure.add_gridspec(2, 3, width_ratios=(1, 1, 1.35))
        for row in (0, 1):
            gray = gray_of(images[row])
            inside = box_share(percent[row], boxes[row])
            texts = (
                f"{words[row]}: {names[row]}",
                f"{100 * inside:.0f} % of the map in the box",
            )
            for column, (own, text) in enumerate(
                zip((None, percent[row]), texts, strict=True)
            ):
                axes = figure.add_subplot(grid[row, column])
                show(axes, gray, own, scale)
                axes.add_patch(rectangle(boxes[row], figures.COLOURS[1 - row]))
                axes.set_title(text, fontsize=9)
        axes = figure.add_subplot(grid[:, 2])
        show(axes, gray_of(mixed))
        axes.add_patch(rectangle(boxes[0], figures.COLOURS[1]))
        axes.set_title("the mixed image", fontsize=9)
        axes.set_xlabel(
            "\n".join(
                f"{weight:.2f} x cross-entropy of {name}"
                for weight, name in zip(weights, names, strict=True)
            )
        )
    return figure


def rectangle(box: Sequence[int], colour: str) -> Rectangle:
    top, left, bottom, right = (int(side) for side in box)
    corner = (left - 0.5, top - 0.5)
    size = (right - left, bottom - top)
    return Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=2)


def box_share(percent: np.ndarray, box: Sequence[int]) -> float:
    """Share of a map [S, S] within a box."""
    top, left, bottom, right = box
    return float(percent[top:bottom, left:right].sum() / percent.sum())


def caption(run: Run, weights, doubled: bool, names: np.ndarray) -> str:
    """What one sees; `doubled`: both images are of one class, and share the sum."""
    shares = (
        "The label of the receiver keeps the share of its map outside the box, "
        f"{weights[0]:.2f}; that of the donor gets the share of its map in its box, "
        f"{weights[1]:.2f}; they need not add up to 1."
    )
    if doubled:
        shares = (
            "The receiver's map outside the box and the donor's in its box together "
            f"give {weights[0]:.2f}, which both get, for they are of one class "
            "(config.mix.same_class=double)."
        )
    return (
        "SnapMix. The donor's box (blue, below) is resized onto the receiver's box "
        f"(orange, above). {shares} Colour: semantic "
        "percent map of each image's own label, one scale for both, by the finished "
        f"network (in training: by the network of that step). Images {names[0]} and "
        f"{names[1]} of train. {source(run)}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    figure_command.run(sys.modules[__name__], arguments)


if __name__ == "__main__":
    main()
