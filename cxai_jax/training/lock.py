"""One training at a time in a workdir; readers need no lock and take none.

`training.lock` names the host, process and start of the training that writes. A lock
is stale, and taken over, where its process is gone from this host (or its number now
belongs to another one), or where another host or container has not renewed it for
`STALE_S`: a training touches its lock every `BEAT_S`.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cxai_jax import disk, signals

FILE = "training.lock"
BEAT_S = 30.0
STALE_S = 600.0  # Twenty beats: a host that is only slow is not taken for dead.


@contextlib.contextmanager
def training(workdir: Path, *, active: bool = True) -> Iterator[None]:
    """Holds the workdir for a training; creates it.

    Args:
      active: False in the processes of a multi-host run that do not write.

    Raises:
      ValueError: if another training holds it, naming host, process and start.
      DiskError: if the disk is full or closed.
    """
    if not active:
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path, mine = workdir / FILE, json.dumps(_this_process())
    with disk.writing(path, len(mine)), _alone(path) as file:
        if text := _holder_of(path, file.read()):
            raise ValueError(
                f"{workdir} is in use by {text}; wait for it, stop it, or choose "
                "another --workdir"
            )
        file.seek(0)
        file.truncate()
        try:
            file.write(mine)
            file.flush()
        except OSError:  # Half a lock would keep everybody out.
            path.unlink()
            raise
    done = threading.Event()
    beat = threading.Thread(target=_renew, args=(path, done), daemon=True)
    beat.start()

    def release() -> None:
        done.set()
        beat.join()
        # Where the disk failed the lock stays, and is stale once this process ends.
        with contextlib.suppress(OSError), _alone(path) as file:
            if file.read() == mine:  # Nobody took it for stale meanwhile.
                path.unlink()

    signals.LAST.append(release)
    try:
        yield
    finally:
        signals.LAST.remove(release)
        release()


def holder(workdir: Path) -> str:
    """The live training that writes in `workdir`, in words; "" without one."""
    path = workdir / FILE
    try:
        return _holder_of(path, path.read_text())
    except OSError:
        return ""


def _holder_of(path: Path, text: str) -> str:
    """Who holds the lock with this text; "" if nobody does, or nobody alive."""
    if not text:
        return ""
    age = time.time() - path.stat().st_mtime
    try:
        lock = json.loads(text)
        place, pid, began = lock["place"], int(lock["pid"]), lock["began"]
        words = f"process {pid} on {lock['host']}, a training begun {lock['at']}"
    except (ValueError, KeyError, TypeError):
        place, words = None, "a training whose lock is damaged"
    if place == _place():
        return words if _began(pid) == began else ""
    seen = f"{words}, last seen {age:.0f} s ago (gone if not for {STALE_S:.0f} s)"
    return seen if age < STALE_S else ""


def _place() -> str:
    """Where process ids mean the same: the host and, on Linux, the container."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _this_process() -> dict:
    return {
        "host": socket.gethostname(),
        "place": _place(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "at": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _began(pid: int) -> str | None:
    """When a process of this host began; None if it is gone.

    Boot and clock ticks since then, so that a number used again is told apart; where
    there is no /proc, only that there is such a process.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # Somebody else's, and alive.
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if stat[0] == "Z":  # Ended; nobody has asked for its exit code yet.
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {stat[19]}"
    except OSError:
        return "alive"


@contextlib.contextmanager
def _alone(path: Path):
    """The lock file, open to read and write while no other process has it so."""
    while True:
        with path.open("a+") as file:
            with contextlib.suppress(OSError):  # A file system without locks.
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except FileNotFoundError:
                same = False  # Its holder ended between the two calls.
            if same:
                file.seek(0)
                yield file
                return


def _renew(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)
