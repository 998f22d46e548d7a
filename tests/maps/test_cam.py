"""Class activation maps against float64 loops and their invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxai_jax.maps import cam


def naive_percent_map(maps, size):
    """Per-pixel float64 bilinear interpolation, min-shift, normalise."""
    batch, height, width = maps.shape
    out = np.zeros((batch, *size))
    for b in range(batch):
        for i in range(size[0]):
            y = min(max((i + 0.5) * height / size[0] - 0.5, 0), height - 1)
            y0 = int(y)
            y1 = min(y0 + 1, height - 1)
            for j in range(size[1]):
                x = min(max((j + 0.5) * width / size[1] - 0.5, 0), width - 1)
                x0 = int(x)
                x1 = min(x0 + 1, width - 1)
                top = maps[b, y0, x0] * (1 - x + x0) + maps[b, y0, x1] * (x - x0)
                low = maps[b, y1, x0] * (1 - x + x0) + maps[b, y1, x1] * (x - x0)
                out[b, i, j] = top * (1 - y + y0) + low * (y - y0)
        out[b] -= out[b].min()
        out[b] /= out[b].sum()
    return out


percent_map = jax.jit(cam.semantic_percent_map, static_argnums=1)


@pytest.fixture
def maps():
    return np.random.default_rng(0).normal(size=(3, 4, 4))


def test_class_activation_map_equals_a_float64_loop():
    random = np.random.default_rng(1)
    features, kernel = random.normal(size=(2, 3, 4, 5)), random.normal(size=(5, 3))
    labels = np.array([2, 0])
    expected = np.zeros((2, 3, 4))
    for b in range(2):
        for d in range(5):
            expected[b] += features[b, :, :, d] * kernel[d, labels[b]]
    got = cam.class_activation_map(jnp.asarray(features), jnp.asarray(kernel), labels)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_bfloat16_features_are_accumulated_in_float32():
    features = jnp.ones((1, 1, 1, 2048), jnp.bfloat16)
    got = cam.class_activation_map(
        features, jnp.ones((2048, 2), jnp.bfloat16), np.array([1])
    )
    assert got.dtype == jnp.float32
    assert got[0, 0, 0] == 2048


def test_swapped_kernel_is_refused():
    with pytest.raises(ValueError, match=r"give it as \[D, K\]"):
        cam.class_activation_map(
            jnp.ones((1, 2, 2, 8)), jnp.ones((2, 8)), np.array([0])
        )


def test_a_label_that_does_not_exist_is_not_silently_clamped():
    got = cam.class_activation_map(
        jnp.ones((1, 2, 2, 8)), jnp.ones((8, 2)), np.array([2])
    )
    assert np.isnan(got).all()


def test_centred_map_ignores_what_all_classes_share(maps):
    class_maps = jnp.asarray(np.stack([maps, 2 * maps, maps - 1], -1), jnp.float32)
    labels = jnp.array([0, 1, 2])
    expected = np.stack([maps[0], 2 * maps[1], maps[2] - 1])
    np.testing.assert_allclose(cam.of_class(class_maps, labels), expected, atol=1e-6)
    expected = expected - (4 * maps - 1) / 3
    centred = cam.centred_map(class_maps, labels)
    np.testing.assert_allclose(centred, expected, atol=1e-6)
    shared = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))
    shifted = cam.centred_map(class_maps + shared, labels)
    np.testing.assert_allclose(shifted, centred, atol=1e-6)


@pytest.mark.parametrize("size", [(20, 20), (24, 16)])
def test_percent_map_equals_a_float64_loop(maps, size):
    got = percent_map(jnp.asarray(maps, jnp.float32), size)
    np.testing.assert_allclose(got, naive_percent_map(maps, size), atol=1e-8)


def test_percent_map_sums_to_one_and_ignores_bias_and_scale(maps):
    maps = jnp.asarray(maps, jnp.float32)
    percent = percent_map(maps, 32)
    assert (percent >= 0).all()
    np.testing.assert_allclose(percent.sum((1, 2)), 1, atol=1e-5)
    for other in (maps + 5, 1e-20 * maps, 1e20 * maps):
        again = percent_map(other, 32)
        np.testing.assert_allclose(again, percent, atol=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.3, -1e6])
def test_constant_map_becomes_uniform_even_with_rounding_noise(value):
    constant = jnp.full((2, 7, 7), value).at[1, 3, 3].multiply(1 + 2e-7)
    percent = percent_map(constant, 28)
    np.testing.assert_allclose(percent, 1 / 28**2, rtol=1e-6)
    assert cam.is_flat(constant).all()
    assert not cam.is_flat(constant.at[:, 0, 0].add(1.0 + 1e-3 * abs(value))).any()


def test_patch_relevance_is_the_window_sum_of_the_resized_map(maps):
    pixels = jax.image.resize(jnp.asarray(maps, jnp.float32), (3, 64, 64), "bilinear")
    expected = np.asarray(pixels).reshape(3, 4, 16, 4, 16).sum((2, 4))
    got = cam.patch_relevance(jnp.asarray(maps, jnp.float32), stride=16)
    np.testing.assert_allclose(got, expected, atol=1e-3)
