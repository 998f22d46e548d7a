"""Full, limited and read-only disks: one line; the same command finishes."""

import os
import resource
import shutil
import subprocess

import pytest
from training_process import Training, picture, same_end


def limit(size):
    def set_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return set_limit


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of so many kB, or changes the one it mounted."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        again = ",remount" if os.path.ismount(place) else ""
        command = ["mount", "-t", "tmpfs", "-o", options + again, "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [30_000, 3_000, 100])
def test_a_limited_file_size(compiled, reference, size):
    """At 100 bytes nothing, at 3 kB no config, at 30 kB no state can be written."""
    training = Training(compiled, preexec_fn=limit(size))
    assert training.end() == 1, training.output
    training.one_line(
        rf"^error: {compiled}.*: the limit of a file's size is reached: [\d,]+ bytes "
        r"to write; the same command continues once it can be written$"
    )
    Training(compiled).succeed()
    same_end(compiled, reference)


@pytest.mark.slow
@pytest.mark.parametrize("size", [200, 700, 4])
def test_a_full_disk(compiled, reference, small_disk, size):
    """Room for the lock and config, for a checkpoint or two, for nearly all."""
    workdir = small_disk(f"size={size}k") / "run"
    training = Training(workdir, env={"JAX_ENABLE_COMPILATION_CACHE": "false"})
    assert training.end() == 1, training.output
    training.one_line(
        r"^error: .*disk/run.*: the disk is full: [\d,]+ bytes to write, "
    )
    small_disk("size=100m")
    shutil.copytree(compiled / "xla_cache", workdir / "xla_cache", dirs_exist_ok=True)
    Training(workdir).succeed()
    same_end(workdir, reference)


@pytest.mark.slow
def test_a_disk_that_is_read_only(reference, small_disk, tmp_path):
    workdir = small_disk("size=100m") / "run"
    shutil.copytree(reference, workdir)
    place = small_disk("ro")
    for arguments in ([], ["--mode=eval"]):
        training = Training(workdir, *arguments)
        assert training.end() == 1, training.output
        training.one_line(f"^error: {place}.*: the file system is read-only")
    image = tmp_path / "image.png"
    picture(image)
    predict = ["--workdir", workdir, "--images", image, "--out"]
    reading = Training(workdir, *predict, tmp_path / "out", module="cxai_jax.predict")
    assert reading.end() == 0, "reading needs no writing"
    writing = Training(
        tmp_path / "log", *predict, place / "out", module="cxai_jax.predict"
    )
    assert writing.end() == 1
    writing.one_line(f"^error: {place}/out.*: the file system is read-only; --resume")


@pytest.mark.slow
def test_predict_finishes_after_a_full_disk(reference, small_disk, tmp_path):
    images = []
    for number in range(12):
        images.append(tmp_path / f"{number}.png")
        picture(images[-1], number)
    out = small_disk("size=60k") / "out"
    arguments = ["--workdir", reference, "--out", out, "--images", *images]
    first = Training(tmp_path / "first", *arguments, module="cxai_jax.predict")
    assert first.end() == 1, first.output
    first.one_line(f"^error: {out}.*: the disk is full.*; --resume continues$")
    small_disk("size=100m")
    arguments.insert(0, "--resume")
    again = Training(tmp_path / "again", *arguments, module="cxai_jax.predict")
    assert again.end() == 0, again.output
    whole = tmp_path / "whole"
    arguments[arguments.index(out)] = whole
    Training(tmp_path / "log", *arguments, module="cxai_jax.predict").succeed()
    name = "predictions.csv"
    ours, theirs = (sorted((f / name).read_text().splitlines()) for f in (out, whole))
    assert ours == theirs
