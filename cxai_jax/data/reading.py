"""Files of strangers are read here: regular ones only, in bounded time and memory.

An image may hang (a FIFO, a dead disk), decode for hours or unfold into gigabytes.
Each is read by a thread that nobody waits for longer than `DEADLINE`; one that needs
much memory waits until it is the only one that does. All readers together then stay
below READERS x SMALL + MAX_BYTES, 2 GB.
"""

import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

MAX_PIXELS = 100_000_000  # Of an image, all frames and samples of a DICOM file.
MAX_SIDE = 65_535  # Pixels; no JPEG or DICOM image is longer.
MAX_BYTES = 1_000_000_000  # File and pixels while an image is opened.
SMALL = 128_000_000  # Bytes that any reader may use at any time.
READERS = min(os.cpu_count() or 1, 8)  # Threads.
AHEAD = 32  # Images opened before they are asked for.
DEADLINE = 60.0  # Seconds for one image.
TEXT_BYTES = 256_000_000  # Of a list or table.


def printable(path: str | Path) -> str:
    """The path as text that any file can hold: bytes that are not UTF-8 as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@contextmanager
def opened(path: str | Path, memory: Callable[[bytes], int]) -> Iterator[bytes]:
    """The content of an image file, while there is the memory to open it.

    Args:
      path: the file.
      memory: content -> bytes that opening it takes at its peak, content included.

    Raises:
      ValueError: names the file, whatever went wrong here or in the `with` block.
    """
    name = printable(path)
    try:
        with turn(_size(path)):
            data = read_bytes(path)
            with turn(memory(data)):
                yield data
    except MemoryError:
        raise ValueError(f"{name}: there is not enough memory to open it") from None
    except Exception as error:
        reason = str(error).removeprefix(f"{name}: ")
        if not isinstance(error, ValueError):
            reason = f"cannot be read as an image ({type(error).__name__}: {reason})"
        raise ValueError(f"{name}: {' '.join(reason.split())}") from None


def read_bytes(path: str | Path, most: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
      ValueError: if it is none, is larger, or cannot be read.
    """
    name = printable(path)
    _size(path)  # Opening a device may already do harm.
    try:
        # What became a FIFO since then is opened without waiting for a writer.
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(number, "rb") as file:
            size = _check_regular(os.fstat(number), name)
            data = file.read(most + 1) if size <= most else b""
    except OSError as error:
        raise ValueError(f"{name}: cannot be opened ({error.strerror})") from None
    if size > most or len(data) > most:
        size = max(size, len(data))
        raise ValueError(f"{name}: {size} bytes, at most {most} are read")
    return data


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 list or table, without a byte order mark.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no regular file, too large, or not UTF-8.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{printable(path)}: no such file")
    try:
        return read_bytes(path, TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{printable(path)}: byte {error.start} is not UTF-8; save it as UTF-8 text"
        ) from None


def turn(needed: int) -> AbstractContextManager:
    """To be held while `needed` bytes are in use; waits where others use as much.

    Raises:
      ValueError: if no turn is long enough.
    """
    if needed > MAX_BYTES:
        raise ValueError(
            f"opening it takes about {needed / 1e9:.1f} GB of memory, at most "
            f"{MAX_BYTES / 1e9:g} GB are used; scale it down"
        )
    return _Alone() if needed > SMALL else nullcontext()


def read_ahead(
    items: Sequence, read: Callable[[Any], Any]
) -> Iterator[tuple[Any, Any | ValueError]]:
    """Reads with threads, a few items ahead of the caller, in order.

    Whatever an item does, the others are read: any exception counts as its error, and
    so does taking longer than DEADLINE.

    Yields:
      (item, what `read` returned or a ValueError).
    """
    queue, remaining = deque(), iter(items)
    slots, closed = threading.Semaphore(READERS), threading.Event()
    try:
        while True:
            for item in islice(remaining, AHEAD - len(queue)):
                queue.append((item, _Reader(read, item, slots, closed)))
            if not queue:
                return
            item, reader = queue.popleft()
            yield item, reader.outcome()
    finally:
        closed.set()


class _Reader(threading.Thread):
    """Reads one item; the process does not wait for it to end."""

    def __init__(self, read, item, slots, closed):
        super().__init__(daemon=True)
        self._read, self._item, self._slots, self._closed = read, item, slots, closed
        self._done, self.late = threading.Event(), False
        self._result: Any = None
        self.since: float | None = None  # When it last began; None while it waits.
        self.start()

    def run(self):
        with self._slots:
            if self._closed.is_set():
                return
            self.since = time.monotonic()
            try:
                self._result = self._read(self._item)
            except ValueError as error:
                self._result = error
            except MemoryError:
                self._result = ValueError("there is not enough memory to open it")
            except Exception as error:
                self._result = ValueError(f"{type(error).__name__}: {error}")
            self._done.set()
            if self.late:  # Its slot was given to another when it was given up.
                self._slots.acquire()

    def outcome(self) -> Any | ValueError:
        """What was read, or why it was not."""
        while not self._done.wait(min(1.0, DEADLINE / 4)):
            since = self.since
            if since is not None and time.monotonic() - since > DEADLINE:
                self.late = True
                self._slots.release()
                return ValueError(f"not opened within {DEADLINE:g} s; given up")
        return self._result


class _Alone:
    """The one long turn; the clock of a reader stands still while it waits for it."""

    lock = threading.RLock()
    holder: threading.Thread | None = None

    def __enter__(self):
        reader = threading.current_thread()
        if isinstance(reader, _Reader):
            reader.since = None
        while not self.lock.acquire(timeout=0.5):
            if getattr(_Alone.holder, "late", False):
                raise ValueError(
                    "a large image that was given up still holds the memory it needs; "
                    "open it by itself"
                )
        _Alone.holder = reader
        if isinstance(reader, _Reader):
            reader.since = time.monotonic()

    def __exit__(self, *_):
        self.lock.release()


def _size(path: str | Path) -> int:
    name = printable(path)
    try:
        return _check_regular(os.stat(path), name)
    except OSError as error:
        raise ValueError(f"{name}: cannot be opened ({error.strerror})") from None


def _check_regular(status: os.stat_result, name: str) -> int:
    """The size of a regular file; ValueError for a FIFO, a device or a folder."""
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name}: not a regular file but a FIFO, device or folder")
    return status.st_size
