"""Every file of a checkpoint deleted, truncated, flipped: never accepted wrongly."""

import shutil

import jax
import numpy as np
import pytest
from untrained_run import make_run

from cxai_jax.training import run as runs
from cxai_jax.training.checkpoint import Checkpoints, checksum

DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "flipped": lambda path: path.write_bytes(flip(path.read_bytes())),
}


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Workdir with steps 1 and 2 that differ, template, checksums by step."""
    workdir = tmp_path_factory.mktemp("run")
    config, _ = make_run(workdir)
    opened = runs.open_run(config, workdir)
    method = runs.make_method(config, opened.network, total_steps=1)
    template = runs.initial_state(opened, method)
    writer = Checkpoints(workdir, keep=2)
    state, _, about = writer.restore("latest", template)
    newer = jax.tree.map(lambda x: np.asarray(x) + np.ones((), x.dtype), state)
    writer.save("latest", 2, newer, about)
    writer.wait()
    writer.close()
    return workdir, template, {1: checksum(state), 2: checksum(newer)}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damage_is_accepted_and_readers_leave_it(run, tmp_path, damage):
    workdir, template, known = run
    newest = workdir / "checkpoints/latest/2"
    files = [p.relative_to(workdir) for p in newest.rglob("*") if p.is_file()]
    taken = {1: 0, 2: 0}
    for number, file in enumerate(sorted(files)):
        if damage in ("truncated", "flipped") and not (workdir / file).stat().st_size:
            continue
        copy = tmp_path / str(number)
        shutil.copytree(workdir / "checkpoints", copy / "checkpoints")
        DAMAGES[damage](copy / file)
        before = contents(copy)
        reader = Checkpoints(copy)
        state, step, _ = reader.restore("latest", template)
        reader.close()
        assert checksum(state) == known[step], file
        assert contents(copy) == before, file
        writer = Checkpoints(copy, keep=2)
        state, again, about = writer.restore("latest", template)
        assert (again, checksum(state)) == (step, known[step])
        if step == 1:  # Moved aside, and the run goes on.
            moved = copy / "checkpoints/damaged/latest-2"
            kept = [p for p in contents(moved).values()]
            assert len(kept) == len(files) - (damage == "deleted")
            writer.save("latest", 2, state, about)
            writer.wait()
        writer.close()
        taken[step] += 1
    print(f"{damage}: {taken[1]} fell back, {taken[2]} were harmless")
    assert taken[1] >= 3
