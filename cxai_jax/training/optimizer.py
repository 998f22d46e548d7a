"""SGD with Nesterov momentum, Adam, AdamW; parameter groups, published schedules.

SGD equals torch.optim.SGD(momentum, nesterov=True, weight_decay): coupled L2 on every
parameter, one momentum buffer, the learning rate applied last (method 4.2, A20).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import optax
from flax.traverse_util import flatten_dict

from cxai_jax import models
from cxai_jax.types import PyTree

# Name in config.optim.name -> what gradient and weight decay go through, in order,
# before the learning rate: Adam's decay is coupled as in torch, AdamW's is not.
OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda config: (decay(config), optax.trace(config.momentum, nesterov=True)),
    "adam": lambda config: (decay(config), optax.scale_by_adam(config.momentum)),
    "adamw": lambda config: (optax.scale_by_adam(config.momentum), decay(config)),
}
SCHEDULES = ("multistep", "cosine", "constant", "inverse")
FROZEN = "frozen"  # The group that no step changes.
RULE = re.compile(
    r"(?P<expression>.+)=(?P<group>trunk|fresh|frozen"
    rf"|\d*\.?\d+(?:e[+-]?\d+)?(?::(?:{'|'.join(SCHEDULES)}))?)"
)


class Group(NamedTuple):
    """How the parameters of a group learn."""

    rate: float  # Peak learning rate.
    schedule: str  # One of SCHEDULES.


def make_schedule(
    config, peak: float, total_steps: int, name: str | None = None
) -> optax.Schedule:
    """Learning rate by step.

    Args:
      config: `config.optim`; its durations are shares of `total_steps`.
      peak: learning rate before any decay.
      total_steps: optimiser steps of the whole run.
      name: one of SCHEDULES; None is `config.optim.schedule`.

    Raises:
      ValueError: for an unknown schedule.
    """
    name = name or config.schedule
    warmup = round(config.warmup * total_steps)
    if name == "multistep":
        steps = {
            round(share * total_steps): config.gamma for share in config.milestones
        }
        main = optax.piecewise_constant_schedule(peak, steps)
    elif name == "cosine":
        main = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup))
    elif name == "constant":
        main = optax.constant_schedule(peak)
    elif name == "inverse":
        main = inverse_schedule(peak, total_steps)
    else:
        raise ValueError(
            f"config.optim.schedule is {name!r}; known: {', '.join(SCHEDULES)}"
        )
    if not warmup:
        return main
    if name == "cosine":
        ramp = optax.linear_schedule(0.0, peak, warmup)
        return optax.join_schedules([ramp, main], [warmup])
    return lambda step: main(step) * optax.linear_schedule(0.0, 1.0, warmup)(step)


def inverse_schedule(peak: float, total_steps: int) -> optax.Schedule:
    """peak / (1 + 10 p)^0.75 at share p of the steps (Ganin et al. 2016, 5.2.2)."""
    return lambda step: peak / (1 + 10 * step / total_steps) ** 0.75


def parse_groups(rules: Iterable[str]) -> list[tuple[re.Pattern, str]]:
    """`config.optim.groups` as (expression, name of the group), in order.

    A rule is EXPRESSION=GROUP; the group is trunk, fresh, frozen, or a group of its own
    named RATE or RATE:SCHEDULE, such as 0.003:cosine.

    Raises:
      ValueError: for a rule of another form.
    """
    parsed = []
    for rule in rules:
        found = RULE.fullmatch(rule)
        if not found:
            raise ValueError(
                f"config.optim.groups has the rule {rule!r}; expected EXPRESSION=GROUP "
                "with the group trunk, fresh, frozen, RATE or RATE:SCHEDULE "
                f"({', '.join(SCHEDULES)}), such as 'stage4/.*=0.003:cosine'"
            )
        expression, group = found["expression"], found["group"]
        try:
            parsed.append((re.compile(expression), group))
        except re.error as error:
            raise ValueError(
                f"config.optim.groups: {expression!r} is no regular expression: {error}"
            ) from None
    return parsed


def groups_of(config) -> dict[str, Group]:
    """Name -> how it learns, of every group of `config.optim` but the frozen one."""
    groups = {
        "trunk": Group(config.lr_trunk, config.schedule),
        "fresh": Group(config.lr_fresh, config.schedule),
    }
    for _, name in parse_groups(config.groups):
        if name not in (*groups, FROZEN):
            rate, _, schedule = name.partition(":")
            groups[name] = Group(float(rate), schedule or config.schedule)
    return groups


def default_rules(model_config) -> tuple[str, ...]:
    """What `config.optim.groups=()` stands for: pretrained parameters, all others."""
    if not model_config.pretrained:
        return (".*=fresh",)
    fresh = "|".join(sorted(models.fresh_modules(model_config.name)))
    return (f"(.*/)?({fresh})/.*=fresh", ".*=trunk")


def learning_rate_groups(config) -> Callable[[PyTree], PyTree]:
    """Parameters -> tree of the names of their groups.

    The name of a parameter is its path, "stage4/block0/conv1/kernel"; its group is that
    of the first expression of `config.optim.groups` that matches the whole name.

    Raises (the returned function):
      ValueError: for a parameter that no expression matches.
    """
    rules = parse_groups(config.optim.groups or default_rules(config.model))

    def label(path, _):
        name = parameter_name(path)
        for pattern, group in rules:
            if pattern.fullmatch(name):
                return group
        raise ValueError(
            f"config.optim.groups has no rule for the parameter {name}; add one, such "
            "as '.*=frozen' at the end"
        )

    return lambda params: jax.tree_util.tree_map_with_path(label, params)


def parameter_name(path: Sequence) -> str:
    """The tree keys of a parameter as "stage4/block0/conv1/kernel"."""
    return "/".join(str(getattr(key, "key", key)) for key in path)


def check_groups(config, params: PyTree) -> None:
    """Raises ValueError unless `config.optim.groups` divides these parameters.

    Every rule must be the first to match some parameter, every parameter must be
    matched, and at least one must not be frozen.
    """
    names = ["/".join(path) for path in flatten_dict(params)]
    left = names
    for pattern, _ in parse_groups(config.optim.groups):
        taken = [name for name in left if pattern.fullmatch(name)]
        if not taken:
            why = "has no parameter left to match: an earlier rule takes them"
            if not any(map(pattern.fullmatch, names)):
                why = f"matches no parameter; known: {some_names(names)}"
            raise ValueError(f"config.optim.groups: {pattern.pattern!r} {why}")
        left = [name for name in left if name not in taken]
    groups = set(jax.tree.leaves(learning_rate_groups(config)(params)))
    if groups == {FROZEN}:
        raise ValueError(
            "config.optim.groups freezes every parameter; give one a learning rate, "
            "such as 'head/.*=fresh' before the rule that freezes"
        )


def some_names(names: Sequence[str]) -> str:
    """One parameter of every module at the top, with their number."""
    first = {name.partition("/")[0]: name for name in reversed(sorted(names))}
    return f"{', '.join(sorted(first.values()))} ({len(names)} in all)"


def decay(config) -> optax.GradientTransformation:
    return optax.add_decayed_weights(config.weight_decay)


def make_optimizer(
    config, total_steps: int, label_params: Callable[[PyTree], PyTree]
) -> optax.GradientTransformation:
    """The optimiser of a run.

    Frozen parameters get no update, no weight decay and no momentum, and their gradient
    does not count in the norm that is clipped.

    Args:
      config: `config.optim`.
      total_steps: optimiser steps of the whole run.
      label_params: parameters -> tree of the group of each leaf, as
        `learning_rate_groups` makes it.
    """
    rates = {
        name: optax.scale_by_learning_rate(
            make_schedule(config, group.rate, total_steps, group.schedule)
        )
        for name, group in groups_of(config).items()
    }
    clip = optax.clip_by_global_norm(config.clip_norm)
    learning = optax.chain(
        clip if config.clip_norm else optax.identity(),
        *OPTIMIZERS[config.name](config),
        optax.multi_transform(rates, label_params),
    )
    if not any(group == FROZEN for _, group in parse_groups(config.groups)):
        return learning

    def frozen_or_not(params):
        groups = label_params(params)
        return jax.tree.map(lambda g: g if g == FROZEN else "learning", groups)

    return optax.multi_transform(
        {"learning": learning, FROZEN: optax.set_to_zero()}, frozen_or_not
    )
