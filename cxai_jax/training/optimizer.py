"""SGD with Nesterov momentum, two learning-rate groups and the published schedules.

Equals torch.optim.SGD(momentum, nesterov=True, weight_decay): coupled L2 on every
parameter, one momentum buffer, the learning rate applied last (method 4.2, A20).
"""

from collections.abc import Callable

import optax

from cxai_jax.types import PyTree


def make_schedule(config, peak: float, total_steps: int) -> optax.Schedule:
    """Learning rate by step.

    Args:
      config: `config.optim`; its durations are shares of `total_steps`.
      peak: learning rate before any decay.
      total_steps: optimiser steps of the whole run.

    Raises:
      ValueError: for an unknown `config.optim.schedule`.
    """
    warmup = round(config.warmup * total_steps)
    if config.schedule == "multistep":
        steps = {
            round(share * total_steps): config.gamma for share in config.milestones
        }
        main = optax.piecewise_constant_schedule(peak, steps)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup))
    elif config.schedule == "constant":
        main = optax.constant_schedule(peak)
    else:
        raise ValueError(
            f"config.optim.schedule is {config.schedule!r}; known: multistep, cosine, "
            "constant"
        )
    if not warmup:
        return main
    if config.schedule == "cosine":
        ramp = optax.linear_schedule(0.0, peak, warmup)
        return optax.join_schedules([ramp, main], [warmup])
    return lambda step: main(step) * optax.linear_schedule(0.0, 1.0, warmup)(step)


def make_optimizer(
    config, total_steps: int, label_params: Callable[[PyTree], PyTree]
) -> optax.GradientTransformation:
    """The optimiser of a run.

    Args:
      config: `config.optim`.
      total_steps: optimiser steps of the whole run.
      label_params: parameters -> tree of "trunk" | "fresh", the learning-rate group
        of each leaf.
    """
    rates = {"trunk": config.lr_trunk, "fresh": config.lr_fresh}
    groups = {
        name: optax.scale_by_learning_rate(make_schedule(config, rate, total_steps))
        for name, rate in rates.items()
    }
    clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip if config.clip_norm else optax.identity(),
        optax.add_decayed_weights(config.weight_decay),
        optax.trace(config.momentum, nesterov=True),
        optax.multi_transform(groups, label_params),
    )
