"""The train step: golden metrics, norm updates, accumulation, the alignment terms."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import demo
from cxai_jax import methods, models
from cxai_jax.data.augment import Scale
from cxai_jax.maps.cam import patch_relevance
from cxai_jax.methods import guided
from cxai_jax.methods.method import Network
from cxai_jax.objectives.mixing import Mixed
from cxai_jax.training.optimizer import make_optimizer
from cxai_jax.types import Batch

B, SIZE = 8, 32


def batch_of(number=B, masks=False):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (number, SIZE + 4, SIZE + 4, 1), np.uint8)
    return Batch(
        jnp.asarray(images),
        jnp.full((number, 2), SIZE + 4, jnp.int32),
        jnp.arange(number, dtype=jnp.int32) % 2,
        jnp.zeros(number, jnp.int32),
        jnp.ones(number, bool),
        jnp.asarray((images > 100).astype(np.uint8) * 255) if masks else None,
    )


def one_step(row="full", batch=None, **changes):
    """(state before, state after, metrics) of one jitted step."""
    config = demo.get_config(row)
    config.data.image_size = SIZE
    config.update_from_flattened_dict(changes)
    model = models.build(config.model, 2, num_sites=2)
    size, site = jnp.zeros((1, SIZE, SIZE, 3)), jnp.zeros(1, jnp.int32)
    variables = jax.jit(lambda key: model.init(key, size, "eval", site))(
        jax.random.key(0)
    )
    optimizer = make_optimizer(
        config.optim, 100, lambda p: jax.tree.map(lambda _: "fresh", p)
    )
    network = Network(model, variables, Scale(*models.normalisation("tiny")))
    groups = config.mix.groups or 1
    method = methods.build(config, network, optimizer, total_steps=100, groups=groups)
    state = method.init(jax.random.key(0), variables)
    batches = {"labelled": batch_of() if batch is None else batch}
    after, metrics = jax.jit(method.step)(state, batches, jax.random.key(1))
    return state, after, {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def full():
    return one_step()


def test_golden_metrics_of_one_step(full):
    """A change here means that the same config now trains differently.

    If that is what the change was for, write the new values down; if not, it is a bug.
    """
    golden = {
        "accuracy": 0.5,
        "cpe": 3.129,
        "cross_entropy": 1.2457,
        "gradient_norm": 3.0478,
        "loss": 4.3747,
    }
    for name, value in golden.items():
        assert full[2][name] == pytest.approx(value, rel=2e-3), name


def test_the_step_counts_and_moves_every_parameter(full):
    before, after, metrics = full
    assert int(after.step) == 1
    assert metrics["loss"] == pytest.approx(
        metrics["cross_entropy"] + metrics["cpe"], rel=1e-5
    )
    for old, new in zip(
        jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True
    ):
        assert np.isfinite(new).all() and not np.array_equal(old, new)


def test_every_image_moves_the_statistics_of_its_own_site():
    changes = {"model.norm": "per_site", "align.weight": 1.0}
    changes["align.maps"] = ("cam", "gradcam_lower", "input_gradient")
    changes["align.input_grad_fraction"] = 0.5
    batch = batch_of()._replace(sites=jnp.ones(B, jnp.int32))
    before, after, metrics = one_step(batch=batch, **changes)
    assert np.isfinite(list(metrics.values())).all()
    stats = zip(
        jax.tree.leaves(before.batch_stats),
        jax.tree.leaves(after.batch_stats),
        strict=True,
    )
    for old, new in stats:
        np.testing.assert_array_equal(new[0], old[0])
        assert np.abs(new[1] - old[1]).min() > 0


def test_constant_maps_are_counted_and_a_nan_map_reaches_the_loss(full, monkeypatch):
    def with_two_maps_of(value):
        def relevance(cam):
            return patch_relevance(cam).at[:2].set(value)

        monkeypatch.setattr(guided, "patch_relevance", relevance)
        return one_step()[2]

    assert full[2]["cpe_constant_maps"] == 0
    constant = with_two_maps_of(0.3)
    assert constant["cpe_constant_maps"] == 2 / B
    assert 0 < constant["cpe"] < full[2]["cpe"]
    assert np.isnan(with_two_maps_of(np.nan)["loss"])  # The loop stops there.


def test_running_statistics_move_twice_per_mixed_step_and_once_without_mixing():
    """With s <- 0.9 s + 0.1 m from 0: the clean pass first, then the mixed (A5)."""

    def moved(prob, mode):
        # The mix of a step is drawn alike in all four.
        _, after, _ = one_step("snapmix", **{"mix.prob": prob, "cam.mode": mode})
        return np.asarray(jax.tree.leaves(after.batch_stats)[0])

    clean, mixed = moved(0.0, "eval"), moved(1.0, "eval")
    assert np.abs(clean).max() > 1e-3 and not np.allclose(clean, mixed, rtol=1e-2)
    np.testing.assert_allclose(moved(0.0, "train"), clean, rtol=1e-5, atol=1e-7)
    twice = moved(1.0, "train")
    np.testing.assert_allclose(twice, 0.9 * clean + mixed, rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up():
    """Each row twice, in two micro-batches: the same gradient as each row once."""
    still = {"augment.crop": "none", "augment.hflip": False, "augment.vflip": False}
    rows = batch_of(4)
    rows = rows._replace(images=rows.images[:, :SIZE, :SIZE], sizes=rows.sizes - 4)
    twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), rows)
    _, one, first = one_step("baseline", rows, **still)
    _, two, second = one_step("baseline", twice, **still, **{"train.accumulate": 2})
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    for a, b in zip(
        jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_alignment_and_mask_terms_join_the_loss():
    changes = {
        "align.weight": 1.0,
        "align.mask_weight": 0.3,
        "align.maps": ("cam", "gradcam_lower", "input_gradient"),
        "align.ramp": 0.0,
    }
    _, after, metrics = one_step("full", batch_of(masks=True), **changes)
    assert 0 < metrics["align"] < 1
    assert 0 < metrics["outside_mask"] < 1
    for name in changes["align.maps"]:
        assert 0 < metrics[f"entropy/{name}"] <= 1
        assert 0 <= metrics[f"empty/{name}"] <= 1
    total = (
        metrics["cross_entropy"]
        + metrics["cpe"]
        + metrics["align"]
        + 0.3 * metrics["outside_mask"]
    )
    assert metrics["loss"] == pytest.approx(total, rel=1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))


def test_images_are_contrasted_on_their_projection():
    before, after, metrics = one_step("contrastive")
    assert metrics["loss"] == pytest.approx(
        metrics["cross_entropy"] + metrics["contrastive"], rel=1e-5
    )
    assert metrics["contrastive"] > 0
    for layer in ("hidden", "output"):
        name = f"projection/{layer}/kernel"
        old, new = (flatten_dict(s.params, sep="/")[name] for s in (before, after))
        assert not np.allclose(old, new), name
    assert before.params["projection"]["output"]["kernel"].shape == (1024, 128)
    assert "projection" in models.fresh_modules("tiny")


def test_class_weights_and_smoothing_are_those_of_the_formula():
    random = np.random.default_rng(5)
    logits, weights = random.normal(size=(B, 3)), np.array([0.5, 2.0, 1.0])
    a, b = random.integers(0, 3, (2, B))
    share_a, share_b = random.uniform(size=(2, B))
    config = demo.get_config()
    config.train.class_weights = "0.5,2.0,1.0"
    config.train.label_smoothing = 0.2
    pair = Mixed(None, *map(jnp.asarray, (a, b, share_a, share_b)), None)
    setting = SimpleNamespace(config=config)
    seen = SimpleNamespace(logits=jnp.asarray(logits), pair=pair)
    found = guided.cross_entropy(setting, seen)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    wanted = np.zeros(B)
    for labels, share in ((a, share_a), (b, share_b)):
        target = 0.8 * np.eye(3)[labels] + 0.2 / 3
        wanted -= share * weights[labels] * (target * log_p).sum(1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
