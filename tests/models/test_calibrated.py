"""A calibrator in front of a backbone: what it adds, and that the contract holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from cxai_jax import models
from cxai_jax.models.generators import ResNetGenerator


@pytest.fixture(scope="module")
def calibrated():
    """(model, variables, normalised images)."""
    config = common.get_config().model
    config.update({"name": "tiny", "calibrator": 2})
    model = models.build(config, 3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), jnp.float32)
    variables = jax.jit(lambda key: model.init(key, x, "eval"))(jax.random.key(0))
    return model, variables, x


def test_what_is_added_is_a_clipped_share_of_what_the_generator_says(calibrated):
    model, variables, _ = calibrated
    pictures = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3), minval=-1)
    said = ResNetGenerator(2).apply(
        {"params": variables["params"]["calibrator"]}, pictures
    )
    added = np.clip((np.asarray(said, np.float64) + 1) / 2, 0, 0.4)
    assert (added == 0.4).any() and (added < 0.4).any()
    expected = np.clip(pictures + added, -1, 1)
    got = model.apply(variables, pictures, method="calibrate")
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_backbone_sees_the_calibrated_image_and_the_laws_hold(calibrated):
    model, variables, x = calibrated
    network = {name: tree["network"] for name, tree in variables.items()}
    mean, std = (np.asarray(n) for n in models.normalisation("tiny"))
    pictures = model.apply(variables, (x * std + mean) / 127.5 - 1, method="calibrate")
    seen = ((pictures + 1) * 127.5 - mean) / std
    expected, _ = model.network.apply(network, seen, "eval")
    logits, out = model.apply(variables, x, "eval")
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    lower = model.apply(variables, x, "eval", method="lower")
    features = model.apply(variables, lower, "eval", method="upper")
    np.testing.assert_allclose(features, out.features, rtol=1e-5, atol=1e-5)
    staged = model.apply(variables, features, "eval", method="head")
    np.testing.assert_allclose(staged, logits, rtol=1e-5, atol=1e-5)
    assert model.prefix_windows() == ()
