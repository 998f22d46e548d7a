"""Class activation maps: what SnapMix, CPE and the test-time masks are steered by.

Ali et al. (CT paper), after Zhou et al. 2016 and SnapMix (Huang et al. 2021). The bias
is left out of the map: it shifts every cell alike, and all users here are blind to
that.
"""

import jax.numpy as jnp
from jax.lax import Precision

from cxai_jax.maps.grid import (
    apply_separable,
    height_and_width,
    upsample,
    window_sum_matrix,
)
from cxai_jax.types import Array

# Spread of a map, relative to its largest magnitude, below which it is only float32
# rounding noise (8 units in the last place).
FLAT = 1e-6


def check_labels(labels: Array) -> None:
    """Raises ValueError unless these are class numbers, int [B]."""
    if jnp.ndim(labels) != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}, expected one integer "
            "class number per image, [B]; of one-hot labels give labels.argmax(-1)"
        )


def class_activation_map(features: Array, kernel: Array, labels: Array) -> Array:
    """C_i[r, c] = sum_d F_i[r, c, d] W[d, y_i], in float32.

    Args:
      features: input of the global average pool [B, h, w, D].
      kernel: weights of the linear head [D, K].
      labels: class whose evidence is mapped, int [B]; an index outside 0..K-1 gives
        NaN.

    Returns:
      Map [B, h, w], float32.

    Raises:
      ValueError: if features and kernel disagree on D, or the labels are no class
        numbers, such as one-hot ones.
    """
    check_labels(labels)
    if features.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"features {features.shape} end in D = {features.shape[-1]} but the kernel "
            f"{kernel.shape} begins with {kernel.shape[0]}; give it as [D, K]"
        )
    weights = jnp.take(kernel.astype(jnp.float32), labels, axis=1)
    return jnp.einsum(
        "bhwd,db->bhw",
        features.astype(jnp.float32),
        weights,
        precision=Precision.HIGHEST,
    )


def of_class(class_maps: Array, labels: Array) -> Array:
    """Picks each image's map, [B, h, w, K] and int [B] -> float32 [B, h, w]."""
    picked = jnp.take_along_axis(class_maps, labels[:, None, None, None], axis=3)
    return picked[..., 0].astype(jnp.float32)


def centred_map(class_maps: Array, labels: Array) -> Array:
    """Evidence for a class against the mean class, C_y - mean_k C_k.

    Adding one vector to every column of the head changes no probability but every raw
    map; the centred one stays (alignment.md 2, failure 4).

    Args:
      class_maps: maps of all classes [B, h, w, K].
      labels: int [B].

    Returns:
      Signed map [B, h, w], float32.
    """
    class_maps = class_maps.astype(jnp.float32)
    return of_class(class_maps, labels) - class_maps.mean(-1)


def is_flat(cam: Array) -> Array:
    """Whether a map [B, h, w] is constant up to float32 rounding: bool [B]."""
    low, high = cam.min((1, 2)), cam.max((1, 2))
    return high - low <= FLAT * jnp.maximum(jnp.abs(low), jnp.abs(high))


def semantic_percent_map(cam: Array, size: int | tuple[int, int]) -> Array:
    """S = (U - min U) / sum(U - min U), with U the upsampled map (Huang et al. 2021).

    Deviation: the published code divides 0 by 0 for a constant map; here it becomes
    the uniform map.

    Args:
      cam: class activation map [B, h, w].
      size: pixels, H = W or (H, W).

    Returns:
      Map [B, H, W], float32, non-negative, sums to 1 per image.
    """
    cam = cam.astype(jnp.float32)
    low, high = (f(cam, (1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    flat = is_flat(cam)[:, None, None]
    # Scaled to 0..1 before any sum, so that no map is too faint or too large to divide.
    upsampled = upsample((cam - low) / jnp.where(flat, 1.0, high - low), size)
    mass = upsampled - upsampled.min((1, 2), keepdims=True)
    total = jnp.where(flat, 1.0, mass.sum((1, 2), keepdims=True))
    height, width = height_and_width(size)
    return jnp.where(flat, 1.0 / (height * width), mass / total)


def patch_relevance(cam: Array, *, stride: int = 32) -> Array:
    """R = s^2 T C T^T: mass of the upsampled map over each cell's own s x s pixels.

    What CPE ranks cells by (Ali et al., Sec. 3.2). The min-shift of the semantic
    percent map and its scale do not change the order, so the raw map is used.

    Args:
      cam: class activation map [B, h, w].
      stride: s, pixels per cell.

    Returns:
      Relevance [B, h, w], float32.
    """
    rows, columns = (window_sum_matrix(n, n * stride, n) for n in cam.shape[1:])
    return apply_separable(rows, cam, columns)
