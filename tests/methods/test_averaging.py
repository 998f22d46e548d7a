"""The average of a toy method's weights against the recursion in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from cxai_jax.methods.averaging import averaged
from cxai_jax.methods.method import Method

DECAY = 0.5


@struct.dataclass
class Toy:
    step: jax.Array
    values: jax.Array


def toy():
    def step(state, batches, key):
        values = state.values + jnp.sin(state.step.astype(jnp.float32) + jnp.arange(3))
        return Toy(state.step + 1, values), {"loss": values.sum()}

    return Method(
        streams=("labelled",),
        init=lambda key, variables: Toy(jnp.zeros((), jnp.int32), variables),
        step=step,
        scored=lambda state: state.values,
    )


@struct.dataclass
class Nested:
    """A state whose step is another one's, as target_statistics has it."""

    source: Toy

    @property
    def step(self):
        return self.source.step


def test_a_method_whose_step_lies_deeper_is_averaged_too():
    plain = toy()

    def step(state, batches, key):
        source, metrics = plain.step(state.source, batches, key)
        return Nested(source), metrics

    method = averaged(
        plain._replace(
            init=lambda key, variables: Nested(plain.init(key, variables)),
            step=step,
            scored=lambda state: state.source.values,
        ),
        DECAY,
    )
    state, _ = method.step(method.init(None, jnp.arange(3.0)), {}, None)
    assert int(state.step) == 1 and method.scored(state).shape == (3,)


def test_the_average_follows_its_recursion_and_leaves_the_method_alone():
    plain, method = toy(), averaged(toy(), DECAY)
    start = jnp.arange(3.0)
    alone, state = plain.init(None, start), method.init(None, start)
    values = average = np.arange(3.0)
    for t in range(1, 30):
        alone, _ = plain.step(alone, {}, None)
        state, metrics = method.step(state, {}, None)
        values = values + np.sin(t - 1 + np.arange(3))
        kept = min(DECAY, (1 + t) / (10 + t))
        average = kept * average + (1 - kept) * values
        np.testing.assert_allclose(method.scored(state), average, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(state.inner.values, alone.values)
        assert int(state.step) == int(state.inner.step) == t
        assert metrics["loss"] == pytest.approx(float(alone.values.sum()))
