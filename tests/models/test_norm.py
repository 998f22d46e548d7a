"""Batch norm of each site against plain batch norm on each site's rows alone.

The devices of the last test have to exist before JAX starts, so this file is also the
program that a subprocess runs; it prints one JSON object.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from as_program import report_of
from flax.traverse_util import flatten_dict

from configs.common import get_config
from cxai_jax import models
from cxai_jax.maps import saliency
from cxai_jax.models.norm import MOMENTUM, BatchNorm, ConvNorm, PerSiteBatchNorm
from cxai_jax.types import Outputs

# Three rows of site 0, one of site 1, two of site 2 and none of site 3, interleaved.
SITE = np.array([0, 2, 0, 1, 2, 0], np.int32)
SITES, CHANNELS = 4, 3
close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)


def scene(dtype=np.float64):
    """(variables of every site, x, dy): random, far from mean 0 and variance 1."""
    rng = np.random.default_rng(0)
    scale, bias, mean, var = rng.uniform(0.5, 2, (4, SITES, CHANNELS)).astype(dtype)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    x, dy = rng.normal(2, 3, (2, len(SITE), 2, 3, CHANNELS)).astype(dtype)
    return variables, x + 5 * SITE[:, None, None, None].astype(dtype), dy


def value_and_gradients(module, variables, x, dy, mode, *site):
    """(y, batch_stats after it, gradients of sum(y dy) in params and x)."""

    def total(params, x):
        y, state = module.apply(
            variables | {"params": params}, x, mode, *site, mutable=["batch_stats"]
        )
        return (y * dy).sum(), (y, state["batch_stats"])

    gradients, (y, stats) = jax.grad(total, (0, 1), has_aux=True)(
        variables["params"], x
    )
    return y, stats, *gradients


@pytest.mark.parametrize("mode", ["train", "explain", "eval"])
def test_each_site_is_plain_batch_norm_of_its_rows(mode, float64):
    variables, x, dy = scene()
    module = PerSiteBatchNorm(CHANNELS, eps=1e-3, num_sites=SITES)
    y, stats, dparams, dx = value_and_gradients(module, variables, x, dy, mode, SITE)
    assert y.dtype == dx.dtype == np.float64
    for site in range(SITES):
        rows = SITE == site
        if not rows.any():
            continue
        own = jax.tree.map(lambda v, site=site: v[site], variables)
        plain = BatchNorm(CHANNELS, eps=1e-3, lowering="xla")
        expected = value_and_gradients(plain, own, x[rows], dy[rows], mode)
        close(y[rows], expected[0])
        close(dx[rows], expected[3])
        for found, wanted in ((stats, expected[1]), (dparams, expected[2])):
            for name, value in wanted.items():
                close(found[name][site], value, err_msg=f"{name} of site {site}")


def test_a_site_without_rows_keeps_its_statistics():
    variables, x, dy = scene(np.float32)
    module = PerSiteBatchNorm(CHANNELS, num_sites=SITES)
    y, stats, dparams, dx = value_and_gradients(module, variables, x, dy, "train", SITE)
    absent = SITES - 1
    for name, before in variables["batch_stats"].items():
        np.testing.assert_array_equal(stats[name][absent], before[absent])
        assert np.abs(stats[name][:absent] - before[:absent]).max(1).min() > 0
    assert not any(np.asarray(g[absent]).any() for g in dparams.values())
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((y, stats, dparams, dx)))


def test_one_row_of_one_pixel_has_no_variance_and_gives_no_nan():
    variables, x, dy = scene(np.float32)
    module = PerSiteBatchNorm(CHANNELS, num_sites=SITES)
    x, dy = x[:, :1, :1], dy[:, :1, :1]
    y, stats, _, dx = value_and_gradients(module, variables, x, dy, "train", SITE)
    alone = int(SITE[3])
    np.testing.assert_array_equal(y[3, 0, 0], variables["params"]["bias"][alone])
    np.testing.assert_array_equal(dx[3], 0)
    before = variables["batch_stats"]["var"][alone]
    np.testing.assert_allclose(stats["var"][alone], MOMENTUM * before, rtol=1e-6)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((y, stats, dx)))


def test_evaluation_behind_a_convolution_equals_the_folded_norm_of_each_row():
    rng, make = np.random.default_rng(1), functools.partial(ConvNorm, CHANNELS, 3, 2)
    norm = functools.partial(PerSiteBatchNorm, num_sites=SITES)
    variables, x, _ = scene(np.float32)
    kernel = rng.normal(size=(3, 3, CHANNELS, CHANNELS)).astype(np.float32)
    nested = {name: {"norm": value} for name, value in variables.items()}
    nested["params"]["kernel"] = kernel
    y = make(norm=norm).apply(nested, x, "eval", SITE)
    for row, site in enumerate(SITE):
        own = {
            name: {"norm": jax.tree.map(lambda v, site=site: v[site], value)}
            for name, value in variables.items()
        }
        own["params"]["kernel"] = kernel
        expected = make().apply(own, x[row : row + 1], "eval")
        np.testing.assert_allclose(y[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_float32_statistics():
    variables, x, _ = scene(np.float32)
    module = PerSiteBatchNorm(CHANNELS, num_sites=SITES)
    given = jnp.asarray(x, jnp.bfloat16)
    y, state = module.apply(variables, given, "train", SITE, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    wide = module.apply(
        variables, given.astype(jnp.float32), "train", SITE, mutable=["batch_stats"]
    )[1]
    jax.tree.map(np.testing.assert_array_equal, state, wide)


def build(num_sites=2, **fields):
    config = get_config().model
    config.update({"name": "tiny", "norm": "per_site", **fields})
    return models.build(config, 3, num_sites=num_sites)


def test_a_network_with_parts_of_each_site_needs_to_be_told():
    x, key = jnp.zeros((2, 16, 16, 3)), jax.random.key(0)
    site = jnp.zeros(2, jnp.int32)

    def shapes(model, *site):
        return jax.eval_shape(lambda: model.init(key, x, "eval", *site))

    variables = shapes(build(), site)
    assert variables["params"]["stage1"]["norm"]["scale"].shape == (2, 16)
    with pytest.raises(
        ValueError, match=r"pass site, int32 \[B\] in 0..1, beside mode"
    ):
        shapes(build())
    with pytest.raises(ValueError, match=r"site has shape \(3,\), expected \(2,\)"):
        shapes(build(), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="'test'; use train, explain or eval"):
        jax.eval_shape(lambda: build().init(key, x, "test", site))
    with pytest.raises(ValueError, match="config.model.norm=.* num_sites is 0"):
        build(num_sites=0)
    with pytest.raises(ValueError, match="config.model.norm is 'group'; known: plain"):
        build(norm="group")
    # All others ignore it.
    plain = flatten_dict(shapes(build(norm="plain"), site))
    assert plain.keys() == flatten_dict(shapes(build(norm="plain"))).keys()


def test_the_input_gradient_of_a_part_of_the_batch_takes_its_sites():
    seen = []

    def lower(images, site):
        seen.append(np.asarray(site))
        return images * site[:, None, None, None]

    network = saliency.Explained(
        lower=lower,
        upper=lambda lower, site: lower,
        head=lambda features, site: features.mean((1, 2)),
        site=jnp.arange(4),
    )
    images = jnp.ones((4, 2, 2, 2))
    (found,) = saliency.signed_maps(
        ["input_gradient"],
        network,
        images,
        Outputs(lower=None, features=None, class_maps=None),
        jnp.zeros(4, jnp.int32),
        input_grad_fraction=0.5,
    )
    assert len(seen) == 1 and seen[0].tolist() == [0, 2]
    assert found[1].max() > found[0].max()


def sharded_report() -> dict:
    """Runs in the subprocess: one batch on 8 devices and on one."""
    from hlo import collectives

    from cxai_jax import mesh as meshes

    rng = np.random.default_rng(0)
    module = PerSiteBatchNorm(CHANNELS, num_sites=2)
    site = (np.arange(16) > 8).astype(np.int32)  # A device holds one site, or both.
    x = rng.normal(size=(16, 4, 4, CHANNELS)).astype(np.float32)
    variables = module.init(jax.random.key(0), x, "eval", site)
    mesh = meshes.make_mesh()

    @jax.jit
    def run(variables, x, site):
        return module.apply(variables, x, "train", site, mutable=["batch_stats"])

    placed = meshes.put_replicated(jax.device_get(variables), mesh)
    rows = meshes.put_rows((x, site), mesh)
    compiled = run.lower(placed, *rows).compile()
    many, one = compiled(placed, *rows), run(variables, x, site)
    apart = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), many, one
    )
    return {
        "devices": jax.device_count(),
        "largest": max(jax.tree.leaves(apart)),
        "collectives": collectives(compiled.as_text()),
    }


def test_statistics_are_those_of_the_whole_batch_over_eight_devices():
    flags = "--xla_force_host_platform_device_count=8"
    found = report_of(__file__, flags=flags)
    assert found["devices"] == 8
    assert found["largest"] < 1e-5
    # Sums alone cross the devices, never rows.
    assert {kind for kind, _ in found["collectives"]} == {"all-reduce"}


if __name__ == "__main__":
    print(json.dumps(sharded_report()))
