"""Guided factorization against NumPy, against the published code, and its laws."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import lax

from configs.common import get_config
from cxai_jax import models
from cxai_jax.maps import saliency
from cxai_jax.maps.attribution import guided_factorization
from cxai_jax.models import pretrained

GOLDEN = Path(__file__).parents[1] / "golden"
LABELS = np.array([2, 0])


def weights(seed=0):
    """A stem, a residual block of two convolutions and a head, float64."""
    rng = np.random.default_rng(seed)
    shapes = {"stem": (3, 3, 3, 4), "first": (3, 3, 4, 4), "second": (3, 3, 4, 4)}
    drawn = {name: rng.normal(0, 0.4, shape) for name, shape in shapes.items()}
    shifts = {f"{name}_shift": rng.normal(0.1, 0.1, 4) for name in shapes}
    head = {"head": rng.normal(0, 1, (4, 3)), "head_shift": rng.normal(0, 1, 3)}
    return drawn | shifts | head


def network(w, x):
    def conv(x, name):
        pads, letters = ((1, 1), (1, 1)), ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x, w[name], (1, 1), pads, dimension_numbers=letters
        )
        return y + w[f"{name}_shift"]

    start = nn.relu(conv(x, "stem"))
    branch = conv(nn.relu(conv(start, "first")), "second")
    return nn.relu(branch + start).mean((1, 2)) @ w["head"] + w["head_shift"]


def pictures(number=2):
    return np.random.default_rng(1).normal(0.3, 1, (number, 6, 6, 3))


@functools.partial(jax.jit, static_argnames="target")
def compiled(w, x, labels, target):
    return guided_factorization(lambda x: network(w, x), x, labels, target=target)


@pytest.fixture
def agf(float64):
    def found(w, x, labels=LABELS, target="centred"):
        given = jax.tree.map(jnp.asarray, (w, x, labels))
        return np.asarray(compiled(*given, target))

    return found


class Plain:
    """The same network and rule, number by number."""

    def __init__(self, w, x, label, target):
        self.w, self.label, self.target = w, label, target
        self.x = x
        self.start = self.relu(self.conv(x, "stem"))
        self.first = self.conv(self.start, "first")
        self.branch = self.conv(self.relu(self.first), "second")
        self.total = self.branch + self.start
        self.last = self.relu(self.total)

    @staticmethod
    def relu(x):
        return np.maximum(x, 0)

    def conv(self, x, name):
        return self.forward(x, self.w[name]) + self.w[f"{name}_shift"]

    @staticmethod
    def forward(x, kernel):
        out = np.zeros((*x.shape[:2], kernel.shape[3]))
        for i, j in np.ndindex(x.shape[:2]):
            for a, b in np.ndindex(3, 3):
                row, column = i + a - 1, j + b - 1
                if 0 <= row < x.shape[0] and 0 <= column < x.shape[1]:
                    out[i, j] += x[row, column] @ kernel[a, b]
        return out

    @staticmethod
    def transposed(y, kernel):
        out = np.zeros((*y.shape[:2], kernel.shape[2]))
        for i, j in np.ndindex(y.shape[:2]):
            for a, b in np.ndindex(3, 3):
                row, column = i + a - 1, j + b - 1
                if 0 <= row < y.shape[0] and 0 <= column < y.shape[1]:
                    out[row, column] += kernel[a, b] @ y[i, j]
        return out

    def chance(self, pooled):
        y = pooled @ self.w["head"] + self.w["head_shift"]
        own = y[self.label]
        explained = own - y.mean() if self.target == "centred" else own
        sigma = np.abs(y - own).max()
        scores = explained * np.exp(-0.5 * ((y - own) / sigma) ** 2)
        return np.exp(scores[self.label]) / np.exp(scores).sum()

    def at_head(self):
        """dp / dpooled by differences, and the pooled features."""
        pooled, h = self.last.mean((0, 1)), 1e-5
        slopes = [
            (self.chance(pooled + h * e) - self.chance(pooled - h * e)) / (2 * h)
            for e in np.eye(4)
        ]
        return np.array(slopes), pooled

    @staticmethod
    def over(a, b):
        return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b != 0)

    def by_size(self, sizes, name, given):
        kernel = np.abs(self.w[name])
        part = self.over(given, self.forward(sizes, kernel))
        return sizes * self.transposed(part, kernel)

    def factor(self, values, phi):
        step = 1 / (1 + np.exp(-10 * values / values.max()))
        r = np.stack(
            [step[place].sum(0) / place.sum() for place in (phi < 0, phi > 0)], axis=1
        )
        fit = np.linalg.inv(r.T @ r + np.eye(2)) @ r.T @ step.reshape(-1, 4).T
        fit = self.relu(fit).reshape(2, *phi.shape)
        return self.relu(fit[1] - fit[0])[..., None]

    def map(self):
        slopes, pooled = self.at_head()
        share = self.over(self.last, self.last.sum((0, 1))) * pooled * slopes
        gradient = slopes / self.last[..., 0].size * (self.total > 0)
        # The sum of the block, then its second convolution, which only shares out.
        to_branch = self.over(self.branch * share, self.total)
        to_start = self.over(self.start * share, self.total)
        inner = self.by_size(self.relu(self.first), "second", to_branch)
        inner_gradient = self.transposed(gradient, self.w["second"]) * (self.first > 0)
        outer_gradient = self.transposed(inner_gradient, self.w["first"])
        c = self.by_size(self.start, "first", inner)
        product = self.relu((self.start * outer_gradient).mean(-1, keepdims=True))
        masked = self.transposed(inner_gradient * (inner != 0), self.w["first"])
        phi = c.mean(-1)
        certain = self.factor(self.start, phi) + product / product.max()
        r = certain / (1 + np.exp(-c)) + self.factor(masked, phi)
        r = (r + self.by_size(np.ones(c.shape), "first", inner)) * (c != 0)
        c = c + r - r.sum() / (c != 0).sum() * (c != 0) + to_start
        # The image, by z^B.
        kernel, up = self.w["stem"], np.maximum(self.w["stem"], 0)
        low, high = (np.full(self.x.shape, f(self.x)) for f in (np.min, np.max))
        down = kernel - up
        z = self.forward(self.x, kernel)
        z = z - self.forward(low, up) - self.forward(high, down)
        s = self.over(c, z)
        found = self.x * self.transposed(s, kernel)
        found -= low * self.transposed(s, up) + high * self.transposed(s, down)
        return found.sum(-1)


@pytest.mark.parametrize("target", ["centred", "logit"])
def test_it_is_the_rule_number_by_number(agf, target):
    w, x = weights(), pictures()
    expected = [
        Plain(w, image, label, target).map()
        for image, label in zip(x, LABELS, strict=True)
    ]
    found = agf(w, x, target=target)
    np.testing.assert_allclose(found, expected, 1e-5, 1e-6 * np.abs(expected).max())


def test_its_sum_is_what_the_head_attributes(agf):
    w, x = weights(3), pictures()
    expected = [
        np.dot(*Plain(w, image, label, "centred").at_head())
        for image, label in zip(x, LABELS, strict=True)
    ]
    np.testing.assert_allclose(agf(w, x).sum((1, 2)), expected, 1e-6)


def test_an_image_does_not_depend_on_its_batch_and_classes_differ(agf):
    w, x = weights(), pictures()
    both = agf(w, x)
    np.testing.assert_allclose(agf(w, x[[1, 0]], LABELS[[1, 0]]), both[[1, 0]], 1e-9)
    other = agf(w, x, np.array([1, 1]))
    assert np.corrcoef(other[0].ravel(), both[0].ravel())[0, 1] < 0.999


def test_what_is_added_to_every_class_changes_no_centred_map(agf):
    w, x = weights(), pictures()
    shifted = w | {"head": w["head"] + np.array([[1.0], [-2.0], [0.5], [3.0]])}
    np.testing.assert_allclose(agf(shifted, x), agf(w, x), 1e-7, 1e-12)
    assert np.abs(agf(shifted, x, target="logit") - agf(w, x, target="logit")).max() > 0


def test_equal_logits_and_a_dead_network_give_finite_maps(agf):
    w, x = weights(), pictures()
    equal = w | {"head": np.ones((4, 3)), "head_shift": np.zeros(3)}
    dead = w | {"stem_shift": np.full(4, -99.0), "second_shift": np.full(4, -99.0)}
    assert np.isfinite(agf(equal, x)).all()
    assert (agf(dead, x) == 0).all()


def test_an_operation_without_a_rule_is_named():
    x = jnp.ones((1, 4, 4, 3))

    def swish(x):
        return (x * jax.nn.sigmoid(x)).mean((1, 2)) @ jnp.ones((3, 2))

    def traced(logits, **options):
        labels = jnp.array([0])
        return jax.eval_shape(
            lambda x: guided_factorization(logits, x, labels, **options), x
        )

    with pytest.raises(ValueError, match="no rule for 'mul' of .*4, 4, 3.*knows ReLU"):
        traced(swish)
    with pytest.raises(ValueError, match="do not depend on the images"):
        traced(lambda x: jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="unknown target 'odds'; known"):
        traced(lambda x: x.mean((1, 2)), target="odds")


def torch_name(modules, leaf):
    """torchvision's name of a tensor of our ResNets."""
    norm = modules[-1] == "norm"
    top, *rest = modules[:-1] if norm else modules
    module = {"head": "fc", "conv1": "bn1" if norm else "conv1"}.get(top)
    if module is None:
        layer = rest[0].replace("conv", "bn") if norm else rest[0]
        if rest[0] == "downsample":
            layer = f"downsample.{int(norm)}"
        module = f"{top.replace('_', '.')}.{layer}"
    leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean"}
    return f"{module}.{(leaves | {'var': 'running_var'}).get(leaf, leaf)}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_published_code_draws_the_same_map(name, float64):
    """golden/make_attribution.py ran it on these weights; maps over their maximum."""
    golden = json.loads((GOLDEN / "attribution.json").read_text())
    spec = importlib.util.spec_from_file_location("peers", GOLDEN / "torch_networks.py")
    peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peers)
    config = get_config().model
    config.name = name
    model = models.build(config, 10).clone(lowering="xla", dtype=jnp.float64)
    x = jnp.asarray(peers.images(), jnp.float64)
    shapes = jax.eval_shape(lambda key: model.init(key, x, "eval"), jax.random.key(0))
    tensors = {}
    for (_, *modules, leaf), value in flatten_dict(shapes).items():
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(value.shape), (0,))
        tensor = torch_name(modules, leaf)
        tensors[tensor] = peers.weight(tensor, tuple(value.shape[i] for i in axes))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape), shapes)
    filled, _ = pretrained.fill(tensors, name, zeros)
    filled = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), filled)
    largest = golden["largest_logit"][name]
    head = {name: v / largest for name, v in filled["params"]["head"].items()}
    filled = filled | {"params": filled["params"] | {"head": head}}

    @jax.jit
    def run(variables, x, labels):
        network = saliency.stages(model, variables, "eval")
        return guided_factorization(network.logits, x, labels, target="logit")

    maps = np.asarray(run(filled, x, jnp.array(golden["classes"])))
    side = maps.shape[1] // 8
    coarse = maps.reshape(2, side, 8, side, 8).mean((2, 4))
    for ours, published in zip(coarse, golden["maps"][name], strict=True):
        # Theirs is divided by one number for each image. The head is float32 here.
        published = np.array(published)
        factor = (ours * published).sum() / (published**2).sum()
        assert factor > 0
        np.testing.assert_allclose(ours / factor, published, 0, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "densenet121", "nasnet_mobile"])
def test_networks_beyond_the_paper_are_explained(name, float64):
    """Depthwise convolutions, a concatenation, separable ones and pools have rules."""
    config = get_config().model
    config.name = name
    model = models.build(config, 3).clone(lowering="xla", dtype=jnp.float64)
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (2, 64, 64, 3)))
    variables = model.init(jax.random.key(0), x, "eval")
    labels = jnp.array([0, 2])

    @jax.jit
    def run(variables):
        network = saliency.stages(model, variables, "eval")
        return guided_factorization(network.logits, x, labels)

    maps = np.asarray(run(variables))
    assert np.isfinite(maps).all() and (np.abs(maps).max((1, 2)) > 0).all()
