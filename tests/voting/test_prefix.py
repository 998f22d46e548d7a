"""Reuse of the first layers between nested masks: geometry, equality, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs.common import get_config
from cxai_jax import models
from cxai_jax.data.augment import Scale
from cxai_jax.inference import predictor
from cxai_jax.mesh import make_mesh
from cxai_jax.models import resnet
from cxai_jax.models.backbone import Backbone, Window
from cxai_jax.models.norm import ConvNorm, PerSiteBatchNorm
from cxai_jax.voting import early_exit, forward, prefix, rules
from cxai_jax.voting.forward import make_predict_step


def build(name):
    config = get_config().model
    config.name = name
    return models.build(config, 2)


def settings(**fields):
    config = get_config().tta
    config.update({"k": 3, **fields})
    return config


def slow_maps(windows, image, kernels):
    """The layers on one channel of integers, by definition; a stride-2 3x3 pools."""
    for (k, stride, padding), kernel in zip(windows, kernels, strict=True):
        pools = (k, stride) == (3, 2)
        low = np.iinfo(np.int64).min if pools else 0
        padded = np.pad(image, padding, constant_values=low)
        views = np.lib.stride_tricks.sliding_window_view(padded, (k, k))
        views = views[::stride, ::stride]
        image = views.max((2, 3)) if pools else np.einsum("ijuv,uv", views, kernel)
    return image


def square(corner, side):
    return tuple(slice(first, first + side) for first in corner)


LAYERS = {
    **{name: build(name).prefix_windows() for name in ("resnet18", "resnet50")},
    "unpadded": (Window(5, 3), Window(2, 2), Window(3)),
}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(("size", "grid"), [(64, 8), (224, 28), (90, 18)])
def test_crops_renew_exactly_what_a_cell_reaches(layers, size, grid):
    windows, random = LAYERS[layers], np.random.default_rng(size)
    crops = prefix.plan_crops(windows, size, grid)
    patch, step = size // grid, int(np.prod([w.stride for w in windows]))
    assert (crops.origins % step == 0).all()
    assert (crops.origins >= 0).all() and (crops.origins + crops.side <= size).all()
    kernels = [random.integers(1, 4, (w.size, w.size)) for w in windows]
    image = random.integers(0, 9, (size, size))
    before = slow_maps(windows, image, kernels)
    last, middle = grid - 1, grid // 2
    corners = [(0, 0), (0, last), (last, 0), (last, last)]
    inside = [(middle, middle), (middle, 0), (1, middle + 1), (last - 1, 2)]
    for cell in corners + inside:
        changed = image.copy()
        changed[square([c * patch for c in cell], patch)] += 1000
        after = slow_maps(windows, changed, kernels)
        spans = [
            prefix.reached(windows, size, c * patch, (c + 1) * patch) for c in cell
        ]
        expected = np.zeros(after.shape, bool)
        expected[tuple(slice(*span) for span in spans)] = True
        np.testing.assert_array_equal(after != before, expected)
        origin, offset, place = (
            [table[c] for c in cell]
            for table in (crops.origins, crops.offsets, crops.places)
        )
        small = slow_maps(windows, changed[square(origin, crops.side)], kernels)
        got = before.copy()
        got[square(place, crops.window)] = small[square(offset, crops.window)]
        np.testing.assert_array_equal(got, after)


def test_published_window_sizes():
    """What performance.md counts for 8-pixel cells of a 224-pixel image."""
    windows = build("resnet50").prefix_windows()
    sides = [prefix.plan_crops(windows[:n], 224, 28).window for n in (1, 2, 5)]
    assert sides == [7, 5, 11]
    assert prefix.plan_crops(windows, 224, 28).side <= 104


def test_impossible_geometry_is_refused():
    with pytest.raises(ValueError, match="a grid of 9 cells does not divide 64 pixels"):
        prefix.plan_crops([Window(3)], 64, 9)
    with pytest.raises(ValueError, match="images of 8 pixels are too small"):
        prefix.plan_crops([Window(9)], 8, 2)


@pytest.mark.parametrize("wanted", ["auto", "on", "off"])
@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("resnet50", 224, None),
        ("resnet18", 64, "crops of 64 pixels, too large to gain on images of 64"),
        ("efficientnet_lite0", 224, "EfficientNet declares no prefix"),
        ("tiny", 64, "Tiny declares no prefix"),
    ],
)
def test_reuse_falls_back_or_says_why_not(name, size, reason, wanted, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    choose = functools.partial(forward.prefix_crops, build(name), size)
    if wanted == "on" and reason:
        with pytest.raises(ValueError, match=reason):
            choose(settings(prefix_reuse=wanted))
    else:
        crops = choose(settings(prefix_reuse=wanted))
        assert (crops is not None) == (wanted != "off" and reason is None)
    assert choose(settings(prefix_reuse="off", k=0)) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose(settings(prefix_reuse="auto")) is None, "not measured there"


def test_an_unknown_choice_names_the_known():
    with pytest.raises(ValueError, match="'maybe'; known: auto, on, off"):
        forward.prefix_crops(build("tiny"), 64, settings(prefix_reuse="maybe"))


SIZE, GRID, K = 96, 12, 6


@pytest.fixture(scope="module")
def network():
    """(model, variables, uint8 images, scale): one block per layer, of a ResNet-50."""
    model = resnet.ResNet(2, depths=(1, 1, 1, 1), bottleneck=True)
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (3, SIZE, SIZE, 1), np.uint8)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)), "eval")
    )
    # Scales and statistics away from 1 and 0, or folding would do nothing.
    variables = jax.tree.map(
        lambda v: jnp.asarray(
            random.uniform(0.5, 1.5, v.shape)
            if v.ndim == 1
            else random.normal(size=v.shape) * (2 / np.prod(v.shape[:-1])) ** 0.5,
            v.dtype,
        ),
        shapes,
    )
    return model, variables, images, Scale(*models.normalisation("resnet18"))


@pytest.fixture(scope="module")
def outcomes(network):
    """The outcome of the whole predict step by `prefix_reuse`."""
    model, variables, images, scale = network
    return {
        wanted: jax.jit(
            make_predict_step(model, scale, settings(prefix_reuse=wanted, k=K, chunk=6))
        )(variables, images)
        for wanted in ("on", "off")
    }


def test_maps_are_bitwise_those_of_the_full_pass(network):
    model, variables, images, _ = network
    x = jnp.asarray(images[:2] / 255, jnp.float32).repeat(3, -1)
    last = GRID * GRID - 1
    cells = jnp.array(  # Corners, borders, the middle, neighbours that overlap.
        [[0, GRID - 1, last, last - GRID + 1, 78, 79], [13, 6, 138, 23, 0, 1]]
    )
    masks = rules.plan_masks(x, cells, grid=GRID, fill="mean")
    variants = rules.masked_images(x, cells, grid=GRID, fill="mean")

    @jax.jit
    def run(variables, masks, variants):
        first = functools.partial(model.apply, variables, mode="eval", method="prefix")
        crops = prefix.plan_crops(model.prefix_windows(), SIZE, GRID)
        carried, counts = first(masks.images), jnp.arange(K) + 1
        parts = []
        for start, stop in ((0, 2), (2, K)):
            order, value = masks.order, masks.value
            some = (masks.cells[:, start:stop], order, value, counts[start:stop])
            parts.append(prefix.nested_maps(first, crops, carried, masks.images, *some))
            carried = parts[-1][:, -1]
        whole = first(variants.reshape(-1, SIZE, SIZE, 3))
        return jnp.concatenate(parts, 1), whole.reshape(2, K + 1, *whole.shape[1:])

    got, whole = run(variables, masks, variants)
    assert (np.asarray(whole[:, 1:]) != np.asarray(whole[:, :1])).any((2, 3, 4)).all()
    np.testing.assert_array_equal(got, whole[:, 1:])


def test_all_votes_are_bitwise_those_of_the_full_pass(outcomes):
    assert np.ptp(outcomes["off"]["probs"][..., 1]) > 1e-4, "the masks must matter"
    for name, value in outcomes["off"].items():
        np.testing.assert_array_equal(outcomes["on"][name], value)


def test_the_predictor_reuses_and_stops_early_with_the_same_labels(network, outcomes):
    model, variables, images, scale = network
    probs = np.asarray(outcomes["off"]["probs"])
    config = get_config()
    config.data.image_size, config.eval.batch_size = SIZE, len(images)
    config.tta.update({"prefix_reuse": "on", "k": K, "theta": splitting(probs)})
    given = predictor.Trained(
        config, ["a", "b"], [""], 1, model, scale, variables, 0, {}, 1.0
    )
    got = predictor.Predictor(given, make_mesh(1))(images)
    full = rules.votes_for(probs, theta=config.tta.theta, k=K)
    np.testing.assert_array_equal(got.after, full.labels)
    np.testing.assert_array_equal(got.before, full.original)
    np.testing.assert_array_equal(got.probs, probs[:, 0])
    assert got.cast.max() > K // 2, "no image was left for a second round"


class TwoLayers(Backbone):
    """A layer that can be reused, and another one."""

    def setup(self):
        super().setup()
        self.first = ConvNorm(8, 3, padding=1, **self.shared())
        self.last = ConvNorm(8, 3, 2, padding=1, **self.shared())

    @nn.nowrap
    def prefix_windows(self):
        return (Window(3, 1, 1),)

    def prefix(self, x, mode, site=None):
        return jax.nn.relu(self.first(x, mode, site))

    def suffix(self, prefix, mode, site=None):
        return prefix

    def lower(self, x, mode, site=None):
        return self.prefix(x, mode, site)

    def upper(self, lower, mode, site=None):
        return jax.nn.relu(self.last(lower, mode, site))


def test_reused_layers_are_those_of_every_images_own_site():
    norm = functools.partial(PerSiteBatchNorm, num_sites=2)
    model, random = TwoLayers(2, norm=norm), np.random.default_rng(0)
    images = random.integers(0, 255, (3, 24, 24, 1), np.uint8)
    site = np.array([1, 0, 1], np.int32)
    x = jnp.zeros((3, 24, 24, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, "eval", site))
    variables = jax.tree_util.tree_map_with_path(
        lambda path, v: jnp.asarray(
            random.normal(size=v.shape) / 4
            if "kernel" in str(path)
            else random.uniform(0.5, 1.5, v.shape),
            v.dtype,
        ),
        shapes,
    )
    config = get_config()
    config.data.image_size, config.eval.batch_size = 24, 3
    scale, probs = Scale((127.0,) * 3, (60.0,) * 3), {}
    for wanted in ("on", "off"):
        config.tta.update({"prefix_reuse": wanted, "k": 4, "chunk": 6})
        step = jax.jit(make_predict_step(model, scale, config.tta))
        probs[wanted] = np.asarray(step(variables, images, site)["probs"])
    assert np.abs(np.diff(probs["off"], axis=1)).min((1, 2)).max() > 1e-4
    np.testing.assert_allclose(probs["on"], probs["off"], atol=1e-5)
    others = step(variables, images, 1 - site)["probs"]
    assert np.abs(others - probs["off"]).max((1, 2)).min() > 1e-3
    config.tta.update({"prefix_reuse": "on", "theta": splitting(probs["off"])})
    given = predictor.Trained(
        config, ["a", "b"], ["A", "B"], 1, model, scale, variables, 0, {}, 1.0
    )
    got = predictor.Predictor(given, make_mesh(1))(images, site)
    full = rules.votes_for(probs["off"], theta=config.tta.theta, k=4)
    np.testing.assert_array_equal(got.after, full.labels)


def splitting(probs):
    """A theta at which half of the votes oppose, and that rounding cannot move."""
    own = np.take_along_axis(probs[:, 1:], probs[:, :1].argmax(-1)[..., None], axis=2)
    values, half = np.sort(own.ravel()), own.size // 2
    return float(values[half - 1 : half + 1].mean())


@pytest.mark.parametrize("chunk", [2, 64])
def test_reuse_holds_for_any_packing_of_the_votes(chunk):
    """One convolution as prefix, its position-dependent sum as suffix; all integers."""
    batch, size, grid, k = 5, 12, 6, 9
    random = np.random.default_rng(chunk)
    images = jnp.asarray(random.integers(1, 9, (batch, size, size, 1)), jnp.float32)
    cells = np.stack([random.permutation(grid**2)[:k] for _ in range(batch)])
    cells = jnp.asarray(cells, jnp.int32)
    weights = jnp.asarray(random.integers(-9, 9, (size, size, 1)), jnp.float32)

    def first_layers(x):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
        return rows[:, :, :-2] + 3 * rows[:, :, 1:-1] + rows[:, :, 2:]

    def suffix(maps):
        positive = jax.nn.sigmoid((maps * weights).sum((1, 2, 3)) / 2000)
        return jnp.stack([1 - positive, positive], -1)

    crops = prefix.plan_crops([Window(3, 1, 1)], size, grid)
    split = rules.Reuse(first_layers, suffix, crops)
    first = suffix(first_layers(images))
    variants = rules.masked_images(images, cells, grid=grid)
    whole = suffix(first_layers(variants.reshape(-1, size, size, 1))).reshape(
        batch, k + 1, 2
    )
    all_votes = functools.partial(
        rules.masked_probs, None, grid=grid, fill="min", chunk=chunk
    )
    got = jax.jit(
        lambda *given: all_votes(*given, reuse=(split, first_layers(images)))
    )(images, cells, first)
    np.testing.assert_allclose(got, whole, rtol=1e-6)
    theta = splitting(np.asarray(whole))
    early = early_exit.vote_early(
        jax.jit(functools.partial(rules.next_votes_of, split), donate_argnums=1),
        rules.plan_masks(images, cells, grid=grid, fill="min"),
        first,
        theta=theta,
        chunk=chunk,
        step=2,
        carried=first_layers(images),
    )
    full = rules.votes_for(whole, theta=theta, k=k)
    np.testing.assert_array_equal(early.labels, full.labels)
    done = early.cast == k
    np.testing.assert_array_equal(early.opposing[done], full.opposing[done])
    assert (np.unique(early.cast).size > 1) and early.forwards >= early.cast.sum()
