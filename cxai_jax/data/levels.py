"""Numbers of any kind to 8 bits, some rows at a time, and how many are opened at all.

A float64 copy of a large image would take eight times its memory, so every function
takes `values`, rows -> numbers, and works in strips.
"""

from collections.abc import Callable

import numpy as np

from cxai_jax.data import reading

STRIP = 1 << 20  # Pixels that are computed with at a time.


def check_pixels(width: int, height: int, count: int = 1) -> None:
    """Raises ValueError for more pixels than are opened, by the declared size."""
    total = width * height * count
    if total > reading.MAX_PIXELS or max(width, height) > reading.MAX_SIDE:
        raise ValueError(
            f"{width} x {height} pixels{f' x {count}' if count > 1 else ''}, at most "
            f"{reading.MAX_PIXELS // 10**6} megapixels and {reading.MAX_SIDE} a side "
            "are opened; scale it down"
        )


def strips(height: int, width: int) -> list[slice]:
    """Rows of an image, some at a time."""
    rows = max(1, STRIP // max(width, 1))
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def to_uint8(
    values: Callable[[slice], np.ndarray], rows: list[slice], shape: tuple[int, int]
) -> np.ndarray:
    """Numbers of any kind to the full scale of 8 bits, see `transforms.open_gray`."""
    low, high = extent(values, rows)
    if values(rows[0]).dtype.kind in "iu" and low >= 0:
        full = next((b for b in (8, 12, 16) if high < 2**b), 32)
        low, high = 0, 2**full - 1
    return stretched(values, rows, shape, low, high)


def extent(values, rows: list[slice]) -> tuple[float, float]:
    """Smallest and largest of the values, which must be finite."""
    low, high, bad = np.inf, -np.inf, 0
    for part in rows:
        piece = values(part)
        bad += piece.size - np.count_nonzero(np.isfinite(piece))
        low, high = min(low, piece.min()), max(high, piece.max())
    if bad:
        raise ValueError(f"{bad} pixels are not finite (NaN or infinite)")
    if not np.isfinite(float(high) - float(low)):
        raise ValueError(f"its pixels reach from {low:g} to {high:g}: too far apart")
    return low, high


def stretched(values, rows, shape, low: float, high: float) -> np.ndarray:
    """[low, high] -> [0, 255], clipped, strip by strip; a constant image is black."""
    pixels = np.empty(shape, np.uint8)
    for part in rows:
        scaled = (values(part).astype(np.float64) - low) / max(high - low, 1e-12)
        pixels[part] = np.round(255 * np.clip(scaled, 0, 1))
    return pixels
