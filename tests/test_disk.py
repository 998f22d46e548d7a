"""Files are whole or absent; a full or closed disk is one line with path and bytes."""

import errno
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from cxai_jax import disk


@pytest.fixture
def broken(monkeypatch):
    """The disk fails at the last step of a write."""

    def fail(code):
        def replace(source, target):
            raise OSError(code, os.strerror(code), str(source))

        monkeypatch.setattr(disk.os, "replace", replace)
        monkeypatch.setattr(disk, "_free", lambda path: 3)

    return fail


def test_text_bytes_and_arrays_are_written(tmp_path):
    disk.write(tmp_path / "a", "é")
    disk.write(tmp_path / "b", b"\r\n")
    disk.write_arrays(tmp_path / "c.npz", {"x": np.arange(3)})
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9"
    assert (tmp_path / "b").read_bytes() == b"\r\n"
    np.testing.assert_array_equal(np.load(tmp_path / "c.npz")["x"], [0, 1, 2])
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full: 5 bytes to write, 3 were free, 2 are miss"),
        (errno.EDQUOT, "the disk quota is used up: 5 bytes to write"),
        (errno.EFBIG, "the limit of a file's size is reached: 5 bytes to write"),
        (errno.EROFS, "the file system is read-only$"),
        (errno.EACCES, "there is no permission to write$"),
    ],
)
def test_the_old_file_stays_and_the_path_is_named(tmp_path, broken, code, words):
    path = tmp_path / "a"
    path.write_text("old")
    broken(code)
    with pytest.raises(disk.DiskError, match=f"{path}: {words}") as error:
        disk.write(path, "12345")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    assert disk.explain(error.value) == error.value.strerror


def test_other_errors_stay_as_they_are(tmp_path, broken):
    broken(errno.EIO)
    with pytest.raises(OSError) as error:
        disk.write(tmp_path / "a", "1")
    assert not isinstance(error.value, disk.DiskError)
    assert disk.explain(error.value) == ""
    with pytest.raises(KeyError), disk.writing(tmp_path, 1):
        raise KeyError("x")


def test_tensorstores_errors_are_understood(tmp_path):
    text = "OUT_OF_RANGE: Error writing: No space left [os_error_code='28']"
    with pytest.raises(disk.DiskError, match="the disk is full: 7 bytes"):
        with disk.writing(tmp_path / "not" / "yet", 7):
            raise ValueError(text)


def test_an_error_of_python_itself_is_explained():
    error = OSError(errno.EROFS, "Read-only file system", "/x/y")
    assert disk.explain(error) == "/x/y: the file system is read-only"
    assert disk.explain(FileNotFoundError(errno.ENOENT, "no", "/x")) == ""


def test_a_file_in_the_way_of_a_folder_is_explained(tmp_path):
    (tmp_path / "a").touch()
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(OSError) as error:
            path.mkdir(parents=True)
        told = f"{path}: there is a file where a folder is needed"
        assert disk.explain(error.value) == f"{told}; choose another path"
        assert disk.explain(error.value, "go on") == f"{told}; choose another path"
    (tmp_path / "c").mkdir()
    with pytest.raises(disk.DiskError, match="a folder where a file is needed"):
        disk.write(tmp_path / "c", "x")
    assert disk.nearest(tmp_path / "d" / "e") == tmp_path
    assert disk.nearest(tmp_path / "a" / "b") == tmp_path / "a"
    full = OSError(errno.EROFS, "Read-only file system", "/x")
    assert disk.explain(full, "go on") == "/x: the file system is read-only; go on"


def test_a_folder_is_checked_before_long_work(tmp_path):
    disk.check(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError):
        disk.check(tmp_path / "none")


def test_a_late_callback_of_a_failed_write_is_not_a_traceback(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    disk.quiet_callbacks()
    for text in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(one.exc_value) for one in told] == ["another"]
