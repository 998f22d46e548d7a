"""A second training stays out; locks of processes that are gone do not count."""

import json
import os
import subprocess
import sys
import time

import pytest

from cxai_jax.training import lock


def write(tmp_path, age=0.0, **changes):
    path = tmp_path / lock.FILE
    path.write_text(json.dumps(lock._this_process() | changes))
    os.utime(path, (time.time() - age,) * 2)


def taken(tmp_path):
    with lock.training(tmp_path):
        return True


def test_a_second_training_is_refused_and_the_lock_ends_with_the_first(tmp_path):
    with lock.training(tmp_path):
        assert f"process {os.getpid()} on " in lock.holder(tmp_path)
        before = (tmp_path / lock.FILE).read_bytes()
        with pytest.raises(ValueError, match="is in use by process .* another --work"):
            taken(tmp_path)
        assert (tmp_path / lock.FILE).read_bytes() == before
    assert lock.holder(tmp_path) == "" and not (tmp_path / lock.FILE).exists()
    assert taken(tmp_path)


def test_it_ends_with_an_error_too(tmp_path):
    with pytest.raises(RuntimeError), lock.training(tmp_path):
        raise RuntimeError
    assert taken(tmp_path)


def test_a_killed_process_leaves_a_stale_lock(tmp_path):
    program = (
        "import sys, time; from pathlib import Path\n"
        "from cxai_jax.training import lock\n"
        "with lock.training(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on"):
            taken(tmp_path)
        process.kill()
        process.wait()
    assert (tmp_path / lock.FILE).exists() and lock.holder(tmp_path) == ""
    assert taken(tmp_path)


def test_a_number_that_another_process_has_now_is_told_apart(tmp_path):
    write(tmp_path, began="an earlier boot 17")
    assert taken(tmp_path)


def test_another_host_counts_until_it_is_silent(tmp_path):
    write(tmp_path, age=lock.STALE_S - 60, place="there 1", host="there", pid=1)
    with pytest.raises(ValueError, match="process 1 on there, .* last seen 540 s ago"):
        taken(tmp_path)
    write(tmp_path, age=lock.STALE_S + 60, place="there 1", host="there", pid=1)
    assert taken(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"place": 3}', "\x00"])
def test_a_damaged_lock_counts_until_it_is_old(tmp_path, text):
    path = tmp_path / lock.FILE
    path.write_text(text)
    with pytest.raises(ValueError, match="a training whose lock is damaged"):
        taken(tmp_path)
    os.utime(path, (time.time() - lock.STALE_S - 1,) * 2)
    assert taken(tmp_path)


def test_a_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with lock.training(tmp_path):
        os.utime(tmp_path / lock.FILE, (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / lock.FILE).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_who_does_not_write_takes_no_lock(tmp_path):
    with lock.training(tmp_path / "new", active=False):
        assert not (tmp_path / "new").exists()


def test_half_a_lock_is_not_left_behind(tmp_path):
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from cxai_jax.training import lock\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "try:\n"
        "    with lock.training(Path(sys.argv[1])): pass\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "the limit of a file's size is reached" in done.stdout, done.stderr
    assert taken(tmp_path)
