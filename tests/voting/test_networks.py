"""Class maps and voting on every backbone; the large ones as `slow`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import get_config
from cxai_jax import models
from cxai_jax.data.augment import Scale, normalise
from cxai_jax.maps import cam, saliency
from cxai_jax.voting import forward, rules

K, PATCH, SIZE = 2, 16, 64
NAMES = [
    name if name == "tiny" else pytest.param(name, marks=pytest.mark.slow)
    for name in models.MODELS
]


@pytest.mark.parametrize("name", NAMES)
def test_class_maps_and_votes(name):
    config = get_config()
    config.model.name = name
    config.tta.update({"k": K, "patch": PATCH})
    model, scale = models.build(config.model, 3), Scale(*models.normalisation(name))
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.integers(0, 256, (2, SIZE, SIZE, 3), np.uint8))

    @jax.jit
    def run(key):
        x = normalise(pixels, scale.mean, scale.std)
        variables = model.init(key, x, "eval")
        # Untrained, a deep network is certain of itself: logits of at most 3.
        largest = jnp.abs(model.apply(variables, x, "eval")[0]).max()
        variables["params"]["head"] = jax.tree.map(
            lambda w: 3 * w / largest, variables["params"]["head"]
        )
        logits, out = model.apply(variables, x, "eval")
        labels = logits.argmax(-1)
        apply = functools.partial(model.apply, variables)
        kernel = models.head_kernel(variables["params"])
        cams = cam.class_activation_map(out.features, kernel, labels)
        gradcam = saliency.gradcam_lower(
            lambda lower: apply(
                apply(lower, "eval", method="upper"), "eval", method="head"
            ),
            out.lower,
            labels,
        )
        cells = rules.rank_cells(cams, grid=SIZE // PATCH, k=K, patch=PATCH)
        masked = rules.masked_images(x, cells, grid=SIZE // PATCH, fill=config.tta.fill)
        each = apply(masked.reshape(-1, SIZE, SIZE, 3), "eval")[0]
        voted = forward.make_predict_step(model, scale, config.tta)(variables, pixels)
        of_label = cam.of_class(voted["class_maps"], labels)
        return cams, of_label, gradcam, jax.nn.softmax(each), voted["probs"]

    cams, of_label, gradcam, each, probs = run(jax.random.key(0))
    np.testing.assert_allclose(cams, of_label, rtol=1e-3, atol=1e-3)
    assert gradcam.shape[1] == 2 * cams.shape[1]
    assert np.isfinite(gradcam).all() and np.abs(gradcam).max() > 0
    assert probs.shape == (2, K + 1, 3)
    np.testing.assert_allclose(each.reshape(probs.shape), probs, rtol=1e-3, atol=1e-4)
    assert np.ptp(probs, axis=1).max() > 0  # The masks are seen.
    assert rules.vote(probs, k=K).shape == (2,)
