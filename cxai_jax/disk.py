"""Files that are written whole or not at all; what keeps them from it in one line."""

import contextlib
import errno
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the limit of a file's size is reached",
}
CLOSED = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "there is no permission to write",
    errno.EPERM: "there is no permission to write",
}
MISPLACED = {
    errno.EEXIST: "there is a file where a folder is needed",
    errno.ENOTDIR: "there is a file where a folder is needed",
    errno.EISDIR: "there is a folder where a file is needed",
}
TOLD = FULL | CLOSED | MISPLACED


class DiskError(OSError):
    """Nothing more can be written, said in one line with path and bytes."""


def write(path: Path, content: str | bytes) -> None:
    """Writes in one move: a reader sees the old file or the new, never half.

    Raises:
      DiskError: if the disk is full or closed; an old file stays.
    """
    if isinstance(content, str):  # A DICOM file may hold what is no character.
        content = content.encode("utf-8", "backslashreplace")
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path, len(content)):
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """`write` of a compressed npz file."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write(path, file.getvalue())


@contextlib.contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Raises a DiskError in place of what a full or closed disk makes others raise.

    Args:
      path: the file or folder that is written inside.
      size: bytes that are to be written, about.
    """
    free = _free(path)
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        if not (code := code_of(error)):
            raise
        told = f"{path}: {TOLD[code]}"
        if code in FULL:
            told += f": {size:,} bytes to write"
        if (
            code == errno.ENOSPC
        ):  # Of a quota or limit the disk's free bytes say nothing.
            told += f", {free:,} were free, {max(size - free, 0):,} are missing"
        raise DiskError(code, told) from error


def explain(error: OSError, then: str = "") -> str:
    """One line of an error of the disk; "" of any other.

    `then` says how to go on once the path can be written.
    """
    code = code_of(error)
    if not code:
        return ""
    path = Path(error.filename or ".")
    free = f"; {_free(path):,} bytes are free there" if code in FULL else ""
    told = f"{path}: {TOLD[code]}{free}"
    if isinstance(error, DiskError):
        told = error.strerror
    if code in MISPLACED:
        then = "choose another path"
    return f"{told}; {then}" if then else told


def quiet_callbacks() -> None:
    """Drops the traceback of a write that fails after orbax has given it up.

    TensorStore then calls back into an event loop that is closed; what failed has been
    raised as an error before.
    """
    other = sys.unraisablehook

    def hook(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            other(unraisable)

    sys.unraisablehook = hook


def check(folder: Path) -> None:
    """Raises DiskError if no file can be written to `folder`, before long work."""
    probe = folder / f".write_test.{os.getpid()}"
    with writing(folder, 1):
        try:
            probe.write_bytes(b"x")
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)


def nearest(path: Path) -> Path:
    """The path, or where there is nothing yet the nearest one above it."""
    return next(p for p in (path, *path.absolute().parents) if os.path.exists(p))


def code_of(error: BaseException) -> int:
    """The error number, if it is one of `TOLD`, or 0.

    TensorStore, below orbax, has it in the text of a ValueError.
    """
    code = getattr(error, "errno", None) or 0
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        code = int(found[1])
    return code if code in TOLD else 0


def _free(path: Path) -> int:
    """Free bytes of the disk that holds, or is to hold, `path`."""
    for place in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return 0
