"""What a command is doing: one bar on a terminal, plain lines elsewhere.

A stage has a name (reading images, compiling, training) and, where its end is known, a
bar with the time left. On a terminal the line of the innermost stage overwrites itself
and is never wider than the terminal. Where the output is none, or CI is set, there are
lines: the name, then how far it is, at the end and every LINE_S seconds. A program that
uses the package hears only the steps of a training.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

from cxai_jax import signals

BAR_S, LINE_S = 2.0, 30.0  # Between two values that the devices are waited for.


class Shown:
    """Of this process: the stages that are open, and whether anything is shown."""

    stages: "list[Stage]" = []
    quiet = False  # Of several hosts the first one speaks.


class Stage:
    """An open stage; calling it says how much is done."""

    def __init__(self, name: str, total: int | None, unit: str, done: int):
        self.name = name
        self._total, self._unit, self._first = total, unit, done
        self._begun = self._shown = time.monotonic()
        self._out, self._bar = sys.stdout, None
        outer = Shown.stages[-1] if Shown.stages else None
        self._inner = outer is not None
        if not speaks():
            return
        if on_terminal():
            self._bar = outer._bar if outer and outer._bar else _open_bar(self._out)
            if outer and outer._bar:
                self._bar.update(outer._task, visible=False)
            self._task = self._bar.add_task(name, total=total, text="")
        elif not outer or total is None:  # Of each scoring in a training too much.
            print(name, file=self._out, flush=True)

    def due(self) -> bool:
        """Whether it is time to say more, by the clock."""
        period = BAR_S if self._bar else LINE_S
        return time.monotonic() - self._shown >= period

    def __call__(self, done: int, text: str = "", *, now: bool = False) -> None:
        """Shows that `done` of the total are; a line where due, at the end, or `now`.

        Args:
          done: counted from 0.
          text: to be read instead of the numbers done, pace and time left.
        """
        if Shown.quiet:
            return
        if self._bar:
            told = text or self._pace(done)
            self._bar.update(self._task, completed=done, text=told)
        elif now or (speaks() and (self.due() or self._at_end(done))):
            told = text or f"{self.name}: {self._pace(done)}"
            print(told, file=self._out, flush=True)
        else:
            return
        self._shown = time.monotonic()

    def _at_end(self, done: int) -> bool:
        return done == self._total and not self._inner

    def _pace(self, done: int) -> str:
        seconds = max(time.monotonic() - self._begun, 1e-9)
        rate = (done - self._first) / seconds
        told = f"{done}/{self._total} {self._unit}"
        if not rate or not self._total:
            return told
        return f"{told}, {rate:.1f}/s, {clock((self._total - done) / rate)} left"

    def close(self, outer: "Stage | None") -> None:
        """Takes its line away."""
        if not self._bar:
            return
        self._bar.remove_task(self._task)
        if outer and outer._bar:
            self._bar.update(outer._task, visible=True)
        else:
            self._bar.stop()


class Log(logging.Handler):
    """Messages of the log on stderr as it is at the time: above a bar where one is."""

    def emit(self, record: logging.LogRecord) -> None:
        print(logging.Formatter().format(record), file=sys.stderr, flush=True)


@contextlib.contextmanager
def stage(
    name: str, total: int | None = None, unit: str = "images", done: int = 0
) -> Iterator[Stage]:
    """Within, the command is in the stage `name`.

    Args:
      total: where its end is known.
      unit: of the total.
      done: how much was done before.
    """
    outer = Shown.stages[-1] if Shown.stages else None
    opened = Stage(name, total, unit, done)
    Shown.stages.append(opened)
    try:
        yield opened
    finally:
        Shown.stages.remove(opened)
        opened.close(outer)


def where() -> str:
    """The innermost stage in words, for the line with which a signal ends a command."""
    return f"while {Shown.stages[-1].name}" if Shown.stages else "at once"


def speaks() -> bool:
    """Whether this process is a command, and of several hosts the first."""
    return signals.Command.alarm is not None and not Shown.quiet


def on_terminal() -> bool:
    """Whether a line can overwrite itself here."""
    dumb = os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not dumb and not os.environ.get("CI")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    seconds = round(seconds)
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _open_bar(out):
    """A running bar; what else is printed appears above it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    def text(of: str, **options) -> TextColumn:
        column = Column(no_wrap=True, overflow="ellipsis", **options)
        return TextColumn(of, markup=False, table_column=column)

    bar = Progress(
        text("{task.description}"),
        BarColumn(bar_width=16),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        text("{task.fields[text]}", ratio=1),
        console=Console(file=out),
        transient=True,
        expand=True,
        refresh_per_second=4,
    )
    bar.start()
    return bar


def _show_cursor() -> None:
    """Before a signal ends the process: a bar hides the cursor."""
    for opened in Shown.stages[:1]:
        if opened._bar:
            opened._bar.stop()


signals.LAST.append(_show_cursor)
