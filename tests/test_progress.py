"""One bar on a terminal, plain lines elsewhere."""

import io
import logging
import re
import sys

import pytest

from cxai_jax import progress


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.delenv("CI", raising=False)


@pytest.fixture(autouse=True)
def a_command(monkeypatch):
    monkeypatch.setattr(progress.signals.Command, "alarm", object())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_a_terminal(monkeypatch, columns: int) -> Terminal:
    for name in ("CI", "NO_COLOR", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    return out


def drawn(text: str) -> list[str]:
    """The lines that were drawn, one under or over the other, without control codes."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_the_bar_is_never_wider_than_the_terminal(monkeypatch, columns):
    out = on_a_terminal(monkeypatch, columns)
    with progress.stage("training", 12, "steps") as show:
        show(3, "step 3/12 " + "loss 1.234 " * 20)
        show._bar.refresh()
        with progress.stage("scoring", 7) as inner:
            inner(7)
            show._bar.refresh()
        print("a line that stays")
    lines = drawn(out.getvalue())
    assert max(map(len, lines)) <= columns
    assert "a line that stays" in [line.strip() for line in lines]
    if columns == 80:
        assert any("training" in x and "step 3/12 loss" in x for x in lines)
        # One bar: the inner stage takes the place of the outer one.
        assert any("scoring" in x and "7/7 images" in x for x in lines)
        assert not any("scoring" in x and "training" in x for x in lines)
    hidden, shown = (out.getvalue().rfind(code) for code in ("\x1b[?25l", "\x1b[?25h"))
    assert shown > hidden >= 0  # The cursor is back.


@pytest.mark.parametrize("ci", [False, True])
def test_plain_lines_where_there_is_no_terminal_or_in_ci(monkeypatch, ci):
    out = on_a_terminal(monkeypatch, 80)
    if ci:
        monkeypatch.setenv("CI", "true")
    else:
        monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.stage("compiling"):
        pass
    with progress.stage("reading images", 40) as show:
        for done in range(1, 41):
            now[0] += 2
            show(done)
    assert out.getvalue().splitlines() == [
        "compiling",
        "reading images",
        "reading images: 15/40 images, 0.5/s, 0:50 left",
        "reading images: 30/40 images, 0.5/s, 0:20 left",
        "reading images: 40/40 images, 0.5/s, 0:00 left",
    ]


def test_within_a_training_scoring_speaks_by_the_clock_only(monkeypatch, plain, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.stage("training", 9, "steps", done=2) as show:
        show(3, "step 3/9", now=True)
        assert not show.due()
        with progress.stage("scoring", 5) as inner:
            inner(5)
            assert progress.where() == "while scoring"
        now[0] = 31.0
        assert show.due()
        show(4, "step 4/9")
        show(5, "step 5/9")
    assert capsys.readouterr().out.splitlines() == ["training", "step 3/9", "step 4/9"]
    assert progress.where() == "at once"


def test_other_hosts_say_nothing(monkeypatch, plain, capsys):
    monkeypatch.setattr(progress.Shown, "quiet", True)
    with progress.stage("training", 1, "steps") as show:
        show(1, now=True)
    assert capsys.readouterr().out == ""


def test_a_program_that_uses_the_package_hears_the_steps_alone(monkeypatch, capsys):
    monkeypatch.setattr(progress.signals.Command, "alarm", None)
    with progress.stage("building the network"), progress.stage("reading", 2) as show:
        show(1, "step 1/2", now=True)
        show(2)
    assert capsys.readouterr().out == "step 1/2\n"


def test_a_failed_stage_is_closed(plain):
    with pytest.raises(ValueError), progress.stage("reading data"):
        raise ValueError
    assert not progress.Shown.stages


def test_log_messages_go_where_stderr_is_at_the_time(capsys):
    log = logging.Logger("x")
    log.addHandler(progress.Log())
    log.warning("host-bound: %.0f %%", 30)
    assert capsys.readouterr().err == "host-bound: 30 %\n"


def test_clock():
    assert progress.clock(59.6) == "1:00" and progress.clock(3661) == "1:01:01"
