"""Generators and discriminators: shapes, published sizes, norms, what they ignore."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cxai_jax.models import discriminators, generators

X = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1, maxval=1)


def count(module, *args):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"]))


def test_cyclegan_networks_have_the_published_size():
    """CycleGAN prints 11.378 M and 2.765 M parameters for its defaults.

    They include no norm parameters, and for the biases before a norm neither do we
    leave any out.
    """
    image = jnp.zeros((1, 64, 64, 3))
    assert count(generators.ResNetGenerator(), image) == 11_378_179
    assert count(discriminators.PatchDiscriminator(), image) == 2_764_737


def test_translation_keeps_shape_and_range():
    network = generators.ResNetGenerator(width=4, blocks=1)
    out, _ = jax.jit(lambda key: network.init_with_output(key, X))(jax.random.key(1))
    assert out.shape == X.shape
    assert np.abs(out).max() <= 1


def test_instance_norm_is_that_of_each_image_and_channel():
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 4, 3))
    mean, var = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
    got = discriminators.instance_norm(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, (x - mean) / np.sqrt(var + 1e-5), atol=2e-5)


@pytest.mark.parametrize("rho", [-1.0, 0.25, 1.0])
def test_batch_instance_norm_blends_two_norms(rho):
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 4, 3))
    batch = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    each = x - x.mean((1, 2), keepdims=True)
    each /= np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
    share = min(max(rho, 0), 1)
    params = {"rho": jnp.full(3, rho), "scale": jnp.full(3, 2.0), "bias": jnp.ones(3)}
    got = generators.BatchInstanceNorm().apply(
        {"params": params}, jnp.asarray(x, jnp.float32)
    )
    expected = 2 * (share * batch + (1 - share) * each) + 1
    np.testing.assert_allclose(got, expected, atol=5e-5)


def test_shuffled_patches_see_colours_and_not_their_places():
    """Any image of the same single patch, however arranged, has the same logits."""
    network = discriminators.ShuffledPatchDiscriminator(patch=4, width=8)
    x = X[:, :4, :4]
    order = jax.random.permutation(jax.random.key(1), 16)
    moved = x.reshape(2, 16, 3)[:, order].reshape(x.shape)
    variables = network.init(jax.random.key(2), x, jax.random.key(3))

    def mean_logits(x):
        keys = jax.random.split(jax.random.key(4), 512)
        logits = jax.vmap(lambda key: network.apply(variables, x, key))(keys)
        return logits.mean(0)

    a, b = jax.jit(mean_logits)(x), jax.jit(mean_logits)(moved)
    np.testing.assert_allclose(a, b, atol=0.1)
    assert a.shape == (2, 4)


def test_spectral_norm_holds_the_largest_singular_value_at_one():
    network = discriminators.SpectralDiscriminator(width=4, between=False)
    variables = jax.jit(lambda key: network.init(key, X, False))(jax.random.key(0))
    step = jax.jit(
        lambda v: network.apply(v, X, True, mutable=["batch_stats"])[1]["batch_stats"]
    )
    for _ in range(60):
        variables = {**variables, "batch_stats": step(variables)}
    params = flatten_dict(variables["params"], sep="/")
    sigmas = flatten_dict(variables["batch_stats"], sep="/")
    kernel = np.asarray(params["Conv_1/kernel"], np.float64)
    largest = np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2)
    (found,) = [v for k, v in sigmas.items() if "Conv_1/kernel/sigma" in k]
    np.testing.assert_allclose(found, largest, rtol=1e-3)


def test_dranet_parts_fit_together():
    pairs = ("a->b", "b->a")

    def translate(key):
        encoder, generator = generators.Encoder(8), generators.Generator(8)
        separator = generators.Separator(pairs)
        keys = jax.random.split(key, 3)
        features, _ = encoder.init_with_output(keys[0], X)
        parts, _ = separator.init_with_output(keys[1], features, False)
        image, _ = generator.init_with_output(keys[2], features, False)
        return features, parts, image

    features, (content, style, scales), image = jax.jit(translate)(jax.random.key(0))
    assert features.shape == (2, 8, 8, 16) and image.shape == X.shape
    np.testing.assert_allclose(content + style, features, atol=1e-5)
    assert set(scales) == set(pairs)
    assert all(np.all(scale == 1) for scale in scales.values())


def test_domain_classifier_widths_of_adda():
    module = discriminators.DomainClassifier((500, 500))
    assert count(module, jnp.zeros((1, 10))) == 11 * 500 + 501 * 500 + 501 * 2
