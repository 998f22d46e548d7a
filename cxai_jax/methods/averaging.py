"""Any method with the moving average of its weights scored instead of the last ones."""

import jax
import jax.numpy as jnp
from flax import struct

from cxai_jax.methods.method import Method
from cxai_jax.types import Array, PyTree


@struct.dataclass
class AveragedState:
    """The state of a method, and the average of the variables that it scores."""

    inner: PyTree  # The method's own state.
    average: PyTree

    @property
    def step(self) -> Array:
        return self.inner.step


def averaged(method: Method, decay: float) -> Method:
    """`method` scored by a = d a + (1 - d) v after each step, a = v at the start.

    d = min(decay, (1 + t) / (10 + t)) at step t = 1, 2, ..., so that a short run is not
    scored by its first weights (as TensorFlow's ExponentialMovingAverage with
    num_updates). v is everything that is scored, running statistics too.
    """

    def init(key, variables):
        inner = method.init(key, variables)
        copy = jax.tree.map(jnp.array, method.scored(inner))  # Donated once each.
        return AveragedState(inner, copy)

    def step(state, batches, key):
        inner, metrics = method.step(state.inner, batches, key)
        count = inner.step.astype(jnp.float32)
        kept = jnp.minimum(decay, (1 + count) / (10 + count))
        average = jax.tree.map(
            lambda a, v: v + (kept * (a - v)).astype(v.dtype),
            state.average,
            method.scored(inner),
        )
        return AveragedState(inner, average), metrics

    return method._replace(init=init, step=step, scored=lambda state: state.average)
