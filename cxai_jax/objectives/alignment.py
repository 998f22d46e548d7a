"""Saliency alignment: how far the maps of one image are from pointing at one place.

A documented reconstruction of the idea of Purwita & Qomariyah (ISITIA 2021), a loss
that makes the saliency maps of one image converge to the same region. Their distance,
weight and maps are not public, so this is not the authors' loss. Signed maps are
averaged to a common grid, rectified, made distributions and compared.

Deliberate choices: evidence is rectified at its spatial mean, because agreement of
maps rectified at zero (literal Grad-CAM) is best reached by flat or empty maps; and an
empty map counts as uniform, because leaving it out would be a way to escape the loss.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax.maps.saliency import every_kth
from cxai_jax.types import Array

RECTIFY = ("mean", "zero")


def saliency_alignment(
    maps: Sequence[Array],
    *,
    grid: int,
    rectify: str = "mean",
    distance: str = "js",
    eta: float = 0.05,
    eps: float = 1e-8,
) -> Array:
    """Disagreement of m saliency maps of each image; 0 where they are equal.

    L_i = distance(p_1, ..., p_m) with p from `spatial_distribution`; the default is
    the Jensen-Shannon divergence over log m, in [0, 1]. Differentiable in every map,
    and free of each map's scale and, with rectify="mean", of its offset.

    Args:
      maps: m >= 2 signed maps [B, *, *] of one aspect, sides multiples of `grid`.
      grid: cells per side of the common grid, usually that of the coarsest map.
      rectify: "mean" keeps what exceeds the map's spatial mean; "zero" what exceeds
        0, as Grad-CAM is drawn (an ablation: it collapses).
      distance: key of DISTANCES.
      eta: share of the uniform distribution in every p, in (0, 1).
      eps: added to each map's sum, in units of the map.

    Returns:
      [B], float32 (float64 if given). A map with a value that is not finite counts
      as empty, hence uniform: the loss stays finite and sends it no gradient.

    Raises:
      ValueError: fewer than two maps, wrong rank, batch, aspect or size, or an
        unknown name.
    """
    if len(maps) < 2:
        raise ValueError(
            f"alignment compares at least two maps, got {len(maps)}; "
            "name more maps in config.align.maps"
        )
    _check_together(maps)
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}; known: {sorted(DISTANCES)}")
    p = [
        spatial_distribution(z, grid=grid, rectify=rectify, eta=eta, eps=eps)
        for z in maps
    ]
    return DISTANCES[distance](jnp.stack(p))


def subbatch_alignment(maps: Sequence[Array], **options) -> Array:
    """`saliency_alignment` where some maps cover every k-th image only.

    Images 0, k, 2k, ... are compared by all maps, the others by the maps that cover
    the whole batch (0 if that is a single one). Rows are strided, not the first B/k,
    so that every device of a sharded batch keeps its own images.

    Args:
      maps: m >= 2 signed maps, [B, *, *] or [B/k, *, *] with one k.
      **options: those of `saliency_alignment`.

    Returns:
      Loss per image [B].
    """
    size, covered = max(map(len, maps)), min(map(len, maps))
    if size == covered:
        return saliency_alignment(maps, **options)
    if size % covered or any(len(z) not in (size, covered) for z in maps):
        raise ValueError(
            f"maps cover {[len(z) for z in maps]} images; expected the whole batch or "
            "one equal part of it"
        )
    every = size // covered
    strided = [z if len(z) == covered else every_kth(z, every) for z in maps]
    all_maps = saliency_alignment(strided, **options)
    whole = [z for z in maps if len(z) == size]
    rest = jnp.zeros(size, all_maps.dtype)
    if len(whole) > 1:
        rest = saliency_alignment(whole, **options)
    rest = rest.reshape(covered, every)[:, 1:]
    return jnp.concatenate([all_maps[:, None], rest], axis=1).reshape(size)


def energy_outside(
    maps: Sequence[Array],
    masks: Array,
    *,
    grid: int,
    rectify: str = "mean",
    eta: float = 0.05,
    eps: float = 1e-8,
    dilate: int = 1,
) -> Array:
    """Share of the maps' energy outside the mask: mean_m (1 - sum_u p_m(u) M(u)).

    The "Energy" loss of Rao et al. (ICCV 2023) on eta-smoothed maps, whose floor is
    eta (1 - mean M). It is not part of the chest X-ray paper. An image without a mask
    takes a mask of ones and costs 0.

    Args:
      maps: m >= 1 signed maps [B, *, *] of one aspect, sides multiples of `grid`.
      masks: 0..1 or bool [B, H, W], of the maps' aspect, sides multiples of `grid`.
      grid, rectify, eta, eps: as in `saliency_alignment`.
      dilate: cells by which the pooled mask grows; 0 punishes opacities at its border.

    Returns:
      Loss per image [B].
    """
    if not len(maps):
        raise ValueError("energy_outside needs at least one map, got none")
    _check_together([*maps, masks])
    p = jnp.stack(
        [
            spatial_distribution(z, grid=grid, rectify=rectify, eta=eta, eps=eps)
            for z in maps
        ]
    ).mean(axis=0)
    window = (1, 2 * dilate + 1, 2 * dilate + 1)
    inside = jax.lax.reduce_window(
        block_mean(masks, grid), -jnp.inf, jax.lax.max, window, (1, 1, 1), "SAME"
    )
    return 1 - (p * inside.reshape(p.shape).astype(p.dtype)).sum(axis=1)


def spatial_distribution(
    z: Array,
    *,
    grid: int,
    rectify: str = "mean",
    eta: float = 0.05,
    eps: float = 1e-8,
) -> Array:
    """A signed map as a distribution over the cells of the common grid.

    s = relu(z - mean_u z) or relu(z); q = s / (sum s + eps);
    p = (1 - eta) q + (1 - (1 - eta) sum q) / N. So sum p = 1, p >= eta / N, and an
    empty map gives exactly the uniform one.

    Args:
      z: signed map [B, *, *].
      grid, rectify, eta, eps: as in `saliency_alignment`.

    Returns:
      p [B, grid * grid], float32 (float64 if given).
    """
    if rectify not in RECTIFY:
        raise ValueError(f"unknown rectify {rectify!r}; known: {sorted(RECTIFY)}")
    if not 0 < eta < 1:  # At 0 rounding makes p negative and its logarithm NaN.
        raise ValueError(f"eta must lie strictly between 0 and 1, got {eta}")
    z = block_mean(z, grid).reshape(z.shape[0], -1)
    z = jnp.where(jnp.isfinite(z).all(axis=1, keepdims=True), z, 0)
    s = jax.nn.relu(z - z.mean(axis=1, keepdims=True) if rectify == "mean" else z)
    q = s / (s.sum(axis=1, keepdims=True) + eps)
    rest = 1 - (1 - eta) * q.sum(axis=1, keepdims=True)
    return (1 - eta) * q + rest / q.shape[1]


def block_mean(z: Array, grid: int) -> Array:
    """Averages [B, H, W] over equal blocks to [B, grid, grid], at least float32.

    Linear and mass-preserving, with no interpolation convention to match.
    """
    if z.ndim != 3:
        raise ValueError(f"a map must be [B, H, W], got shape {z.shape}")
    batch, height, width = z.shape
    if not height or not width or height % grid or width % grid:
        raise ValueError(
            f"a map of {height} x {width} has no equal blocks on a grid of {grid}; "
            "choose a grid that divides every map's sides"
        )
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    blocks = z.reshape(batch, grid, height // grid, grid, width // grid)
    return blocks.mean(axis=(2, 4))


def jensen_shannon(p: Array) -> Array:
    """(1/m) sum_m sum_u p_m (log p_m - log mean_m p_m) / log m, in [0, 1]."""
    centre = jnp.log(p.mean(axis=0, keepdims=True))
    return (p * (jnp.log(p) - centre)).sum(axis=-1).mean(axis=0) / math.log(len(p))


def symmetric_kl(p: Array) -> Array:
    """Mean over pairs of sum (a - b)(log a - log b) / 2, in nats."""
    a, b = _pairs(p)
    return ((a - b) * (jnp.log(a) - jnp.log(b))).sum(axis=-1).mean(axis=0) / 2


def cosine(p: Array) -> Array:
    """Mean over pairs of 1 - a.b / (|a| |b|), in [0, 1]."""
    a, b = _pairs(p)
    norms = jnp.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return (1 - (a * b).sum(axis=-1) / norms).mean(axis=0)


def squared_error(p: Array) -> Array:
    """Mean over pairs of sum_u (a - b)^2, a sum over cells."""
    a, b = _pairs(p)
    return ((a - b) ** 2).sum(axis=-1).mean(axis=0)


def total_variation(p: Array) -> Array:
    """Mean over pairs of sum_u |a - b| / 2, in [0, 1]."""
    a, b = _pairs(p)
    return jnp.abs(a - b).sum(axis=-1).mean(axis=0) / 2


def pearson(p: Array) -> Array:
    """Mean over pairs of (1 - r) / 2, in [0, 1]; a constant map has r = 0.

    PEAR (Schwarzschild et al. 2023) without its rank term, on distributions.
    """
    a, b = _pairs(p - p.mean(axis=-1, keepdims=True))
    floor = 1e-12  # Above the rounding of a uniform map, far below any other map.
    norms = (jnp.square(a).sum(axis=-1) + floor) * (jnp.square(b).sum(axis=-1) + floor)
    return (1 - (a * b).sum(axis=-1) / jnp.sqrt(norms)).mean(axis=0) / 2


# Distributions [m, B, N] -> disagreement [B].
DISTANCES: dict[str, Callable[[Array], Array]] = {
    "js": jensen_shannon,
    "symkl": symmetric_kl,
    "cosine": cosine,
    "mse": squared_error,
    "tv": total_variation,
    "pearson": pearson,
}


def normalised_entropy(p: Array) -> Array:
    """-sum p log p / log N of distributions [B, N] -> [B]; 1 is a flat map.

    The collapse alarm: agreement that rises together with entropy is no success.
    """
    return -(p * jnp.log(p)).sum(axis=-1) / math.log(max(p.shape[-1], 2))


def empty_fraction(maps: Array) -> Array:
    """Share of signed maps [B, h, w] without any positive evidence -> scalar.

    Such a map is all zero when drawn as Grad-CAM. NaN is no evidence.
    """
    return 1 - (maps > 0).any(axis=(1, 2)).mean(dtype=jnp.float32)


def ramp(step: Array | int, total: int, share: float) -> Array:
    """Weight of the loss at a step: min(1, step / (share * total)).

    Args:
      step: steps taken, may be traced: the term is never skipped, so that its start
        costs no recompilation.
      total: steps of the run.
      share: share of them over which the weight grows; 0 is no ramp.
    """
    if share * total <= 0:
        return jnp.ones((), jnp.float32)
    return jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / (share * total))


def _pairs(p):
    """[m, B, N] -> both sides of all m (m - 1) / 2 pairs."""
    first, second = np.triu_indices(len(p), 1)
    return p[first], p[second]


def _check_together(maps):
    """Maps and masks of one batch: rank 3, one batch size, one aspect."""
    shapes = [tuple(z.shape) for z in maps]
    if any(len(shape) != 3 for shape in shapes):
        raise ValueError(f"maps and masks must be [B, H, W], got shapes {shapes}")
    batch, height, width = shapes[0]
    if any(shape[0] != batch for shape in shapes):
        raise ValueError(f"maps and masks must cover the same images, got {shapes}")
    if any(h * width != w * height for _, h, w in shapes):
        raise ValueError(
            f"maps and masks must share one aspect, got {shapes}; resize them first"
        )
