"""Interpolation and window-sum matrices against explicit resizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxai_jax.maps.grid import (
    apply_separable,
    interpolation_matrix,
    upsample,
    window_sum_matrix,
)


@pytest.mark.parametrize(
    ("size", "grid"), [(224, 7), (64, 4), (55, 7), (32, 1), (7, 7)]
)
def test_interpolation_matrix_equals_an_explicit_loop(size, grid):
    expected = np.zeros((size, grid))
    for pixel in range(size):
        position = min(max((pixel + 0.5) * grid / size - 0.5, 0.0), grid - 1.0)
        low = int(position)
        high = min(low + 1, grid - 1)
        expected[pixel, low] += 1 - (position - low)
        expected[pixel, high] += position - low
    np.testing.assert_allclose(interpolation_matrix(size, grid), expected, atol=1e-12)


@pytest.mark.parametrize("size", [56, 224, (64, 96)])
def test_upsample_equals_jax_image_resize(size):
    maps = jax.random.normal(jax.random.key(0), (2, 7, 7))
    height, width = (size, size) if isinstance(size, int) else size
    expected = jax.image.resize(maps, (2, height, width), "bilinear")
    np.testing.assert_allclose(upsample(maps, size), expected, atol=2e-6)


def test_window_sums_of_32_pixels_are_the_tridiagonal_matrix():
    t = 0.75 * np.eye(7) + 0.125 * (np.eye(7, k=1) + np.eye(7, k=-1))
    t[0, 0] = t[6, 6] = 0.875
    np.testing.assert_allclose(window_sum_matrix(7, 224, 7), 32 * t, atol=1e-12)


@pytest.mark.parametrize(
    ("windows", "size", "grid"), [(7, 224, 7), (28, 224, 7), (4, 64, 3)]
)
def test_window_sums_equal_sums_of_the_resized_map(windows, size, grid):
    maps = jax.random.normal(jax.random.key(1), (2, grid, grid))
    pixels = np.asarray(jax.image.resize(maps, (2, size, size), "bilinear"))
    side = size // windows
    expected = pixels.reshape(2, windows, side, windows, side).sum((2, 4))
    matrix = window_sum_matrix(windows, size, grid)
    sums = apply_separable(matrix, maps, matrix)
    np.testing.assert_allclose(sums, expected, atol=1e-5 * side**2)


def test_results_are_float32_and_matrices_read_only():
    assert upsample(jnp.ones((1, 2, 2), jnp.bfloat16), 4).dtype == jnp.float32
    with pytest.raises(ValueError, match="read-only"):
        interpolation_matrix(8, 4)[0, 0] = 1


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0 and 7"):
        interpolation_matrix(0, 7)
    with pytest.raises(ValueError, match="5 windows do not divide 224 pixels"):
        window_sum_matrix(5, 224, 7)
