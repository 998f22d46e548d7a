"""Where a run's numbers go."""

import json
import sys
import types

import numpy as np
import pytest

from cxai_jax.writer import Writer, write_json


@pytest.fixture
def no_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def test_json_is_json_whatever_the_numbers(tmp_path, no_tensorboard):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    values = {
        "nan": float("nan"),
        "inf": np.float32(np.inf),
        "array": np.array([1.0, -np.inf]),
        "pair": (1, np.int64(2)),
        3: {"deep": [np.nan, True, None, "NaN"]},
        "path": tmp_path,
    }
    write_json(tmp_path / "x.json", values)
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert found == {
        "nan": None,
        "inf": None,
        "array": [1.0, None],
        "pair": [1, 2],
        "3": {"deep": [None, True, None, "NaN"]},
        "path": str(tmp_path),
    }
    Writer(tmp_path, start_step=0).scalars(1, {"loss": np.nan, "cpe": 2})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "loss": None,
        "cpe": 2.0,
    }


def test_pictures_are_made_only_where_somebody_shows_them(tmp_path, no_tensorboard):
    writer = Writer(tmp_path, start_step=0)
    assert not writer.shows_images
    writer.image(0, "nothing", np.zeros((2, 2, 3), np.uint8))
    writer.close()


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_gets_scalars_images_and_the_config(
    tmp_path, no_tensorboard, monkeypatch
):
    run, started = FakeRun(), []
    fake = types.SimpleNamespace(
        init=lambda **options: started.append(options) or run,
        Image=lambda pixels: ("image", pixels.shape),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "chests")
    (tmp_path / "config.json").write_text('{"seed": 3}')
    for _ in range(2):
        writer = Writer(tmp_path, start_step=0)
        assert writer.shows_images
        writer.scalars(1, {"loss": np.float32(0.5)})
        writer.image(1, "maps", np.zeros((2, 3, 3), np.uint8))
        writer.close()
    assert started[0]["project"] == "chests" and started[0]["config"] == {"seed": 3}
    # A restart in the same workdir continues the same run.
    assert started[0]["id"] == started[1]["id"] and started[0]["resume"] == "allow"
    assert run.logged[:2] == [(1, {"loss": 0.5}), (1, {"maps": ("image", (2, 3, 3))})]
    assert run.finished
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5


def test_wandb_that_is_asked_for_but_missing_is_an_error(
    tmp_path, no_tensorboard, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_PROJECT", "chests")
    with pytest.raises(ImportError, match="WANDB_PROJECT.*pip install wandb"):
        Writer(tmp_path, start_step=0)
