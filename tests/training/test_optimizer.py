"""The optimiser against an independent float64 version and against torch, by steps."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import REPO

from configs import common, demo
from cxai_jax import models
from cxai_jax.training.optimizer import (
    check_groups,
    learning_rate_groups,
    make_optimizer,
)

STEPS = 30
# Of values of order 1; optax takes the shares of its schedules in float32.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
GOLDEN = json.loads((REPO / "tests/golden/optimizer.json").read_text())


def settings(pretrained="some.npz", **changes):
    config = common.get_config()
    config.model.pretrained = pretrained
    config.optim.update(
        {"lr_trunk": 0.02, "lr_fresh": 0.1, "weight_decay": 0.01, **changes}
    )
    return config


def start():
    return {
        name: {"kernel": np.array(values)} for name, values in GOLDEN["start"].items()
    }


def gradient(name, values, step):
    """As tests/golden/make_optimizer.py has it."""
    phase = {"trunk": 0.1, "head": 0.7, "stem": 1.3}[name]
    return 0.6 * values + np.sin(step + phase + np.arange(3))


def ours(config):
    """{name: [STEPS, 3]} of the library's optimiser, in float64."""
    optimizer = make_optimizer(config.optim, STEPS, learning_rate_groups(config))
    params = jax.tree.map(jnp.asarray, start())
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    found = []
    for step in range(STEPS):
        slopes = {
            name: {"kernel": jnp.asarray(gradient(name, np.asarray(p["kernel"]), step))}
            for name, p in params.items()
        }
        updates, state = update(slopes, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    assert params["head"]["kernel"].dtype == jnp.float64
    return {
        name: np.stack([np.asarray(p[name]["kernel"]) for p in found])
        for name in params
    }


def rate_at(optim, schedule, peak, step):
    """Learning rate of one step, written from the definitions."""
    warmup = round(optim.warmup * STEPS)
    if schedule == "cosine" and step >= warmup:
        done = (step - warmup) / (STEPS - warmup)
        return peak * (1 + math.cos(math.pi * done)) / 2
    if schedule == "multistep":
        passed = sum(step >= round(share * STEPS) for share in optim.milestones)
        peak = peak * optim.gamma**passed
    if schedule == "inverse":
        peak = peak / (1 + 10 * step / STEPS) ** 0.75
    return peak * min(1.0, step / warmup) if warmup else peak


def expected(config, learns):
    """The same trajectories in NumPy.

    Args:
      learns: parameter -> (peak rate, schedule), or None where it is frozen.
    """
    optim = config.optim
    values = {name: p["kernel"].copy() for name, p in start().items()}
    buffers = {name: np.zeros(3) for name in values}
    found = {name: [] for name in values}
    for step in range(STEPS):
        slopes = {
            name: gradient(name, values[name], step)
            for name, group in learns.items()
            if group
        }
        norm = math.sqrt(sum((g**2).sum() for g in slopes.values()))
        shrink = 1.0
        if optim.clip_norm and norm > optim.clip_norm:
            shrink = optim.clip_norm / norm
        for name, slope in slopes.items():
            slope = shrink * slope + optim.weight_decay * values[name]
            buffers[name] = optim.momentum * buffers[name] + slope
            direction = slope + optim.momentum * buffers[name]
            peak, schedule = learns[name]
            values[name] -= rate_at(optim, schedule, peak, step) * direction
        for name, value in values.items():
            found[name].append(value.copy())
    return {name: np.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
@pytest.mark.parametrize("warmup", [0.0, 0.2])
@pytest.mark.parametrize("schedule", ["constant", "multistep", "cosine", "inverse"])
def test_trajectories_are_those_of_the_formulas(float64, schedule, warmup, clip_norm):
    config = settings(schedule=schedule, warmup=warmup, clip_norm=clip_norm)
    trunk, fresh = (0.02, schedule), (0.1, schedule)
    wanted = expected(config, {"trunk": trunk, "head": fresh, "stem": trunk})
    for name, values in ours(config).items():
        assert_close(values, wanted[name], err_msg=name)


def test_from_scratch_everything_is_fresh(float64):
    config = settings(pretrained="", schedule="constant")
    wanted = expected(config, dict.fromkeys(start(), (0.1, "constant")))
    for name, values in ours(config).items():
        assert_close(values, wanted[name])


def test_groups_have_their_own_rate_and_schedule_and_frozen_ones_stay(float64):
    config = settings(
        schedule="constant",
        warmup=0.1,
        clip_norm=0.7,
        groups=("head/.*=0.3:cosine", "tr.*=trunk", ".*=frozen"),
    )
    learns = {"head": (0.3, "cosine"), "trunk": (0.02, "constant"), "stem": None}
    found, wanted = ours(config), expected(config, learns)
    for name, values in found.items():
        assert_close(values, wanted[name])
    assert (found["stem"] == GOLDEN["start"]["stem"]).all()


def test_a_frozen_group_has_no_memory():
    config = settings(groups=("head/.*=fresh", ".*=frozen"))
    optimizer = make_optimizer(config.optim, STEPS, learning_rate_groups(config))
    shapes = jax.eval_shape(optimizer.init, start())
    arrays = [leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.shape]
    assert arrays == [(3,)]  # The momentum of the head.


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_trajectories_are_those_of_torch(float64, case):
    """Clipping differs by torch's 1e-6 in the divisor, hence the tolerance there."""
    given, values = GOLDEN["cases"][case].values()
    given = dict(given)
    frozen = given.pop("frozen")
    rules = (*(f"{name}/.*=frozen" for name in frozen), "head/.*=fresh", ".*=trunk")
    given["milestones"] = tuple(given["milestones"])
    found = ours(settings(groups=rules, **given))
    tolerance = 1e-6 if given["clip_norm"] else 1e-7
    for name, rows in values.items():
        assert_close(found[name], rows, atol=tolerance, err_msg=name)


@functools.cache
def params_of(name="tiny"):
    config = demo.get_config()
    config.model.name = name
    model = models.build(config.model, 2)
    images = jnp.zeros((1, 32, 32, 3))
    key = jax.random.key(0)
    return jax.eval_shape(lambda: model.init(key, images, "eval"))["params"]


def test_the_default_divides_as_pretrained_weights_do():
    params = params_of("resnet18")
    labels = learning_rate_groups(settings())(params)
    for path, group in jax.tree_util.tree_leaves_with_path(labels):
        fresh = models.fresh_modules("resnet18") & {key.key for key in path}
        assert (group == "trunk") == (not fresh), path
    assert set(jax.tree.leaves(learning_rate_groups(settings(""))(params))) == {"fresh"}


def test_a_linear_probe_trains_the_head_alone():
    config = demo.get_config("linear_probe")
    check_groups(config, params_of())
    groups = learning_rate_groups(config)(params_of())
    assert set(jax.tree.leaves(groups.pop("head"))) == {"fresh"}
    assert set(jax.tree.leaves(groups)) == {"frozen"}


@pytest.mark.parametrize(
    "rules,message",
    [
        (("stage9/.*=frozen", ".*=fresh"), "'stage9/.*' matches no parameter; known: "),
        ((".*=fresh", "head/.*=frozen"), "'head/.*' has no parameter left to match"),
        (("head/.*=fresh",), "no rule for the parameter .*/.*; add one"),
        ((".*=frozen",), "freezes every parameter"),
        (("head/.*",), "the rule 'head/.*'; expected EXPRESSION=GROUP"),
        (("head/.*=0.1:step",), "the rule 'head/.*=0.1:step'; expected .*multistep"),
        (("head/.*=-0.1",), "the rule 'head/.*=-0.1'; expected"),
        (("head/(=fresh",), "'head/\\(' is no regular expression"),
    ],
)
def test_rules_that_divide_nothing_are_explained(rules, message):
    with pytest.raises(ValueError, match=message) as error:
        check_groups(settings(groups=rules), params_of())
    assert "\n" not in str(error.value) and "config.optim.groups" in str(error.value)


def test_an_unmatched_expression_names_known_parameters():
    with pytest.raises(ValueError, match="head/bias, .* in all"):
        check_groups(settings(groups=("adapter/.*=fresh",)), params_of())
