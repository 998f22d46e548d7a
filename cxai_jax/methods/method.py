"""What the loop knows of a method, and how steps run in one dispatch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from cxai_jax.data.augment import Scale
from cxai_jax.types import Array, PyTree


class Network(NamedTuple):
    """A built model with its initial variables and input normalisation."""

    model: nn.Module
    variables: PyTree
    scale: Scale
    pretrained: dict = {}  # What was loaded; {} when training starts from scratch.
    num_sites: int = 0  # S, sites of the data.


class Method(NamedTuple):
    """What the loop needs to know; built by `METHODS[config.method]`.

    The state is a pytree of the method's own with an int32 scalar `step`: however many
    networks and optimisers a method has, they are in it, and a checkpoint is all of it.
    """

    streams: tuple[str, ...]  # Names of the batches a step takes, keys of STREAMS.
    init: Callable  # (key, variables of the scored network) -> state
    # (state, {stream: Batch}, key) -> (state, metrics): pure, one XLA graph. Metrics
    # are float32 scalars; one of them is `loss`.
    step: Callable
    scored: Callable  # state -> variables of the network that is scored and explained


# Stream -> (config field that names its splits, whether its labels may be read).
STREAMS = {
    "labelled": ("config.data.fit", True),
    "source": ("config.data.fit", True),
    "target": ("config.data.target", False),
    "other": ("config.data.other", False),
}


@struct.dataclass
class TrainState:
    """All that a step of one network changes, and all that its checkpoint holds."""

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


def variables_of(state: TrainState) -> PyTree:
    """The variables that a model's `apply` takes."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def in_one_call(step: Callable) -> Callable:
    """Runs S steps in one dispatch; a stream is looked up on the device or fed.

    Returns:
      `steps(state, splits, rows, fed, key) -> (state, metrics)` where `splits` are
      whole data splits {stream: Batch [N, ...]}, `rows` int32 {stream: [S, B]} their
      row numbers, `fed` the batches {stream: Batch [B, ...]} of all other streams,
      which allow S = 1 alone, and each metric is [S].
    """

    def steps(state, splits, rows, fed, key):
        def body(state, rows):
            found = {
                name: jax.tree.map(lambda x, name=name: x[rows[name]], split)
                for name, split in splits.items()
            }
            return step(state, found | fed, key)

        lengths = {len(block) for block in rows.values()} or {1}
        if lengths == {1}:  # A loop of one would only hide fusion from XLA.
            first = {name: block[0] for name, block in rows.items()}
            state, metrics = body(state, first)
            return state, jax.tree.map(lambda m: m[None], metrics)
        return jax.lax.scan(body, state, rows)

    return steps
