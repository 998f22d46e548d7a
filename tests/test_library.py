"""The library page: its code runs as printed, and the explanation steers weights."""

import re

import jax
import numpy as np
import pytest
from conftest import REPO

PAGE = REPO / "experiments" / "library.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def names():
    """What the blocks of the page define, run in their order."""
    found = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"library.md, block {number}", "exec"), found)
    return found


def test_the_loss_is_short():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 30, len(lines)


@pytest.mark.parametrize(
    "params,apply,value,gradient",
    [
        ("params", "net.apply", "value", "gradient"),
        ("nnx_params", "nnx_apply", "nnx_value", "nnx_gradient"),
    ],
)
def test_gradients_flow_through_the_explanation(names, params, apply, value, gradient):
    assert np.isfinite(names[value])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(names[gradient]))
    arguments = (names["images"], names["labels"], jax.random.key(2))
    apply = eval(apply, names)
    plain = jax.grad(names["loss"])(names[params], apply, *arguments, weight=0.0)
    moved = jax.tree.map(lambda a, b: abs(a - b).max(), names[gradient], plain)
    assert max(map(float, jax.tree.leaves(moved))) > 1e-6
