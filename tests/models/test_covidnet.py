"""COVID-Net and its redesign against the published PyTorch code, and their class maps.

The values are in tests/golden/covidnet.json, written by golden/make_covidnet.py.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPO
from flax.traverse_util import flatten_dict, unflatten_dict
from golden import make_covidnet as golden

from configs.common import get_config
from cxai_jax import models
from cxai_jax.models.covidnet import CovidNet, halve, quarters
from cxai_jax.models.norm import NORMS

PAGE = json.loads((REPO / "tests/golden/covidnet.json").read_text())
SITES = jnp.asarray(golden.SITES, jnp.int32)
PEPX = ("projection1", "expansion", "depthwise", "projection2", "extension")
NAMES = (  # Of the published code, and ours.
    (r"conv1\.", lambda m: "stem"),
    (r"conv(\d)_1x1\.", lambda m: f"long{m[1]}"),
    (
        r"pexp(\d)_(\d)\.network\.(\d)\.",
        lambda m: f"stage{m[1]}_{int(m[2]) - 1}/{PEPX[int(m[3])]}",
    ),
    (r"bn([0-4])(?:new)?\.0\.", lambda m: f"norm{m[1]}"),
    (r"bn([56])(?:new)?\.0\.", lambda m: f"head/mlp/layer{int(m[1]) - 4}_norm"),
    (r"fbn([56])(?:new)?\.0\.", lambda m: f"projection/mlp/layer{int(m[1]) - 4}_norm"),
    (r"fc(\d)\.", lambda m: f"head/mlp/layer{m[1]}"),
    (r"feature(\d)\.", lambda m: f"projection/mlp/layer{m[1]}"),
    (r"classifier\.0\.", lambda m: "head/mlp/output"),
)


def translated(name):
    """(our name, site or None) of a tensor of the published code."""
    module, leaf = name[: name.rindex(".") + 1], name.rpartition(".")[2]
    ours = next(
        ours(match)
        for pattern, ours in NAMES
        if (match := re.fullmatch(pattern, module))
    )
    norm = "bn" in module
    leaf = leaf.replace("weight", "scale" if norm else "kernel")
    group = "batch_stats" if "running" in leaf else "params"
    path = f"{group}/{ours}/{leaf.removeprefix('running_')}"
    return path, (0 if "new." in module else 1) if norm else None


def as_ours(name, tensor):
    """A tensor of the published code in our layout."""
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    if name in ("fc1.weight", "feature1.weight"):  # Cells come first here.
        return (
            tensor.reshape(len(tensor), -1, 4)
            .transpose(2, 1, 0)
            .reshape(-1, len(tensor))
        )
    return tensor.T


def variables(case):
    flat = {}
    for name, shape in PAGE["cases"][case]["tensors"].items():
        path, site = translated(name)
        tensor = as_ours(name, golden.weights(name, tuple(shape)))
        if site is None:
            flat[path] = tensor
        else:
            flat.setdefault(path, [None, None])[site] = tensor
    flat = {path: jnp.asarray(np.asarray(value)) for path, value in flat.items()}
    found = unflatten_dict(flat, sep="/")
    return {"params": found["params"], "batch_stats": found.get("batch_stats", {})}


def small(case, dtype=jnp.float64, **fields):
    return CovidNet(
        2,
        head_kind="mlp",
        projection=8,
        dtype=dtype,
        norm=NORMS["per_site"](2),
        activated=case == "sepnorm",
        widths=(4, 16, 32, 64, 128),
        hidden=(64, 16),
        **fields,
    )


@pytest.mark.parametrize("case", golden.CASES)
def test_forward_loss_and_gradient_are_the_published_ones(case, float64):
    model, given = small(case), variables(case)
    x, labels = jnp.asarray(golden.images()), jnp.asarray(golden.LABELS)
    expected = PAGE["cases"][case]

    @jax.jit
    def run(given):
        def passed(params, mode):
            own = given | {"params": params}
            (logits, out), _ = model.apply(own, x, mode, SITES, mutable=["batch_stats"])
            embedded = model.apply(own, out.features, mode, SITES, method="project")
            return jax.nn.sigmoid(logits), embedded

        def loss(params):
            found = passed(params, "train")
            chosen = jax.nn.log_softmax(found[0])[jnp.arange(len(labels)), labels]
            return -chosen.mean(), found

        (value, trained), gradient = jax.value_and_grad(loss, has_aux=True)(
            given["params"]
        )
        return value, trained, passed(given["params"], "eval"), gradient

    value, trained, tested, gradient = run(given)
    gradient = flatten_dict({"params": gradient}, sep="/")
    for found, name in ((trained, "train"), (tested, "eval")):
        for ours, theirs in zip(found, expected[name], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-12)
    for name, theirs in expected["gradients"].items():
        path, site = translated(name)
        ours = gradient[path] if site is None else gradient[path][site]
        np.testing.assert_allclose(
            np.linalg.norm(ours), theirs, rtol=1e-7, atol=1e-12, err_msg=name
        )


def test_the_fourth_stage_may_get_every_term_once():
    model, given = small("covidnet", jnp.float32), variables("covidnet")
    terms = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 7 * 64)), "f4")

    def features(terms, stage4_input):
        chosen = model.clone(stage4_input=stage4_input)
        return chosen.apply(given, terms, "eval", SITES[:2], method="upper")

    published, every = (features(terms, s) for s in ("published", "all"))
    assert np.abs(published - every).max() > 1e-3 * np.abs(every).max()
    twice = terms.at[..., 128:192].set(terms[..., 64:128])  # P_33 is P_32.
    np.testing.assert_array_equal(features(twice, "published"), features(twice, "all"))


def test_class_maps_are_grad_cam_through_the_published_head():
    model, given = small("sepnorm", jnp.float32), variables("sepnorm")
    given = jax.tree.map(lambda v: v.astype(jnp.float32), given)
    features = jnp.asarray(np.random.default_rng(2).normal(size=(6, 3, 5, 128)), "f4")
    for mode in ("train", "explain", "eval"):
        (logits, maps), _ = model.apply(
            given,
            features,
            mode,
            SITES,
            method=lambda m, *rest: m.top(*rest),
            mutable=["batch_stats"],
        )

        def logit(features, k):
            held = "eval" if mode == "eval" else "explain"  # noqa: B023
            found = model.apply(given, features, held, SITES, method="head")
            return found[:, k].sum()

        for k in range(2):
            slope = jax.grad(logit)(features, k).sum((1, 2))
            expected = jnp.einsum("bhwd,bd->bhw", features, slope)
            np.testing.assert_allclose(maps[..., k], expected, rtol=2e-4, atol=1e-6)
    assert logits.shape == (6, 2)


def test_pooling_against_slices():
    x = np.random.default_rng(3).normal(size=(2, 7, 5, 3)).astype(np.float32)
    cells = [
        x[:, rows, columns].mean((1, 2))
        for rows in (slice(0, 4), slice(3, 7))
        for columns in (slice(0, 3), slice(2, 5))
    ]
    np.testing.assert_allclose(quarters(x), np.concatenate(cells, 1), atol=1e-6)
    expected = [
        [x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((1, 2)) for j in range(2)]
        for i in range(3)
    ]
    np.testing.assert_array_equal(halve(x), np.stack(expected).transpose(2, 0, 1, 3))


@pytest.mark.parametrize(
    "name,published", [("covidnet", 48_662_674), ("covidnet_redesign", 48_688_018)]
)
def test_the_published_number_of_parameters(name, published):
    """Of the network with its head of two classes and its projection."""
    config = get_config().model
    norm = "per_site" if name == "covidnet_redesign" else "plain"
    config.update({"name": name, "head": "mlp", "projection": 128, "norm": norm})
    model = models.build(config, 2, num_sites=2)
    x, site = jnp.zeros((2, 224, 224, 3)), jnp.zeros(2, jnp.int32)
    shapes = jax.eval_shape(lambda k: model.init(k, x, "eval", site), jax.random.key(0))
    assert sum(p.size for p in jax.tree.leaves(shapes["params"])) == published


@pytest.mark.slow
@pytest.mark.parametrize("name", ["covidnet", "covidnet_redesign"])
def test_it_learns_at_full_size(name):
    config = get_config().model
    config.update({"name": name, "head": "mlp"})
    model = models.build(config, 2)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(4, 224, 224, 3)), "f4")
    labels = jnp.array([0, 1, 0, 1])

    @jax.jit
    def start(key):
        return model.init(key, x, "eval")

    @jax.jit
    def loss_and_gradient(given):
        def loss(params):
            own = {**given, "params": params}
            (logits, out), _ = model.apply(own, x, "train", mutable=["batch_stats"])
            chosen = jax.nn.log_softmax(logits)[jnp.arange(4), labels]
            return -chosen.mean(), out.class_maps

        return jax.value_and_grad(loss, has_aux=True)(given["params"])

    given = start(jax.random.key(0))
    (before, maps), gradient = loss_and_gradient(given)
    assert maps.shape == (4, 7, 7, 2) and np.isfinite(maps).all()
    size = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    moved = jax.tree.map(lambda p, g: p - 1e-3 / size * g, given["params"], gradient)
    (after, _), _ = loss_and_gradient({**given, "params": moved})
    assert np.isfinite(size) and after < before


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"norm": "per_site"}, "config.model.norm is 'per_site', but covidnet has no"),
        ({"stage4_input": "both"}, "stage4_input is 'both'; known: published, all"),
        ({"adapter": "series"}, "config.model.adapter .* covidnet .* set it to 'none'"),
        ({"name": "tiny", "stage4_input": "all"}, "sum of a COVID-Net; tiny has no"),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields, message):
    config = get_config().model
    config.update({"name": "covidnet", **fields})
    with pytest.raises(ValueError, match=message):
        models.build(config, 2, num_sites=2)
