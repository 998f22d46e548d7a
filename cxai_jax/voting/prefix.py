"""Exact reuse of a network's first layers between nested masks.

Variant j + 1 of an image differs from variant j in one cell. Behind the first layers
that cell reaches a small window of the map; the rest of the map stays as it was. So a
small crop of every variant is enough: the first layers run on the crops, all in one
batch, and their windows are written one after the other into the map of the image.
A crop that touches the border of the image touches it at the same place, so that zero
padding is the same and the map is the full pass's, bit for bit where the compiler takes
the same kernel for both shapes.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cxai_jax.models.backbone import Window
from cxai_jax.types import Array


class Crops(NamedTuple):
    """What to recompute when a cell changes; arrays int32 [grid], by row or column."""

    image: int  # Pixels, side of the image.
    side: int  # Pixels, side of the square crop.
    origins: np.ndarray  # Its first pixel.
    window: int  # Side of the renewed window of the map.
    places: np.ndarray  # Its first place in the map of the whole image.
    offsets: np.ndarray  # Its first place in the map of the crop.

    @property
    def share(self) -> float:
        """Pixels of a crop over pixels of the image."""
        return (self.side / self.image) ** 2


def output_sizes(windows: Sequence[Window], size: int) -> list[int]:
    """Side of the input and of every layer's output."""
    sizes = [size]
    for k, stride, padding in windows:
        sizes.append((sizes[-1] + 2 * padding - k) // stride + 1)
    return sizes


def reached(
    windows: Sequence[Window], size: int, start: int, stop: int
) -> tuple[int, int]:
    """Outputs of the last layer that inputs start..stop of `size` can change.

    Output i reads some of them if i stride - padding < stop and
    i stride - padding + k > start.
    """
    for (k, stride, padding), out in zip(
        windows, output_sizes(windows, size)[1:], strict=True
    ):
        start = max(0, (start + padding - k) // stride + 1)
        stop = min(out, -(-(stop + padding) // stride))
    return start, stop


def read(
    windows: Sequence[Window], size: int, start: int, stop: int
) -> tuple[int, int]:
    """Inputs, of `size`, that the outputs start..stop of the last layer depend on."""
    for (k, stride, padding), n in zip(
        reversed(windows), reversed(output_sizes(windows, size)[:-1]), strict=True
    ):
        start = max(0, start * stride - padding)
        stop = min(n, (stop - 1) * stride - padding + k)
    return start, stop


def plan_crops(windows: Sequence[Window], size: int, grid: int) -> Crops:
    """The smallest crops of one size that renew the map exactly for every cell.

    Origins are multiples of the total stride, so that a crop's map lies on the grid of
    the image's. A crop as large as the image is possible and gains nothing.

    Args:
      windows: the first layers, from the image on.
      size: pixels, side of the square image.
      grid: cells per side; divides `size`.

    Raises:
      ValueError: if the grid does not divide the image, or the image is too small for
        the layers.
    """
    if grid < 1 or size % grid:
        raise ValueError(f"a grid of {grid} cells does not divide {size} pixels")
    out = output_sizes(windows, size)[-1]
    if out < 1:
        raise ValueError(f"images of {size} pixels are too small for these layers")
    patch, step = size // grid, math.prod(w.stride for w in windows)
    changes = [
        reached(windows, size, cell * patch, (cell + 1) * patch) for cell in range(grid)
    ]
    window = max(1, *(stop - start for start, stop in changes))
    places = np.array([min(start, out - window) for start, _ in changes])
    needs = [read(windows, size, place, place + window) for place in places]
    first = np.array([start // step * step for start, _ in needs])
    side = max(stop - origin for (_, stop), origin in zip(needs, first, strict=True))
    side = min(size, side + (size - side) % step)  # A crop can end at the border.
    origins = np.minimum(first, size - side)
    tables = (t.astype(np.int32) for t in (origins, places, places - origins // step))
    origins, places, offsets = tables
    return Crops(size, int(side), origins, int(window), places, offsets)


def nested_maps(
    prefix: Callable[[Array], Array],
    crops: Crops,
    carried: Array,
    images: Array,
    cells: Array,
    order: Array,
    value: Array,
    counts: Array,
) -> Array:
    """Maps of consecutive variants of every image.

    Args:
      prefix: the first layers, images [N, s, s, C] -> maps [N, s', s', D] of any side.
      crops: from `plan_crops` for these layers and images.
      carried: maps [B, h, h, D] of the variant before the first one here.
      images: normalised [B, S, S, C].
      cells: int [B, m], the cell that each variant masks beyond the one before.
      order: when each cell is masked, int [B, grid, grid].
      value: what masked pixels become [B].
      counts: masked cells of each variant, int [m].

    Returns:
      [B, m, h, h, D]; the last of them is the next call's `carried`.
    """
    (batch, number), grid = cells.shape, order.shape[1]
    patch, side, window = images.shape[1] // grid, crops.side, crops.window
    turns = order.repeat(patch, 1).repeat(patch, 2)  # Of every pixel.

    def of_cell(table: np.ndarray) -> Array:
        """Rows and columns int [B, m, 2]."""
        return jnp.asarray(table)[jnp.stack(jnp.divmod(cells, grid), -1)]

    def cut(x: Array, corner: Array, side: int) -> Array:
        start = (*corner, *[0] * (x.ndim - 2))
        return lax.dynamic_slice(x, start, (side, side, *x.shape[2:]))

    def crop(image: Array, turns: Array, value: Array, corner: Array, count: Array):
        masked = cut(turns, corner, side) < count
        return jnp.where(masked[..., None], value, cut(image, corner, side))

    def renew(carried: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
        carried = jax.vmap(
            lambda whole, new, corner: lax.dynamic_update_slice(
                whole, new, (*corner, 0)
            )
        )(carried, *given)
        return carried, carried

    of_image = jax.vmap(crop, (None, None, None, 0, 0))
    small = jax.vmap(of_image, (0, 0, 0, 0, None))(
        images, turns, value, of_cell(crops.origins), counts
    )
    small = prefix(small.reshape(batch * number, side, side, -1))
    corners = of_cell(crops.offsets).reshape(batch * number, 2)
    new = jax.vmap(lambda x, corner: cut(x, corner, window))(small, corners)
    new = new.reshape(batch, number, *new.shape[1:]).swapaxes(0, 1)
    places = of_cell(crops.places).swapaxes(0, 1)
    return lax.scan(renew, carried, (new, places))[1].swapaxes(0, 1)
