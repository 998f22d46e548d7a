"""The train steps: one file per method that needs a step of its own; `METHODS`.

Most rows of a table differ in config fields and share the step of guided.py. Imports
voting, objectives, data, maps and models; knows neither the loop nor files.
"""

from collections.abc import Callable

import optax

from cxai_jax.methods import (
    averaging,
    calibrator,
    cycada,
    dann,
    dranet,
    guided,
    ms_net,
    target_statistics,
)
from cxai_jax.methods.method import Method, Network

# Name -> make(config, network, optimizer, *, total_steps, groups) -> Method.
METHODS: dict[str, Callable[..., Method]] = {
    "guided": guided.make,
    "target_statistics": target_statistics.make,
    "dann": dann.make,
    "cycada": cycada.make,
    "calibrator": calibrator.make,
    "dranet": dranet.make,
    "ms_net": ms_net.make,
}


def build(
    config,
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    total_steps: int,
    groups: int = 1,
) -> Method:
    """The method that `config.method` names.

    Args:
      config: the whole run's config.
      network: the network that is scored.
      optimizer: of `config.optim`, for that network; others bring their own.
      total_steps: optimiser steps of the run, for weights that grow.
      groups: mixing partners are drawn inside `groups` equal runs of the batch.

    Raises:
      ValueError: unknown name, or a choice that the method does not know.
    """
    if config.method not in METHODS:
        raise ValueError(
            f"config.method is {config.method!r}; known: {', '.join(METHODS)}"
        )
    make = METHODS[config.method]
    method = make(config, network, optimizer, total_steps=total_steps, groups=groups)
    if config.train.ema:
        method = averaging.averaged(method, config.train.ema)
    return method
