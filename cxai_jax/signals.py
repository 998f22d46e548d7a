"""How SIGINT (Ctrl-C) and SIGTERM end a command: in order, with one line and 128 + n.

Where something could be lost, `StopSignal` remembers the signal until the work at hand
is saved. Where nothing could, a command ends at once, although Python's own handlers
would have to wait: while modules are imported, and inside XLA's compiler.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

HEEDED = (signal.SIGTERM, signal.SIGINT)
CONTINUES = "the same command continues"
# Called before a process is ended at once: what must not be left behind.
LAST: list[Callable[[], None]] = []
_ending = threading.Lock()


class Command:
    """Whether this process is one of our commands, for a notebook is not ended at once.

    Attributes:
      place: where it may be ended at once, in words or as a function that knows them;
        None where something could be lost.
      then: what is to be done next.
      alarm: the socket that the interpreter writes the number of a signal to as soon as
        it arrives, whatever C++ code runs; None in a notebook.
      heard: the number of a signal that is about to end the process.
    """

    place: str | Callable[[], str] | None = None
    then = CONTINUES
    alarm: socket.socket | None = None
    heard = 0


def begin(place: str, then: str = CONTINUES) -> None:
    """From here on signals end this process at once, but within a StopSignal."""
    reader, Command.alarm = socket.socketpair()
    Command.alarm.setblocking(False)
    Command.then = then
    for number in HEEDED:
        signal.signal(number, _hear)
    move(place)
    threading.Thread(target=_wait, args=(reader,), daemon=True).start()


@contextlib.contextmanager
def at_once(place: str | Callable[[], str], then: str | None = None) -> Iterator[None]:
    """Within, a command is ended without waiting for Python's turn.

    Nothing may be half written within. See `Command` for the arguments.
    """
    if not Command.alarm or _several_hosts():
        yield
        return
    before = Command.place, Command.then
    Command.then = then or Command.then
    move(place)
    if StopSignal.listening:
        stop_if_asked(_words(place))
    try:
        yield
    finally:
        Command.then = before[1]
        move(before[0])


def move(place: str | Callable[[], str] | None) -> None:
    """Sets where this process may be ended at once; None: nowhere.

    The alarm rings only where it may: what rang elsewhere would be heard late. It is
    set again each time, for an event loop in between may have taken it away.
    """
    if Command.alarm and threading.current_thread() is threading.main_thread():
        rung = -1 if place is None else Command.alarm.fileno()
        signal.set_wakeup_fd(rung, warn_on_full_buffer=False)
    if place is not None:
        Command.place = place
    if Command.heard:  # Before the alarm was set, or not yet by the thread behind it.
        _end(Command.heard)
    Command.place = place


def _wait(reader: socket.socket) -> None:
    """Ends the process once a signal arrives where it may."""
    while received := reader.recv(1):
        if received[0] in HEEDED:
            _end(received[0])


def _hear(number, frame) -> None:
    """Python's own turn: the thread above ends the process, or `move` if it is late."""
    Command.heard = number


def _end(number: int) -> None:
    """Ends the process where it may be; the second of two threads does nothing."""
    place = Command.place
    if place is None or not _ending.acquire(blocking=False):
        return
    for last in reversed(LAST):
        last()
    name = signal.Signals(number).name
    print(f"stopped by {name} {_words(place)}; {Command.then}", flush=True)
    os._exit(128 + number)


def _words(place: str | Callable[[], str]) -> str:
    return place if isinstance(place, str) else place()


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that what runs can be ended in order.

    A KeyboardInterrupt in the middle of XLA's work may crash the process or be lost.
    Inside another one the outer one listens.
    """

    listening: "StopSignal | None" = None

    def __init__(self):
        self.asked = 0
        self._before, self._place = {}, None

    def __enter__(self):
        if StopSignal.listening:
            return StopSignal.listening
        if _several_hosts():  # There JAX's own preemption service listens.
            return self
        StopSignal.listening = self
        self._place = Command.place
        for number in HEEDED:
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # Only the main thread may listen to signals.
                break
        move(None)
        return self

    def __exit__(self, *_):
        if StopSignal.listening is not self:
            return
        StopSignal.listening = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        move(self._place)

    def _ask(self, number, frame):
        if self.asked:  # The second time means now.
            raise KeyboardInterrupt(number)
        self.asked = int(number)


def stop_if_asked(where: str) -> None:
    """Ends the process, in order, if a StopSignal is in force and was asked."""
    if StopSignal.listening and (number := StopSignal.listening.asked):
        stop(number, where)


def stop(number: int, where: str):
    """Ends the process with one line and the exit code of a signal."""
    name = signal.Signals(number).name
    print(f"stopped by {name} {where}; {CONTINUES}", flush=True)
    sys.exit(128 + number)


def _several_hosts() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.process_count() > 1
