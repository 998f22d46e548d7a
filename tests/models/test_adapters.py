"""Adapters against NumPy in float64, their start, and where a ResNet has them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import common, rows
from cxai_jax import models
from cxai_jax.models.adapters import ADAPTERS
from cxai_jax.models.norm import NORMS, ConvNorm
from cxai_jax.training.optimizer import learning_rate_groups

SITE = np.array([0, 1, 1, 0], np.int32)
FEATURES, STRIDE, EPS = 4, 2, 1e-5


def adapted(adapter, **fields):
    return ConvNorm(
        FEATURES,
        3,
        STRIDE,
        padding=1,
        norm=NORMS["per_site"](2),
        adapter=ADAPTERS[adapter](2),
        **fields,
    )


def convolved(x, kernel):
    """3x3 convolution of stride 2 with a border of zeros, by its definition."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    size = (x.shape[1] - 1) // STRIDE + 1
    y = np.zeros((len(x), size, size, kernel.shape[-1]))
    for i in range(size):
        for j in range(size):
            window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            y[:, i, j] = np.einsum("buvc,uvcd->bd", window, kernel)
    return y


def normalised(x, norm, stats, mode):
    """Batch norm of each site's rows."""
    y = np.empty_like(x)
    for site in (0, 1):
        rows = x[SITE == site]
        mean, var = rows.mean((0, 1, 2)), rows.var((0, 1, 2))
        if mode == "eval":
            mean, var = stats["mean"][site], stats["var"][site]
        unit = (rows - mean) / np.sqrt(var + EPS)
        y[SITE == site] = unit * norm["scale"][site] + norm["bias"][site]
    return y


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("adapter", ["series", "parallel"])
def test_an_adapted_convolution_against_numpy(adapter, mode, float64):
    random = np.random.default_rng(0)
    x = random.normal(size=(4, 5, 5, 3))
    module = adapted(adapter, dtype=jnp.float64)
    start = module.init(jax.random.key(0), x, "eval", SITE)
    given = jax.tree.map(lambda v: random.uniform(0.5, 1.5, v.shape), start)
    params, stats = given["params"], given["batch_stats"]
    conv = params["adapter"]["conv"]["kernel"]
    u = convolved(x, params["kernel"])
    source = x[:, ::STRIDE, ::STRIDE]
    if adapter == "series":
        own = stats["adapter"]["norm"]
        source = normalised(u, params["adapter"]["norm"], own, mode)
    u = u + np.einsum("bhwc,bcd->bhwd", source, conv[SITE])
    expected = normalised(u, params["norm"], stats["norm"], mode)
    found, _ = module.apply(given, x, mode, SITE, mutable=["batch_stats"])
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("adapter", ["series", "parallel"])
def test_at_the_start_an_adapter_changes_nothing(adapter, norm):
    x = np.random.default_rng(1).normal(size=(4, 5, 5, 3)).astype(np.float32)
    module = adapted(adapter).clone(norm=NORMS[norm](2))
    start = module.init(jax.random.key(0), x, "eval", SITE)
    plain = {
        group: {n: v for n, v in of.items() if n != "adapter"}
        for group, of in start.items()
    }
    apply = functools.partial(module.clone(adapter=None).apply, plain)
    for mode in ("explain", "eval"):
        np.testing.assert_allclose(
            module.apply(start, x, mode, SITE),
            apply(x, mode, SITE),
            rtol=1e-5,
            atol=1e-5,
        )


def test_a_site_trains_its_own_adapter_alone():
    x = np.random.default_rng(2).normal(size=(4, 5, 5, 3)).astype(np.float32)
    module, ones = adapted("parallel"), np.ones(4, np.int32)
    start = module.init(jax.random.key(0), x, "eval", ones)

    def total(params):
        y = module.apply({**start, "params": params}, x, "explain", ones)
        return (y**3).sum()

    slope = jax.grad(total)(start["params"])["adapter"]["conv"]["kernel"]
    assert not np.asarray(slope[0]).any() and np.asarray(slope[1]).any()


def shapes(name, adapter):
    config = rows.apply_rows(common.get_config(), f"{adapter}_adapter,frozen")
    config.model.name = name
    model = models.build(config.model, 2, num_sites=2)
    x, site = jnp.zeros((2, 64, 64, 3)), jnp.zeros(2, jnp.int32)
    init = functools.partial(model.init, x=x, mode="eval", site=site)
    return config, jax.eval_shape(init, jax.random.key(0))["params"]


@pytest.mark.parametrize("name,count", [("resnet18", 16), ("resnet50", 16)])
@pytest.mark.parametrize("adapter", ["series", "parallel"])
def test_every_3x3_of_a_block_has_one_and_the_shared_weights_may_stay(
    name, count, adapter
):
    config, params = shapes(name, adapter)
    flat = flatten_dict(params, sep="/")
    found = [p for p in flat if p.endswith("adapter/conv/kernel")]
    assert len(found) == count
    for path in found:
        shared = flat[path.replace("adapter/conv/", "")].shape
        assert shared[:2] == (3, 3) and flat[path].shape == (2, *shared[2:])[:1] + (
            shared[3] if adapter == "series" else shared[2],
            shared[3],
        )
    groups = flatten_dict(learning_rate_groups(config)(params), sep="/")
    for path, group in groups.items():
        own = re.search("adapter|norm|head", path)
        assert group == ("fresh" if own else "frozen"), path


def test_a_network_with_adapters_needs_sites():
    x = jnp.zeros((2, 5, 5, 3))
    module = ConvNorm(FEATURES, 3, adapter=ADAPTERS["parallel"](2))
    with pytest.raises(ValueError, match="parts of its own for every site: pass site"):
        module.init(jax.random.key(0), x, "eval")
    config = common.get_config().model
    config.adapter = "series"
    assert models.needs_site(config)
    with pytest.raises(ValueError, match="config.model.adapter='series' needs the n"):
        models.build(config, 2)
    config.adapter = "both"
    with pytest.raises(ValueError, match="'both'; known: none, series, parallel"):
        models.build(config, 2, num_sites=2)
