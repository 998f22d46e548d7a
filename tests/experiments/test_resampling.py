import numpy as np
import pytest

from cxai_jax.data import transforms
from experiments import resampling


def test_an_image_is_stored_once_and_its_second_resizing_is_measured():
    random = np.random.default_rng(0)
    large, fits = (random.integers(0, 256, (n, n, 1), np.uint8) for n in (500, 256))
    np.testing.assert_array_equal(transforms.as_stored(fits), fits)
    once = transforms.as_stored(large)
    np.testing.assert_array_equal(transforms.as_stored(once), once)

    def features(images):
        return images.reshape(len(images), -1)

    same = resampling.measure([fits, once], 224, features)
    assert same["gray_levels"] == {"mean": 0, "largest": 0}
    found = resampling.measure([large, fits], 224, features)
    straight, twice = (transforms.squash(g, 224).astype(int) for g in (large, once))
    assert found["gray_levels"]["largest"] == np.abs(straight - twice).max() > 0
    apart = np.linalg.norm(straight - transforms.squash(fits, 224).astype(int))
    expected = np.linalg.norm(straight - twice) / apart
    moved = found["feature_distance_over_median_between_images"]
    assert moved["largest"] == pytest.approx(expected)
    assert moved["mean"] == pytest.approx(expected / 2)
