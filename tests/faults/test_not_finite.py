"""NaN injected into one step: its images are named, or it is skipped and counted."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import training_process

from cxai_jax.training import loop
from cxai_jax.training import run as runs

BAD = 5  # Counted from 0.


@pytest.fixture
def poisoned(monkeypatch):
    make = runs.make_method

    def make_method(*arguments, **options):
        method = make(*arguments, **options)

        def step(state, batches, key):
            new, metrics = method.step(state, batches, key)
            bad = jnp.where(state.step == BAD, jnp.nan, 0.0)
            params = {n: v for n, v in new.params.items()}
            params["head"] = {n: v + bad for n, v in params["head"].items()}
            return new.replace(params=params), metrics | {"loss": metrics["loss"] + bad}

        return method._replace(step=step)

    monkeypatch.setattr(runs, "make_method", make_method)


def small(**changes):
    config = training_process.small()
    config.train.epochs = 3.0
    config.tta.k = 0
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 4])
def test_it_stops_and_names_the_images(poisoned, tmp_path, every):
    config = small(**{"train.log_every_steps": every})
    with pytest.raises(FloatingPointError) as error:
        loop.train(config, tmp_path)
    assert f"the loss is nan at step {BAD + 1}, of the images " in str(error.value)
    assert str(error.value).count(".png") + str(error.value).count("phantom") >= 1
    steps = {int(p.name) for p in (tmp_path / "checkpoints/latest").glob("[0-9]*")}
    assert max(steps) == BAD  # The last good one.


@pytest.mark.slow
def test_it_is_skipped_and_counted(poisoned, tmp_path):
    results = loop.train(small(**{"train.on_nan": "skip"}), tmp_path)
    assert np.isfinite(results["metrics"]["all"]["accuracy"])
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert sum(row.get("skipped", 0) for row in rows) == 1
