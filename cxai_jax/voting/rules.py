"""Test-time voting: mask the cells that a decision rests on, ask again, and count.

CT paper (Ali et al., Sec. 3.3): the k most relevant 8x8-pixel cells of the predicted
class's map are masked one after the other, cumulatively; each masked image votes, and
if more than half oppose, the label flips. Deviations, by decision number: a strict
majority of k (A13; the published code counts k + 1), the image's minimum as fill
(A14), a rule for more than two classes (A15), ties to the lowest cell (A17).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax.maps.grid import apply_separable, window_sum_matrix
from cxai_jax.types import Array
from cxai_jax.voting.prefix import Crops, nested_maps

FILLS = ("min", "zero", "mean")


class Votes(NamedTuple):
    """The outcome of voting."""

    labels: Array  # int32 [B], after voting
    original: Array  # int32 [B], before: argmax of the unmasked image
    opposing: Array  # int32 [B], votes that did not support the original label


class Masks(NamedTuple):
    """Images and the order in which their cells are masked."""

    images: Array  # normalised [B, H, W, C]
    cells: Array  # int [B, k], best first
    order: Array  # int32 [B, grid, grid], from `mask_order`
    value: Array  # [B], what masked pixels become


class Reuse(NamedTuple):
    """A network in two parts, of which the first runs on crops alone (prefix.py)."""

    prefix: Callable[[Array], Array]  # images [N, s, s, C] -> maps [N, s', s', D]
    suffix: Callable[[Array], Array]  # maps of whole images -> probabilities [N, K]
    crops: Crops


def rank_cells(cam: Array, *, grid: int = 28, k: int = 31, patch: int = 8) -> Array:
    """The k cells with the largest sums of the upsampled map, best first.

    R = P C P^T (method.md 3.6). The outer cells of a half-pixel interpolation are
    equal by construction, so each distinct row of P is computed once: then ties are
    exact on every device and go to the lowest row-major index. A map with NaN has the
    order of a constant one, 0, 1, 2 ...; its probabilities are NaN too, which scoring
    refuses and `predict` reports.

    Args:
      cam: class map of the predicted class [B, h, w].
      grid: cells per side of the image.
      k: cells to return.
      patch: pixels per side of a cell.

    Returns:
      Flat cell index row * grid + column, int32 [B, k].

    Raises:
      ValueError: if k is not in 1..grid^2.
    """
    if not 1 <= k <= grid * grid:
        raise ValueError(
            f"k is {k}, expected 1..{grid * grid} for a {grid}x{grid} grid"
        )
    cam = cam.astype(jnp.float32)
    cam -= cam.min((1, 2), keepdims=True)  # A constant map then ties exactly, at 0.
    cam = jnp.where(jnp.isfinite(cam).all((1, 2), keepdims=True), cam, 0.0)
    (rows, row_of), (columns, column_of) = (
        np.unique(window_sum_matrix(grid, grid * patch, n), axis=0, return_inverse=True)
        for n in cam.shape[1:]
    )
    sums = apply_separable(rows, cam, columns)
    sums = sums[:, row_of.ravel()][:, :, column_of.ravel()]  # NumPy 2.0.0: [n, 1].
    return jax.lax.top_k(sums.reshape(-1, grid * grid), k)[1]


def masked_images(
    images: Array, cells: Array, *, grid: int = 28, fill: str = "min"
) -> Array:
    """All variants of every image; variant j has its j best cells masked.

    Args:
      images: normalised [B, H, W, C]; `grid` divides H and W.
      cells: flat cell index, best first, int [B, k].
      grid: cells per side.
      fill: "min" is the image's own minimum over all pixels and channels, "mean" its
        mean, "zero" is 0, the training mean of a normalised image.

    Returns:
      [B, k+1, H, W, C] in the images' dtype; variant 0 is the original.

    Raises:
      ValueError: for a grid that does not divide the image or an unknown fill.
    """
    rank, value = mask_order(cells, grid), fill_value(images, fill)
    return jax.vmap(lambda count: mask_cells(images, rank, count, value), out_axes=1)(
        jnp.arange(cells.shape[1] + 1)
    )


def plan_masks(images: Array, cells: Array, *, grid: int, fill: str) -> Masks:
    """What `mask_cells` needs; the arguments are those of `masked_images`."""
    return Masks(images, cells, mask_order(cells, grid), fill_value(images, fill))


def mask_order(cells: Array, grid: int) -> Array:
    """When each cell is masked, k if never: int [B, k] -> int32 [B, grid, grid]."""
    batch, k = cells.shape
    never = jnp.full((batch, grid * grid), k, jnp.int32)
    turn = jax.vmap(lambda row, cell: row.at[cell].min(jnp.arange(k)))(never, cells)
    return turn.reshape(batch, grid, grid)


def fill_value(images: Array, fill: str) -> Array:
    """What masked pixels become, one value per image [B]; see `masked_images`."""
    if fill not in FILLS:
        raise ValueError(f"fill is {fill!r}; known: {', '.join(FILLS)}")
    if fill == "zero":
        return jnp.zeros(images.shape[0], images.dtype)
    value = images.min((1, 2, 3)) if fill == "min" else images.mean((1, 2, 3))
    return value.astype(images.dtype)


def mask_cells(images: Array, order: Array, count: Array, value: Array) -> Array:
    """Sets the first `count` cells of each image to its value.

    Args:
      images: [B, H, W, C].
      order: from `mask_order` [B, grid, grid].
      count: int scalar or [B].
      value: [B].

    Returns:
      [B, H, W, C].

    Raises:
      ValueError: if the grid does not divide H and W.
    """
    batch, height, width, channels = images.shape
    grid = order.shape[1]
    if height % grid or width % grid:
        raise ValueError(
            f"a {grid}x{grid} grid does not divide images of {height}x{width} pixels; "
            f"set grid to the image side divided by the cell side"
        )
    masked = order < jnp.broadcast_to(count, (batch,))[:, None, None]
    tiles = (batch, grid, height // grid, grid, width // grid, channels)
    return jnp.where(
        masked[:, :, None, :, None, None],
        value[:, None, None, None, None, None],
        images.reshape(tiles),
    ).reshape(images.shape)


def masked_probs(
    forward: Callable[[Array], Array],
    images: Array,
    cells: Array,
    first: Array,
    *,
    grid: int = 28,
    fill: str = "min",
    chunk: int = 64,
    reuse: tuple[Reuse, Array] | None = None,
) -> Array:
    """Runs all k masked variants, a bounded number of images at a time.

    Traceable, to be called inside jit. Each forward pass takes the same few masks of
    the whole batch, so a batch sharded over devices stays where it is.

    Args:
      forward: images [N, H, W, C] -> probabilities [N, K]; the variants of an image
        follow one another, as many of each.
      images: normalised [B, H, W, C].
      cells: int [B, k], from `rank_cells`.
      first: probabilities of the unmasked images [B, K]; their forward pass has
        already run, as it gave the class map.
      grid: cells per side.
      fill: see `masked_images`.
      chunk: images per forward pass, variants counted; at least one mask of the whole
        batch is run at once, so the bound is max(chunk, B).
      reuse: the same network in two parts and its `prefix` maps of the unmasked images;
        `forward` is not called then. The maps of a whole chunk are held at once.

    Returns:
      p_0 .. p_k, float32 [B, k+1, K].
    """
    batch, k = cells.shape
    masks = plan_masks(images, cells, grid=grid, fill=fill)
    split, carried = reuse or (None, None)
    rounds = -(-k // max(1, chunk // batch))
    per_round = -(-k // rounds)  # Evenly, so that the last round wastes least.
    counts = jnp.minimum(jnp.arange(rounds * per_round) + 1, k)

    def run(carried, counts):
        if split:
            return next_votes(split, masks, carried, counts)
        masked = jax.vmap(
            lambda count: mask_cells(images, masks.order, count, masks.value),
            out_axes=1,
        )(counts)
        probs = forward(masked.reshape(batch * per_round, *images.shape[1:]))
        return carried, probs.astype(jnp.float32).reshape(batch, per_round, -1)

    _, probs = jax.lax.scan(run, carried, counts.reshape(rounds, per_round))
    probs = jnp.moveaxis(probs, 0, 1).reshape(batch, rounds * per_round, -1)[:, :k]
    return jnp.concatenate([first.astype(jnp.float32)[:, None], probs], axis=1)


def next_votes(
    split: Reuse, masks: Masks, carried: Array, counts: Array
) -> tuple[Array, Array]:
    """Runs consecutive variants of every image from the `prefix` map before them.

    Args:
      split: the network.
      masks: of B images.
      carried: maps [B, h, h, D] of the variants with one cell less than counts[0].
      counts: masked cells of each variant, int [m], 1 or more.

    Returns:
      Maps of the last variant [B, h, h, D], probabilities float32 [B, m, K].
    """
    maps = nested_maps(
        split.prefix,
        split.crops,
        carried,
        masks.images,
        masks.cells[:, counts - 1],
        masks.order,
        masks.value,
        counts,
    )
    batch, number = maps.shape[:2]
    probs = split.suffix(maps.reshape(batch * number, *maps.shape[2:]))
    return maps[:, -1], probs.astype(jnp.float32).reshape(batch, number, -1)


def next_votes_of(
    split: Reuse, masks: Masks, carried: Array, rows: Array, counts: Array
) -> tuple[Array, Array]:
    """`next_votes` of the chosen images, int [N], of a batch; see `vote_early`."""
    own = jax.tree.map(lambda x: x[rows], masks)
    last, probs = next_votes(split, own, carried[rows], counts)
    return carried.at[rows].set(last), probs


def opposes(probs: Array, original: Array, *, theta: float) -> Array:
    """Which votes do not support the original label.

    Two classes, p the probability of class 1 (Ali et al., Sec. 3.3): against label 1
    if p < theta, against label 0 if p >= 1 - theta. More classes (A15): if any other
    class has a probability of at least 1 - theta.

    Args:
      probs: votes [B, k, K].
      original: int [B].
      theta: support threshold.

    Returns:
      bool [B, k].
    """
    xp = probs.__array_namespace__()  # NumPy's on the host, which compiles nothing.
    probs, original = xp.asarray(probs, dtype=xp.float32), original[:, None]
    if probs.shape[-1] == 2:
        positive = probs[..., 1]
        return xp.where(original == 1, positive < theta, positive >= 1 - theta)
    own = xp.arange(probs.shape[-1]) == original[..., None]
    return xp.where(own, -xp.inf, probs).max(-1) >= 1 - theta


def votes_for(probs: Array, *, theta: float = 0.2, k: int = 31) -> Votes:
    """Counts the first k votes; the variants are nested, so any smaller k is exact.

    The label flips if strictly more than k/2 votes oppose: to the other class, or of
    more than two to the largest mean probability over the opposing votes, never back to
    the original class (A15).

    Args:
      probs: p_0 .. p_m of the nested variants [B, m+1, K], m >= k.
      theta: support threshold, in 0..1.
      k: votes counted.

    Returns:
      Votes. The published code's rule is `2 * opposing > k + 1`.

    Raises:
      ValueError: for fewer than k+1 variants or 2 classes, or theta outside 0..1.
    """
    probs = jnp.asarray(probs, jnp.float32)
    if probs.ndim != 3 or probs.shape[2] < 2 or not 1 <= k < probs.shape[1]:
        raise ValueError(
            f"probs has shape {probs.shape}, expected [B, variants, K] with K >= 2 and "
            f"at least k + 1 = {k + 1} variants, the original first, k >= 1"
        )
    if not 0 <= theta <= 1:
        raise ValueError(f"theta is {theta}, expected 0..1")
    original = probs[:, 0].argmax(-1).astype(jnp.int32)
    votes = probs[:, 1 : k + 1]
    return count_votes(votes, original, opposes(votes, original, theta=theta))


def vote(probs: Array, *, theta: float = 0.2, k: int = 31) -> Array:
    """Labels after voting, int32 [B]; see `votes_for`."""
    return votes_for(probs, theta=theta, k=k).labels


def count_votes(votes: Array, original: Array, opposing: Array) -> Votes:
    """The flip rule: votes [B, k, K], labels int [B], opposing bool [B, k]."""
    xp = votes.__array_namespace__()
    count = opposing.sum(1, dtype=xp.int32)
    if votes.shape[2] == 2:
        other = 1 - original
    else:  # The sum has the argmax of the mean.
        against = xp.where(opposing[..., None], votes, 0.0).sum(1)
        own = xp.arange(votes.shape[2]) == original[:, None]
        other = xp.where(own, -1.0, against).argmax(-1).astype(xp.int32)
    flips = 2 * count > votes.shape[1]
    return Votes(xp.where(flips, other, original), original, count)
