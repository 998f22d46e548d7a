"""What a step changes, and how steps run in one dispatch: the same for every method."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from cxai_jax.types import Array, PyTree


@struct.dataclass
class TrainState:
    """All that a step changes, and all that a checkpoint holds."""

    step: Array  # int32 scalar, optimiser steps taken
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


def create_state(
    variables: PyTree, optimizer: optax.GradientTransformation
) -> TrainState:
    """A fresh state from a model's variables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
    )


def resident(train_step: Callable) -> Callable:
    """Runs S steps in one dispatch on a split that lives on the device.

    Returns:
      `steps(state, split, rows, key) -> (state, metrics)` where `split` is a whole
      data split as a Batch [N, ...], `rows` int32 [S, B], and each metric is [S].
    """

    def steps(state, split, rows, key):
        def body(state, rows):
            return train_step(state, jax.tree.map(lambda x: x[rows], split), key)

        if rows.shape[0] == 1:  # A loop of one would only hide fusion from XLA.
            state, metrics = body(state, rows[0])
            return state, jax.tree.map(lambda m: m[None], metrics)
        return jax.lax.scan(body, state, rows)

    return steps
