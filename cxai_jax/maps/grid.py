"""Matrices between the coarse grid of a class map and image pixels.

The method upsamples a 7x7 map to 224x224 and sums it over windows. Both are linear and
separable, so M C M^T and T C T^T with small constant matrices give the same numbers
without gathers, and the window sums never touch a pixel.
"""

from functools import cache

import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

from cxai_jax.types import Array


@cache
def interpolation_matrix(size: int, grid: int) -> np.ndarray:
    """Bilinear interpolation from `grid` cells to `size` pixels: U = M C M^T.

    Half-pixel centres, edges clamped, no antialiasing when `size` is smaller
    (torch's align_corners=False; `jax.image.resize` agrees for size >= grid).

    Args:
      size: pixels along one axis.
      grid: cells along one axis.

    Returns:
      M, read-only float64 [size, grid]; every row sums to 1.

    Raises:
      ValueError: if either is below 1.
    """
    if size < 1 or grid < 1:
        raise ValueError(f"size and grid must be at least 1, got {size} and {grid}")
    position = np.clip((np.arange(size) + 0.5) * grid / size - 0.5, 0, grid - 1)
    matrix = np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(grid)))
    matrix.flags.writeable = False  # It is cached: one writer would harm all readers.
    return matrix


@cache
def window_sum_matrix(windows: int, size: int, grid: int) -> np.ndarray:
    """Sums of the interpolated map over equal windows of pixels: R = P C P^T.

    With 7 windows of 224 pixels on a 7-cell grid this is 32 T, T = tridiagonal
    [1/8, 3/4, 1/8] with 7/8 in the corners; with 28 windows it ranks the cells of the
    test-time masks.

    Args:
      windows: windows along one axis.
      size: pixels along one axis, a multiple of `windows`.
      grid: cells of the map along one axis.

    Returns:
      P, read-only float64 [windows, grid].

    Raises:
      ValueError: if `windows` does not divide `size`.
    """
    if windows < 1 or size % windows:
        raise ValueError(f"{windows} windows do not divide {size} pixels evenly")
    matrix = interpolation_matrix(size, grid)
    matrix = matrix.reshape(windows, size // windows, grid).sum(1)
    matrix.flags.writeable = False
    return matrix


def apply_separable(rows: np.ndarray, maps: Array, columns: np.ndarray) -> Array:
    """rows C columns^T for every map: [I, h], [B, h, w], [J, w] -> float32 [B, I, J].

    Full float32 products: accelerators would otherwise round to bfloat16 or TF32.
    """
    return jnp.einsum(
        "ih,bhw,jw->bij",
        jnp.asarray(rows, jnp.float32),
        maps.astype(jnp.float32),
        jnp.asarray(columns, jnp.float32),
        precision=Precision.HIGHEST,
    )


def upsample(maps: Array, size: int | tuple[int, int]) -> Array:
    """Bilinear upsampling [B, h, w] -> float32 [B, H, W]; `size` is H = W or (H, W)."""
    height, width = height_and_width(size)
    rows = interpolation_matrix(height, maps.shape[1])
    return apply_separable(rows, maps, interpolation_matrix(width, maps.shape[2]))


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a size given as one side or as both."""
    return (size, size) if isinstance(size, int) else tuple(size)
