"""Steps that are not finite: left out in the graph, or told with their images."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from cxai_jax.training import finite


@struct.dataclass
class State:
    step: jax.Array
    weight: jax.Array


def fresh():
    return State(jnp.zeros((), jnp.int32), jnp.float32(1.0))


def step(state, batches, key):
    """Adds the batch; its loss and its new weight may each be wrong."""
    weight = state.weight + batches["weight"]
    new = State(step=state.step + 1, weight=weight)
    return new, {"loss": batches["loss"], "accuracy": batches["loss"]}


@pytest.mark.parametrize(
    ("loss", "weight", "skipped"),
    [
        (0.5, 2.0, 0),
        (np.nan, 2.0, 1),
        (np.inf, 2.0, 1),
        (0.5, np.nan, 1),
        (0.5, -np.inf, 1),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(loss, weight, skipped):
    batches = {"loss": jnp.float32(loss), "weight": jnp.float32(weight)}
    new, metrics = jax.jit(finite.skip_not_finite(step))(fresh(), batches, None)
    assert metrics["skipped"] == skipped
    assert new.weight == (1.0 if skipped else 3.0)
    assert new.step == 1  # The next batch is another one.


@struct.dataclass
class Around:
    """A method around a method: its step is that of the inner state."""

    inner: State
    average: jax.Array

    @property
    def step(self):
        return self.inner.step


def test_a_step_that_lies_deeper_in_the_state_counts_on_as_well():
    def around(state, batches, key):
        inner, metrics = step(state.inner, batches, key)
        return Around(inner, inner.weight), metrics

    batches = {"loss": jnp.float32(np.nan), "weight": jnp.float32(2.0)}
    start = Around(fresh(), jnp.float32(1.0))
    new, _ = jax.jit(finite.skip_not_finite(around))(start, batches, None)
    assert (new.step, new.inner.weight, new.average) == (1, 1.0, 1.0)


def plan(*names, size=2):
    number = len(names) // size
    rows = np.arange(number * size).reshape(number, size)
    records = SimpleNamespace(names=np.array(names))
    stream = SimpleNamespace(records=records, rows=rows)
    return SimpleNamespace(streams={"labelled": stream})


def test_the_first_step_and_its_images_are_named():
    names = [f"{i}.png" for i in range(8)]
    pending = [{"loss": np.array([0.1, 0.2])}, {"loss": np.array([np.nan, np.inf])}]
    with pytest.raises(FloatingPointError) as error:
        finite.check(plan(*names), pending, 4)
    assert str(error.value) == (
        "the loss is nan at step 3, of the images 4.png, 5.png; the last checkpoint is "
        f"kept. {finite.ADVICE}"
    )
    finite.check(plan(*names), pending[:1], 2)


def test_a_large_batch_is_named_in_part():
    names = [f"{i}.png" for i in range(20)]
    with pytest.raises(FloatingPointError, match="0.png, .*7.png and 2 more; the last"):
        finite.check(plan(*names, size=10), [{"loss": np.array([np.nan])}], 1)


def test_skipped_steps_stop_a_run_only_where_all_are():
    def calls(*skipped):
        loss = np.where(skipped, np.nan, 0.5)
        return [{"loss": loss, "skipped": np.array(skipped, np.float32)}]

    finite.check(plan(), calls(1), 1)  # One of a log at every step.
    finite.check(plan(), calls(0, *[1] * 20), 21)
    with pytest.raises(FloatingPointError, match="all 10 steps up to 17 were skipped"):
        finite.check(plan(), calls(*[1] * 10), 17)


def test_means_leave_skipped_steps_out_and_count_them():
    pending = [
        {"loss": np.array([1.0, np.nan]), "skipped": np.array([0.0, 1.0])},
        {"loss": np.array([np.inf, 3.0]), "skipped": np.array([1.0, 0.0])},
    ]
    assert finite.means(pending) == {"loss": 2.0, "skipped": 2.0}
    none = [{"loss": np.array([np.nan]), "skipped": np.array([1.0])}]
    assert finite.means(none) == {"skipped": 1.0}
    assert finite.means([{"loss": np.array([1.0, 3.0])}]) == {"loss": 2.0}
