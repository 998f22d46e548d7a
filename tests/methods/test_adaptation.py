"""Methods with an unlabelled stream: what a step moves, and that no label leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, rows
from cxai_jax import methods, models
from cxai_jax.data.augment import Scale
from cxai_jax.methods import translation
from cxai_jax.methods.method import Network
from cxai_jax.models import image_pool
from cxai_jax.training.checkpoint import Checkpoints
from cxai_jax.training.optimizer import make_optimizer
from cxai_jax.types import Batch
from experiments import digits_picture

B, SIDE = 4, 32
NAMES = ("target_statistics", "dann", "cycada", "calibrator", "dranet")
TRANSLATING = ("cycada", "calibrator", "dranet")


def config(name, **changes):
    config = common.get_config()
    rows.baseline(config)
    config.method = name
    config.model.name = "tiny"
    config.data.image_size = SIDE
    config.augment.crop = "none"
    config.augment.hflip = config.augment.vflip = False
    config.adapt.width = config.adapt.perceptual_width = 2
    config.adapt.blocks = config.adapt.generator_steps = 1
    config.adapt.pool = 8
    if name == "calibrator":
        config.model.calibrator = 2
        config.adapt.features_after = 0.0  # Its second phase, where targets count.
    config.update_from_flattened_dict(changes)
    return config


def stream(seed, labels=None):
    rng = np.random.default_rng(seed)
    return Batch(
        jnp.asarray(rng.integers(0, 256, (B, SIDE, SIDE, 3), np.uint8)),
        jnp.full((B, 2), SIDE, jnp.int32),
        labels,
        jnp.zeros(B, jnp.int32),
        jnp.ones(B, bool),
    )


def batches(streams, seed=1):
    """What the loop hands over: the other domains have no labels."""
    made = {"source": stream(0, jnp.arange(B, dtype=jnp.int32))}
    return made | {n: stream(seed + i) for i, n in enumerate(streams[1:])}


def build(config):
    """(method, init) of a network of ten classes; `init()` makes the first state."""
    model = models.build(config.model, 10)
    image = jnp.zeros((1, SIDE, SIDE, 3))

    def variables(key):
        return model.init(key, image, "eval")

    network = Network(model, None, Scale((127.0,) * 3, (60.0,) * 3))
    optimizer = make_optimizer(
        config.optim, 10, lambda p: jax.tree.map(lambda _: "fresh", p)
    )
    method = methods.build(config, network, optimizer, total_steps=10)
    return method, lambda: method.init(jax.random.key(1), variables(jax.random.key(0)))


def shapes_of_a_step(config):
    """Shapes before and after a step: traced, not compiled."""
    method, init = build(config)
    before = jax.eval_shape(init)
    given = batches(method.streams)
    return before, *jax.eval_shape(method.step, before, given, jax.random.key(2))


def one_step(name, **changes):
    method, init = build(config(name))
    state = jax.jit(init)()
    return state, *jax.jit(method.step)(
        state, batches(method.streams, **changes), jax.random.key(2)
    )


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] if n in TRANSLATING else [])
        for n in NAMES
    ],
)
def test_a_step_learns_from_images_of_the_target_which_have_no_labels(name):
    before, after, metrics = one_step(name)
    assert all(np.isfinite(v) for v in metrics.values())
    assert int(after.step) == 1
    _, other, _ = one_step(name, seed=9)
    method, _ = build(config(name))
    assert not equal(method.scored(after), method.scored(other))


@pytest.mark.parametrize("name", TRANSLATING)
def test_a_step_keeps_the_shape_of_the_state(name):
    state, after, metrics = shapes_of_a_step(config(name))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert all(m.shape == () and m.dtype == jnp.float32 for m in metrics.values())
    assert "loss" in metrics


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cycada", "dranet"])
def test_every_trained_network_moves_and_the_fixed_one_does_not(name):
    before, after, _ = one_step(name)
    for net, params in before.params.items():
        moved = not equal(params, after.params[net])
        assert moved == (net != "perceptual"), net


@pytest.mark.slow
def test_the_calibrator_learns_when_all_else_has_and_stays():
    """Phase one moves translation and classifiers, phase two calibrator and judges."""
    method, init = build(config("calibrator", **{"adapt.features_after": 0.5}))
    first, step = jax.jit(init)(), jax.jit(method.step)
    late = {"calibrator", "of_pixels", "of_classes"}
    moved = {}
    for number in (4, 5):  # Of 10 steps.
        before = first.replace(step=jnp.asarray(number))
        after, metrics = step(before, batches(method.streams), jax.random.key(2))
        same = {n: equal(p, after.params[n]) for n, p in before.params.items()}
        moved[number] = {name for name in same if not same[name]}
        kept = equal(
            (before.batch_stats, before.pools), (after.batch_stats, after.pools)
        )
        assert kept == (number == 5)
        assert (metrics["cycle"] == 0) == (metrics["judges"] > 0) == (number == 5)
        assert int(after.step) == number + 1
    assert moved == {4: first.params.keys() - late, 5: late}
    scored = method.scored(after)
    assert equal(scored["params"]["network"], first.params["task"])
    assert equal(scored["params"]["calibrator"], after.params["calibrator"])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSLATING)
def test_a_state_from_a_checkpoint_goes_on_bit_for_bit(name, tmp_path):
    """Pools, power iterations and all optimisers: four steps, or two and two."""
    method, init = build(config(name))
    state, step = jax.jit(init)(), jax.jit(method.step)
    given, key = batches(method.streams), jax.random.key(2)
    checkpoints = Checkpoints(tmp_path, keep=1)
    for number in range(4):
        state, metrics = step(state, given, key)
        if number == 1:
            checkpoints.save("latest", 2, state, {})
            checkpoints.wait()
    other, at, _ = checkpoints.restore("latest", jax.jit(init)())
    checkpoints.close()
    assert at == 2
    for _ in range(2):
        other, again = step(other, given, key)
    assert equal(other, state) and equal(again, metrics)


@pytest.mark.parametrize("name", TRANSLATING)
def test_both_directions_can_be_drawn(name):
    method, init = build(config(name))
    row = jnp.zeros((B, SIDE, SIDE, 3))
    made = jax.eval_shape(
        lambda x: digits_picture.TRANSLATING[name].translate(
            translation.setting_of(method), init(), x, x
        ),
        row,
    )
    assert set(made) == {"source -> target", "target -> source"}
    assert all(x.shape == row.shape for x in made.values())
    page = digits_picture.sheet([row, row - 1])
    assert page.shape == (2 * 2 * SIDE, 2 * B * SIDE, 3)
    assert page[0, 0, 0] == 127 and page[-1, 0, 0] == 0


def test_target_statistics_are_those_of_the_target_alone():
    """Ten times the momentum away from the start: the mean of what it saw."""
    method, init = build(config("target_statistics"))
    state = jax.jit(init)()
    step = jax.jit(method.step)
    given = batches(method.streams)
    for _ in range(3):
        state, _ = step(state, given, jax.random.key(2))
    scored = method.scored(state)
    assert equal(scored["params"], state.source.params)
    assert equal(scored["batch_stats"], state.target)
    assert not equal(state.target, state.source.batch_stats)


def test_dann_starts_as_plain_training_and_then_reverses():
    """lambda is 0 at step 0: the adversary learns, the network does not mind it."""
    method, init = build(config("dann"))
    blind, _ = build(config("dann", **{"adapt.weight": 0.0}))
    state = jax.jit(init)()
    given = batches(method.streams)
    first, metrics = jax.jit(method.step)(state, given, jax.random.key(2))
    plain, _ = jax.jit(blind.step)(state, given, jax.random.key(2))
    assert metrics["lambda"] == 0 and equal(first.params, plain.params)
    later = state.replace(step=jnp.asarray(9))
    with_adversary, metrics = jax.jit(method.step)(later, given, jax.random.key(2))
    without, _ = jax.jit(blind.step)(later, given, jax.random.key(2))
    assert metrics["lambda"] == pytest.approx(2 / (1 + np.exp(-9)) - 1, rel=1e-5)
    assert equal(with_adversary.params["domain"], without.params["domain"])
    assert not equal(with_adversary.params["task"], without.params["task"])


def test_dranet_takes_a_third_domain():
    """Tri-directional: the source translates to and from both targets."""
    third = config("dranet", **{"data.other": "usps:train"})
    assert build(third)[0].streams == ("source", "target", "other")
    before, after, _ = shapes_of_a_step(third)
    scales = [k for k in before.params["separator"] if k.startswith("scale")]
    assert len(scales) == 4
    assert jax.tree.structure(before) == jax.tree.structure(after)


@pytest.mark.parametrize(
    "name,changes,message",
    [
        ("dann", {"mix.name": "snapmix"}, "no use for config.mix.name='snapmix'"),
        ("cycada", {"cpe.weight": 1.0}, "no use for config.cpe.weight=1.0; set it to"),
        ("dranet", {"train.accumulate": 2}, "config.train.accumulate=2; set it to 1"),
        ("cycada", {"data.image_size": 30}, "translates images of 32 px or more"),
        ("calibrator", {"mix.name": "snapmix"}, "no use for config.mix.name='snapmix'"),
        (
            "dranet",
            {"data.normalisation": "per_image"},
            "translates gray levels, which config.data.normalisation=per_image",
        ),
    ],
)
def test_settings_that_a_method_would_ignore_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(config(name, **changes))


def test_the_state_of_several_networks_is_saved_whole(tmp_path):
    """Parameters, statistics, optimisers and the pools of generated images."""
    params = {"task": {"kernel": jnp.ones(3)}, "to_target": {"kernel": jnp.ones(2)}}
    adam = translation.adam(1e-3)
    pool = image_pool.empty_pool(2, 4)
    pool, _ = image_pool.exchange(pool, jnp.ones((1, 4, 4, 3)), jax.random.key(0))
    state = translation.Several(
        step=jnp.asarray(7, jnp.int32),
        params=params,
        batch_stats={"task": {"mean": jnp.full(3, 2.0)}},
        opt_state={"generators": adam.init(params["to_target"])},
        pools={"target": pool},
    )
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save("latest", 7, state, {})
    checkpoints.wait()
    restored, step, _ = checkpoints.restore(
        "latest", jax.tree.map(jnp.zeros_like, state)
    )
    checkpoints.close()
    assert step == 7 and equal(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
