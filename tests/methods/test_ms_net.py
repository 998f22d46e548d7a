"""MS-Net's step: losses, gradients and the order of its two steps against NumPy.

The network of the first test is small enough for central differences in float64 of the
same losses written again; what stays constant in a step (labels, the site heads'
answers) is constant there too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from configs import demo
from cxai_jax import methods
from cxai_jax.data.augment import Scale
from cxai_jax.methods.method import Network
from cxai_jax.training import loop
from cxai_jax.types import Batch, Outputs
from cxai_jax.writer import read_log

B, SIDE, D, K, RATE = 6, 4, 5, 3, 0.3
SITES = np.array([0, 1, 1, 0, 1, 0])
LABELS = np.array([0, 1, 2, 2, 1, 0])
STARTED, WARMING = 0.0, 0.5  # config.ms_net.warmup of a run of one step and of two.


class Little(nn.Module):
    """features = tanh(mean colour of every quarter W), scaled by site; linear head."""

    def setup(self):
        self.kernel = self.param("kernel", nn.initializers.normal(1.0), (4, D))
        self.scale = self.param("scale", nn.initializers.normal(1.0), (2, D))
        self.top = nn.Dense(K, name="head")

    def __call__(self, x, mode, site):
        half = SIDE // 2
        cells = x[..., 0].reshape(-1, 2, half, 2, half).mean((2, 4)).reshape(-1, 4)
        z = jnp.tanh(cells @ self.kernel) * self.scale[site]
        features = z[:, None, None]
        return self.head(features, mode), Outputs(None, features, None)

    def head(self, features, mode, site=None):
        return self.top(features.mean((1, 2)))


def config_of(warmup, **changes):
    config = demo.get_config("ms_net")
    config.data.image_size = SIDE
    config.augment.update({"crop": "none", "hflip": False, "vflip": False})
    config.ms_net.warmup = warmup
    config.update_from_flattened_dict(changes)
    return config


def forward(params, head, x):
    """(features, logits) of the little network, in NumPy."""
    half = SIDE // 2
    cells = x[..., 0].reshape(-1, 2, half, 2, half).mean((2, 4)).reshape(-1, 4)
    z = np.tanh(cells @ params["kernel"]) * params["scale"][SITES]
    return z, z @ head["kernel"] + head["bias"]


def cross_entropy(logits, labels):
    shifted = logits - logits.max(1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(1))
    return (log_total - shifted[np.arange(B), labels]).mean()


def site_logits(params, heads, x):
    each = [forward(params, {n: v[s] for n, v in heads.items()}, x)[1] for s in (0, 1)]
    return np.where(SITES[:, None] == 0, *each)


def slope(loss, tree):
    """Central differences of loss() in every number of a dict of arrays."""
    found = {}
    for name, array in tree.items():
        found[name] = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            keep, values = array[index], []
            for change in (1e-6, -1e-6):
                array[index] = keep + change
                values.append(loss())
            array[index] = keep
            found[name][index] = (values[0] - values[1]) / 2e-6
    return found


def descended(tree, gradient):
    return {name: value - RATE * gradient[name] for name, value in tree.items()}


@pytest.mark.parametrize("warmup", [STARTED, WARMING])
def test_one_step_against_numpy(warmup, float64):
    random, config = np.random.default_rng(0), config_of(warmup)
    pixels = random.integers(0, 256, (B, SIDE, SIDE, 1), np.uint8)
    model, scale = Little(), Scale((128.0,) * 3, (64.0,) * 3)
    trunk = {"kernel": random.normal(size=(4, D)), "scale": random.normal(size=(2, D))}
    universal = {"kernel": random.normal(size=(D, K)), "bias": random.normal(size=K)}
    heads = {
        "kernel": random.normal(size=(2, D, K)),
        "bias": random.normal(size=(2, K)),
    }
    variables = {"params": {**trunk, "head": universal}, "batch_stats": {}}
    network = Network(model, jax.tree.map(jnp.asarray, variables), scale, {}, 2)
    method = methods.build(config, network, optax.sgd(RATE), total_steps=2)
    state = method.init(jax.random.key(0), network.variables)
    for name, value in state.site_heads.items():  # As many copies of the universal one.
        np.testing.assert_array_equal(value, np.stack([universal[name]] * 2))
    state = state.replace(site_heads=jax.tree.map(jnp.asarray, heads))
    batch = Batch(
        jnp.asarray(pixels),
        jnp.full((B, 2), SIDE, jnp.int32),
        jnp.asarray(LABELS, jnp.int32),
        jnp.asarray(SITES, jnp.int32),
        jnp.ones(B, bool),
    )
    after, metrics = jax.jit(method.step)(state, {"labelled": batch}, jax.random.key(1))

    x = (pixels.astype(np.float32).astype(float) - 128) / 64

    def auxiliary():
        return cross_entropy(site_logits(trunk, heads, x), LABELS)

    expected = auxiliary()
    slopes = slope(auxiliary, trunk), slope(auxiliary, heads)
    trunk, heads = descended(trunk, slopes[0]), descended(heads, slopes[1])
    answers = site_logits(trunk, heads, x).argmax(1)

    def taught():
        logits = forward(trunk, universal, x)[1]
        return 0.5 * cross_entropy(logits, LABELS) + 0.5 * cross_entropy(
            logits, answers
        )

    np.testing.assert_allclose(metrics["auxiliary"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected + taught(), rtol=1e-6)
    if warmup == STARTED:
        slopes = slope(taught, trunk), slope(taught, universal)
        trunk, universal = descended(trunk, slopes[0]), descended(universal, slopes[1])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, after.params, {**trunk, "head": universal})
    jax.tree.map(close, after.site_heads, heads)
    assert int(after.step) == 1
    jax.tree.map(close, method.scored(after)["params"], after.params)


def test_it_trains_and_is_scored_by_its_universal_head(tmp_path):
    config = demo.get_config("ms_net")
    config.data.update({"image_size": 32, "resize": 36, "phantom_images": 80})
    config.train.update({"batch_size": 16, "epochs": 6.0, "log_every_steps": 1})
    config.eval.update({"batch_size": 16, "bootstrap": 20})
    config.tta.k = 0
    config.optim.update({"name": "adam", "lr_fresh": 0.003})
    results = loop.train(config, tmp_path)
    losses = [row["loss"] for row in read_log(tmp_path)]
    assert len(losses) == results["steps"] and losses[-1] < losses[0]
    assert results["config"]["method"] == "ms_net"


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model.norm": "plain"}, "config.model.norm is 'plain'; set it to 'per_site'"),
        ({"mix.name": "snapmix"}, "no use for config.mix.name='snapmix'; set it to 'n"),
        ({"train.accumulate": 2}, "no use for config.train.accumulate=2; set it to 1"),
    ],
)
def test_what_it_does_not_know_is_named(changes, message):
    network = Network(Little(), {"params": {}}, Scale((), ()))
    with pytest.raises(ValueError, match=message):
        methods.build(config_of(0.0, **changes), network, optax.sgd(1.0), total_steps=1)


def test_a_head_with_norms_is_refused():
    variables = {"params": {}, "batch_stats": {"head": {}}}
    network = Network(Little(), variables, Scale((), ()))
    with pytest.raises(ValueError, match="head without norms; set config.model.head"):
        methods.build(config_of(0.0), network, optax.sgd(1.0), total_steps=1)
