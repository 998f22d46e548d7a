"""Target batch-norm statistics (AdaBN, Li et al. 2016): guided training on the source.

Beside it the network of every step sees a batch of the target in train mode, without
labels and without gradient, and keeps running statistics of that. The network that is
scored has the weights of the source and the statistics of the target.
"""

import functools

import jax
import optax
from flax import struct

from cxai_jax.methods import guided, parts
from cxai_jax.methods.method import Method, Network, TrainState
from cxai_jax.types import Array, Batch, PyTree


@struct.dataclass
class TwoStatistics:
    """The state of guided training, and the running statistics of the target."""

    source: TrainState
    target: PyTree

    @property
    def step(self) -> Array:
        return self.source.step


def make(
    config,
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    total_steps: int,
    groups: int = 1,
) -> Method:
    """The method of a config; arguments as in `methods.build`."""
    inner = guided.make(
        config, network, optimizer, total_steps=total_steps, groups=groups
    )
    return Method(
        streams=("source", "target"),
        init=lambda key, variables: TwoStatistics(
            inner.init(key, variables), variables.get("batch_stats", {})
        ),
        step=functools.partial(train_step, config, network, inner),
        scored=lambda state: {
            "params": state.source.params,
            "batch_stats": state.target,
        },
    )


def train_step(
    config,
    network: Network,
    inner: Method,
    state: TwoStatistics,
    batches: dict[str, Batch],
    key: Array,
) -> tuple[TwoStatistics, dict]:
    """A guided step on the source, then one look at the target."""
    source, metrics = inner.step(state.source, {"labelled": batches["source"]}, key)
    # Another branch of the key than guided takes.
    key = jax.random.fold_in(jax.random.fold_in(key, state.step), 1)
    images = parts.prepare(key, batches["target"], config, network.scale)
    _, target = parts.forward(
        network.model, source.params, state.target, images[..., :3], "train"
    )
    return TwoStatistics(source, jax.lax.stop_gradient(target)), metrics
