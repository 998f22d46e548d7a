"""Rotation and intensity on the device against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax.data import augment

KEY = jax.random.key(3)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 9, 12, 2)).astype(np.uint8)


def turned(image, angle):
    """Bilinear, black outside, float64."""
    height, width = image.shape[:2]
    padded = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)))
    found = np.zeros(image.shape)
    for r in range(height):
        for c in range(width):
            y, x = r - (height - 1) / 2, c - (width - 1) / 2
            at_y = np.cos(angle) * y - np.sin(angle) * x + (height - 1) / 2
            at_x = np.sin(angle) * y + np.cos(angle) * x + (width - 1) / 2
            top, left = int(np.floor(at_y)), int(np.floor(at_x))
            for i in (top, top + 1):
                for j in (left, left + 1):
                    if -1 <= i <= height and -1 <= j <= width:
                        share = (1 - abs(at_y - i)) * (1 - abs(at_x - j))
                        found[r, c] += share * padded[i + 1, j + 1]
    return found


def test_rotation_is_that_of_the_formula():
    limit = np.radians(40)
    angles = np.asarray(jax.random.uniform(KEY, (3,), minval=-limit, maxval=limit))
    got = augment.random_rotation(KEY, jnp.asarray(IMAGES), 40.0)
    assert got.dtype == jnp.uint8
    for image, angle, found in zip(IMAGES, angles, got, strict=True):
        wanted = turned(image, float(angle))
        assert np.abs(np.asarray(found, float) - wanted).max() < 0.51


def test_intensity_is_that_of_the_formula():
    draws = np.asarray(
        jax.random.uniform(KEY, (3, 3, 1, 1, 1), minval=-0.3, maxval=0.3), np.float64
    )
    x = IMAGES / 255.0
    mean = x.mean((1, 2, 3), keepdims=True)
    y = mean + np.exp(draws[1]) * (x ** np.exp(draws[0]) - mean) + draws[2] / 2
    got = augment.random_intensity(KEY, jnp.asarray(IMAGES), 0.3)
    assert got.dtype == jnp.uint8
    assert np.abs(np.asarray(got, float) - 255 * np.clip(y, 0, 1)).max() < 0.51


def test_masks_turn_along_and_keep_their_intensity():
    twice = np.repeat(IMAGES[..., :1], 2, axis=-1)  # The mask is the image.
    options = {"size": 9, "crop": "none", "hflip": True, "vflip": False}
    square, sizes = jnp.asarray(twice[:, :, :9]), jnp.full((3, 2), 9)

    def both(**more):
        return np.asarray(
            augment.augment(KEY, square, sizes, **options, **more, channels=1)
        )

    turned_both = both(rotate=30.0)
    np.testing.assert_array_equal(turned_both[..., 0], turned_both[..., 1])
    assert (turned_both != both()).any()
    jittered = both(rotate=30.0, intensity=0.3)
    np.testing.assert_array_equal(jittered[..., 1], turned_both[..., 1])
    assert (jittered[..., 0] != turned_both[..., 0]).any()
