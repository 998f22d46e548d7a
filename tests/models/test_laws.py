"""The laws of every backbone in MODELS; the large ones by shape, and run as `slow`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs.common import get_config
from cxai_jax import models
from cxai_jax.models.lowering import conv
from cxai_jax.models.norm import BatchNorm, ConvNorm

# Of 64-pixel images: grid, D, D3.
SHAPES = {
    "tiny": (8, 64, 48),
    "lenet": (16, 64, 20),
    "resnet18": (2, 512, 256),
    "resnet34": (2, 512, 256),
    "resnet50": (2, 2048, 1024),
    "resnet101": (2, 2048, 1024),
    "efficientnet_b0": (2, 1280, 112),
    "efficientnet_lite0": (2, 1280, 112),
    "covidnet": (2, 2048, 7 * 1024),
    "covidnet_redesign": (2, 2048, 7 * 1024),
    "efficientnet_lite1": (2, 1280, 112),
    "efficientnet_lite2": (2, 1280, 120),
    "densenet121": (2, 1024, 1024),
    "nasnet_mobile": (2, 1056, 1056),
    "covidnet_ct": (2, 512, 512),
}
SITES = jnp.array([1, 0, 1], jnp.int32)  # Of `images`; ignored by plain norms.
# Tracing one takes seconds; one quick relative of each stays in the default suite.
LARGE = ("densenet121", "efficientnet_lite1", "efficientnet_lite2")
LARGE += ("efficientnet_b0", "nasnet_mobile", "resnet101")


def each(names):
    return pytest.mark.parametrize(
        "name",
        [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in names],
    )


EVERY = pytest.mark.parametrize("name", models.MODELS)
RUN = pytest.mark.parametrize(
    "name,norm",
    [
        pytest.param(name, norm, marks=[pytest.mark.slow] * (name != "tiny"))
        for name, spec in models.MODELS.items()
        for norm in spec.norms
    ],
)


def build(name, num_classes=3, **fields):
    config = get_config().model
    config.update({"name": name, **fields})
    return models.build(config, num_classes, num_sites=2)


def images(count=3, size=64):
    return jnp.asarray(
        np.random.default_rng(0).normal(size=(count, size, size, 3)), jnp.float32
    )


def initialise(model, x):
    """Variables with statistics and scales away from 0 and 1."""
    site = SITES[: len(x)]
    variables = jax.jit(lambda key: model.init(key, x, "eval", site))(jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda v: (
            v * jnp.asarray(rng.uniform(0.8, 1.2, v.shape), v.dtype)
            + (
                0.1 * jnp.asarray(rng.uniform(size=v.shape), v.dtype)
                if v.ndim < 2 or v.shape[0] == 2  # Of each site.
                else 0
            )
        ),
        variables,
    )


@functools.cache
def shapes(name, num_classes=1000, size=64, **fields):
    model = build(name, num_classes, **fields)
    x, site = jnp.zeros((2, size, size, 3)), SITES[:2]
    variables = jax.eval_shape(
        lambda key: model.init(key, x, "eval", site), jax.random.key(0)
    )
    return variables, jax.eval_shape(
        lambda v: model.apply(v, x, "eval", site), variables
    )


@EVERY
def test_shapes_and_parameter_count(name):
    variables, (logits, out) = shapes(name)
    grid, features, lower = SHAPES[name]
    counted = sum(p.size for p in jax.tree.leaves(variables["params"]))
    assert counted == models.MODELS[name].golden
    assert logits.shape == (2, 1000)
    assert out.features.shape == (2, grid, grid, features)
    assert out.lower.shape == (2, 2 * grid, 2 * grid, lower)
    assert out.class_maps.shape == (2, grid, grid, 1000)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@each(n for n, s in models.MODELS.items() if s.norms[1:])
def test_every_site_has_norms_of_its_own_and_nothing_else(name):
    plain, _ = shapes(name)
    per_site, _ = shapes(name, norm="per_site")
    plain, per_site = (flatten_dict(v, sep="/") for v in (plain, per_site))
    assert plain.keys() == per_site.keys()
    for path, variable in per_site.items():
        own = (2,) if re.search(r"norm\d?/", path) else ()
        assert variable.shape == own + plain[path].shape, path


@each(n for n, s in models.MODELS.items() if s.rules)
def test_only_head_projection_and_extra_norms_are_fresh(name):
    fields = {"extra_bn": True} if name.startswith("resnet") else {}
    variables, _ = shapes(name, projection=8, **fields)
    modules = models.fresh_modules(name)
    fresh = {p for p in flatten_dict(variables["params"]) if modules & set(p)}
    weights = ("kernel", "bias")
    expected = {("head", n) for n in weights}
    expected |= {("projection", i, n) for i in ("hidden", "output") for n in weights}
    if fields:
        expected |= {(f"extra_bn{i}", n) for i in (2, 4) for n in ("scale", "bias")}
    assert fresh == expected


def test_names_follow_torchvision():
    names = set(flatten_dict(shapes("resnet50")[0], sep="/"))
    assert {
        "params/conv1/kernel",
        "params/layer1_0/conv3/norm/scale",
        "params/layer1_0/downsample/kernel",
        "params/layer4_2/conv2/kernel",
        "batch_stats/layer3_5/conv1/norm/var",
    } <= names
    assert not any(name.startswith("params/layer1_1/downsample") for name in names)


@each(models.MODELS)
def test_bfloat16_keeps_float32_logits_maps_and_statistics(name):
    variables, (logits, out) = shapes(name, dtype="bfloat16")
    assert out.features.dtype == out.lower.dtype == jnp.bfloat16
    assert logits.dtype == out.class_maps.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@RUN
def test_laws(name, norm):
    model, x = build(name, norm=norm), images()
    variables = initialise(model, x)

    @jax.jit
    def run(variables, x):
        apply = functools.partial(model.apply, variables, site=SITES)
        head = functools.partial(apply, mode="explain", method="head")
        logits, out = apply(x, "explain")
        lower = apply(x, "explain", method="lower")
        staged = head(apply(lower, "explain", method="upper"))
        first = jax.grad(lambda x, mode: apply(x, mode)[0][0].sum())
        (trained, _), updated = apply(x, "train", mutable=["batch_stats"])
        stats = {
            mode: apply(x, mode, mutable=["batch_stats"])[1].get("batch_stats", {})
            for mode in ("explain", "eval")
        }
        return logits, out, staged, first(x, "explain"), trained, updated, stats

    logits, out, staged, gradient, trained, updated, stats = run(variables, x)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    close(staged, logits)
    close(out.class_maps.mean((1, 2)) + variables["params"]["head"]["bias"], logits)
    # Explaining is the training forward pass, but image 0 hears of image 0 alone.
    close(trained, logits)
    assert np.abs(gradient[0]).max() > 0
    np.testing.assert_array_equal(gradient[1:], 0)
    for before, after in zip(
        jax.tree.leaves(variables.get("batch_stats", {})),  # COVID-Net has no norm.
        jax.tree.leaves(updated.get("batch_stats", {})),
        strict=True,
    ):
        assert np.abs(after - before).max() > 0
    for kept in stats.values():
        before = variables.get("batch_stats", {})
        jax.tree.map(np.testing.assert_array_equal, kept, before)


def test_training_mode_does_leak_across_the_batch():
    """What explain mode is for: without it the law above would not hold."""
    model, x = build("tiny"), images(size=32)
    variables = initialise(model, x)

    def first_logits(x):
        return model.apply(variables, x, "train", mutable=["batch_stats"])[0][0][
            0
        ].sum()

    assert np.abs(jax.jit(jax.grad(first_logits))(x)[1:]).max() > 1e-6


def test_norm_statistics_and_values_against_numpy():
    """One ConvNorm in its three modes; the running variance is the unbiased one."""
    module, rng = ConvNorm(4, 1, eps=1e-3), np.random.default_rng(0)
    x = rng.normal(2, 3, (2, 3, 5, 3)).astype(np.float32)
    kernel = rng.normal(size=(1, 1, 3, 4)).astype(np.float32)
    scale, bias, mean, var = rng.uniform(0.5, 2, (4, 4)).astype(np.float32)
    variables = {
        "params": {"kernel": kernel, "norm": {"scale": scale, "bias": bias}},
        "batch_stats": {"norm": {"mean": mean, "var": var}},
    }
    y = np.einsum("bhwc,cd->bhwd", x.astype(np.float64), kernel[0, 0])
    batch_mean, batch_var = y.mean((0, 1, 2)), y.var((0, 1, 2))

    def normalised(mean, var):
        return (y - mean) / np.sqrt(var + 1e-3) * scale + bias

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(module.apply(variables, x, "eval"), normalised(mean, var))
    close(module.apply(variables, x, "explain"), normalised(batch_mean, batch_var))
    trained, state = module.apply(variables, x, "train", mutable=["batch_stats"])
    close(trained, normalised(batch_mean, batch_var))
    running = state["batch_stats"]["norm"]
    close(running["mean"], 0.9 * mean + 0.1 * batch_mean)
    close(running["var"], 0.9 * var + 0.1 * batch_var * 30 / 29)
    with pytest.raises(ValueError, match="'test'; use train, explain or eval"):
        module.apply(variables, x, "test")


def test_folded_norm_equals_the_unfolded_one():
    """Eval folds the norm into the kernel; the module BatchNorm alone does not."""
    x = images(2, 9)
    for depthwise, features in ((False, 5), (True, 3)):
        module = ConvNorm(features, 3, 2, padding=1, depthwise=depthwise)
        variables = initialise(module, x)
        norm = {k: v["norm"] for k, v in variables.items()}
        plain = conv(x, variables["params"]["kernel"], stride=2, padding=1)
        np.testing.assert_allclose(
            module.apply(variables, x, "eval"),
            BatchNorm(features).apply(norm, plain, "eval"),
            rtol=1e-4,
            atol=1e-5,
        )


def test_explaining_costs_no_second_forward_pass():
    """XLA merges the explain pass with the training pass (alignment.md 3.3)."""
    model, x = build("tiny"), images(2, 32)
    variables = initialise(model, x)

    def flops(*modes):
        def run(variables, x):
            return [
                model.apply(variables, x, mode, mutable=["batch_stats"])[0][0]
                for mode in modes
            ]

        return jax.jit(run).lower(variables, x).compile().cost_analysis()["flops"]

    assert flops("train", "explain") < 1.05 * flops("train")


@pytest.mark.parametrize(
    "name", ["tiny", pytest.param("resnet18", marks=pytest.mark.slow)]
)
def test_remat_and_lowering_change_nothing_but_the_program(name, float64):
    # In float64: an untrained network amplifies rounding, most on maps of one pixel.
    x = images(2, 32).astype(jnp.float64)
    variables = initialise(build(name), x)
    variables = jax.tree.map(lambda v: v.astype(jnp.float64), variables)

    def loss_and_gradient(model):
        def loss(params):
            (logits, _), state = model.apply(
                variables | {"params": params}, x, "train", mutable=["batch_stats"]
            )
            return jax.nn.logsumexp(logits, axis=-1).mean(), state

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    plain = build(name).clone(dtype=jnp.float64, lowering="xla")
    expected = loss_and_gradient(plain)
    for model in (plain.clone(remat=True), plain.clone(lowering="tuned")):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
            loss_and_gradient(model),
            expected,
        )


def test_mlp_class_maps_are_grad_cam_through_the_head():
    model, x = build("tiny", head="mlp"), images(2, 32)
    variables = initialise(model, x)
    logits, out = model.apply(variables, x, "eval")

    def head(pooled):
        return model.apply(variables, pooled[:, None, None], "eval", method="head")

    pooled = out.features.mean((1, 2))
    np.testing.assert_allclose(head(pooled), logits, rtol=1e-5, atol=1e-5)
    for k in range(3):
        gradient = jax.grad(lambda pooled, k=k: head(pooled)[:, k].sum())(pooled)
        expected = jnp.einsum("bhwd,bd->bhw", out.features, gradient)
        np.testing.assert_allclose(
            out.class_maps[..., k], expected, rtol=1e-4, atol=1e-5
        )


def test_a_flat_head_is_linear_in_every_cell():
    model, x = build("tiny", head="flat"), images(2, 32)
    variables = initialise(model, x)
    logits, out = model.apply(variables, x, "eval")
    head = {
        k: np.asarray(v, np.float64) for k, v in variables["params"]["head"].items()
    }
    features = np.asarray(out.features, np.float64)
    expected = features.reshape(2, -1) @ head["kernel"].reshape(-1, 3) + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    mean = out.class_maps.mean((1, 2)) + head["bias"]
    np.testing.assert_allclose(mean, logits, rtol=1e-5, atol=1e-5)


def test_head_kernel_and_input_normalisation():
    variables, _ = shapes("resnet18", 5)
    assert models.head_kernel(variables["params"]).shape == (512, 5)
    with pytest.raises(ValueError, match="Outputs.class_maps"):
        models.head_kernel(shapes("tiny", 5, head="mlp")[0]["params"])
    with pytest.raises(ValueError, match="mlp or flat has no class kernel"):
        models.head_kernel(shapes("tiny", 5, head="flat")[0]["params"])
    for name in ("efficientnet_lite0", "efficientnet_lite2"):
        assert models.normalisation(name) == ((127.0,) * 3, (128.0,) * 3)
    assert models.normalisation("nasnet_mobile") == ((127.5,) * 3, (127.5,) * 3)
    assert models.normalisation("covidnet_ct") == ((0.0,) * 3, (255.0,) * 3)
    for name in ("resnet50", "densenet121", "efficientnet_b0"):
        mean, std = models.normalisation(name)
        np.testing.assert_allclose(mean, [123.675, 116.28, 103.53])
        np.testing.assert_allclose(std, [58.395, 57.12, 57.375])


@pytest.mark.parametrize(
    "fields,message",
    [
        (
            {"name": "resnet51"},
            "config.model.name is 'resnet51'; known: tiny, lenet, resnet18",
        ),
        ({"head": "conv"}, "config.model.head is 'conv'; known: linear, mlp, flat"),
        ({"dtype": "float16"}, "'float16'; known: float32, bfloat16"),
        ({"name": "tiny", "extra_bn": True}, "config.model.extra_bn .* tiny"),
    ],
)
def test_a_wrong_field_names_the_known_values(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**{"name": "resnet50", **fields})
