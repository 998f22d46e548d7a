"""Readers change nothing; a training moves what is damaged aside; errors say why."""

import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from cxai_jax.training import lock
from cxai_jax.training.checkpoint import Checkpoints

STATE = {"params": {"head": np.arange(6, dtype=np.float32).reshape(3, 2)}}


def save(workdir, *steps, keep=3):
    checkpoints = Checkpoints(workdir, keep=keep)
    for step in steps:
        state = {"params": {"head": STATE["params"]["head"] + step}}
        checkpoints.save("latest", step, state, {"curve": [], "data": {"name": "x"}})
    checkpoints.wait()
    checkpoints.close()


def damage(workdir, step):
    """Flips one byte of every array file of a step."""
    for path in (workdir / f"checkpoints/latest/{step}/state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_readers_fall_back_and_change_nothing(tmp_path, caplog):
    save(tmp_path, 1, 2)
    damage(tmp_path, 2)
    begun = tmp_path / "checkpoints/latest/3.orbax-checkpoint-tmp"  # Being written.
    shutil.copytree(tmp_path / "checkpoints/latest/1", begun)
    before = contents(tmp_path)
    reader = Checkpoints(tmp_path)
    state, step, about = reader.restore("latest", STATE)
    assert (step, about["data"]) == (1, {"name": "x"})
    np.testing.assert_array_equal(state["params"]["head"], STATE["params"]["head"] + 1)
    assert reader.restore("best", STATE) is None
    reader.close()
    assert contents(tmp_path) == before
    assert "latest step 2" in caplog.text and "moved" not in caplog.text


def test_readers_create_nothing(tmp_path):
    reader = Checkpoints(tmp_path / "nowhere")
    assert reader.restore("latest", STATE) is None and reader.about("latest") == {}
    reader.close()
    assert not any(tmp_path.iterdir())


def test_a_training_moves_a_damaged_step_aside(tmp_path):
    for place in ("latest-2", "latest-2-1"):  # Twice the same step.
        save(tmp_path, 1, 2)
        damage(tmp_path, 2)
        step = tmp_path / "checkpoints/latest/2"
        damaged = contents(step)
        writer = Checkpoints(tmp_path, keep=3)
        assert writer.restore("latest", STATE)[1] == 1
        assert not step.exists()
        assert contents(tmp_path / "checkpoints/damaged" / place) == damaged
        writer.save("latest", 2, STATE, {})
        assert writer.restore("latest", STATE)[1] == 2
        writer.close()
        shutil.rmtree(step)


@pytest.mark.parametrize("keep", [None, 3])
def test_nothing_is_changed_where_nothing_can_be_restored(tmp_path, keep):
    save(tmp_path, 1, 2)
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    before = contents(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=keep)
    with pytest.raises(ValueError, match="step 2: .*; step 1: .*nothing was changed"):
        checkpoints.restore("latest", STATE)
    assert contents(tmp_path) == before
    if keep is None:
        with lock.training(tmp_path), pytest.raises(ValueError, match="try again in"):
            checkpoints.restore("latest", STATE)
    checkpoints.close()


@pytest.mark.parametrize("keep", [None, 3])
def test_another_network_is_not_damage(tmp_path, keep):
    save(tmp_path, 1, 2)
    before = contents(tmp_path)
    checkpoints = Checkpoints(tmp_path, keep=keep)
    other = {"params": {"head": np.zeros((3, 5), np.float32)}}
    with pytest.raises(ValueError) as error:
        checkpoints.restore("latest", other)
    assert str(error.value) == (
        f"{tmp_path}/checkpoints/latest/2 is of another network: params.head is "
        "float32 [3, 2] there and float32 [3, 5] here (1 of its arrays differ); give "
        "config.model.* and the classes of the data as they were, see config.json"
    )
    more = {"params": STATE["params"] | {"neck": np.zeros(2, np.float32)}}
    with pytest.raises(ValueError, match="params.neck is absent there and float32"):
        checkpoints.restore("latest", more)
    checkpoints.close()
    assert contents(tmp_path) == before


def test_changed_values_beside_a_state_are_damage(tmp_path):
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoints/latest/2/about/metadata"
    path.write_text(path.read_text().replace('"x"', '"y"'))
    reader = Checkpoints(tmp_path)
    assert reader.restore("latest", STATE)[1] == 1
    assert reader.about("latest")["data"] == {"name": "x"}
    reader.close()


def test_a_reader_looks_again_where_a_training_removed_what_it_listed(
    tmp_path, monkeypatch
):
    save(tmp_path, 1)
    reader = Checkpoints(tmp_path)
    once = []

    def read(kind, step, template, read=reader._read):
        if not once:  # Between listing and reading, the training saves step 2.
            once.append(step)
            save(tmp_path, 2, keep=1)
        return read(kind, step, template)

    monkeypatch.setattr(reader, "_read", read)
    assert reader.restore("latest", STATE)[1] == 2
    assert once == [1]
    reader.close()


def test_a_reader_lists_again_where_a_training_removes_steps(tmp_path, monkeypatch):
    save(tmp_path, 1)
    times = []

    def manager(*arguments, made=ocp.CheckpointManager, **options):
        times.append(arguments[0].name)
        if times.count("latest") == 1:  # A step that was listed is gone.
            raise FileNotFoundError("latest/1")
        return made(*arguments, **options)

    monkeypatch.setattr(ocp, "CheckpointManager", manager)
    reader = Checkpoints(tmp_path)
    assert reader.restore("latest", STATE)[1] == 1
    assert times == ["latest", "latest", "best"]
    reader.close()
