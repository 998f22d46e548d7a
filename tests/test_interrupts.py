"""How a signal ends a command: remembered, or at once, even inside compiled code."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import REPO

from cxai_jax import signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_ends_in_order(number, capsys):
    before = signal.getsignal(number)
    with signals.StopSignal() as stop:
        signals.stop_if_asked("here")  # Nobody asked.
        with signals.StopSignal() as inner:
            assert inner is stop
        os.kill(os.getpid(), number)
        with pytest.raises(SystemExit) as ended:
            signals.stop_if_asked("at step 7")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)  # The second time means now.
    assert ended.value.code == 128 + number
    assert capsys.readouterr().out == (
        f"stopped by {number.name} at step 7; the same command continues\n"
    )
    assert signal.getsignal(number) == before
    signals.stop_if_asked("here")


# Held in C with Python's lock released, as XLA's compiler holds it. With the long
# switch interval a signal of the StopSignal would be heard after it, if ever it were.
HELD = """
import os, signal, sys, threading, time
sys.setswitchinterval(5)
from cxai_jax import progress, signals
signals.begin("at the beginning", "go on")
signals.LAST.append(lambda: print("released"))
with signals.at_once("before"):
    pass
with signals.StopSignal() as stop:
    os.kill(os.getpid(), signal.NUMBER)
    assert stop.asked == signal.NUMBER
with signals.at_once(progress.where), progress.stage("compiling"):
    def send():
        time.sleep(0.2)
        print("sent")
        os.kill(os.getpid(), signal.NUMBER)
    threading.Thread(target=send).start()
    threading.Thread(target=lambda: (time.sleep(20), os._exit(99)), daemon=True).start()
    import ctypes
    while True:
        ctypes.CDLL(None).sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_at_once_is_at_once_in_c(number):
    run = subprocess.run(
        [sys.executable, "-c", HELD.replace("NUMBER", number.name)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 128 + number, run
    line = f"stopped by {number.name} while compiling; go on"
    assert run.stdout.splitlines() == ["compiling", "sent", "released", line]
    assert run.stderr == ""


EARLY = """
import os, signal, sys
sys.setswitchinterval(5)
from cxai_jax import signals
signals.begin("at the beginning", "go on")
os.kill(os.getpid(), signal.NUMBER)
signals.ENTER
print("lost")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("enter", ["StopSignal().__enter__()", "move(None)"])
def test_a_signal_just_before_what_could_be_lost_begins_is_not_lost(number, enter):
    text = EARLY.replace("NUMBER", number.name).replace("ENTER", enter)
    run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert run.returncode == 128 + number, run
    assert run.stdout == f"stopped by {number.name} at the beginning; go on\n"
    assert run.stderr == ""


def test_a_notebook_is_not_ended_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), signals.at_once("here"):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)  # A background job ignores it.


COMMANDS = {
    "train": ["cxai_jax.main", "--config=demo", "--workdir=w"],
    "predict": ["cxai_jax.predict", "--workdir=w", "--images=i", "--out=o"],
}
SCRIPTS = {"prepare": "prepare_data.py", "export": "export_model.py"}


@pytest.mark.parametrize("name", ["train", "predict", "prepare", "export"])
def test_ctrl_c_while_a_command_is_loaded_is_one_line(name, tmp_path):
    """At the first line JAX or TFDS begin to be imported, which takes seconds."""
    if name in COMMANDS:
        command = [sys.executable, "-u", "-m", *COMMANDS[name]]
    else:
        command = [sys.executable, "-u", str(REPO / "tools" / SCRIPTS[name])]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert first.startswith("loading"), (first, err)
    assert process.returncode == 128 + signal.SIGINT, (out, err)
    assert out.startswith("stopped by SIGINT before ") and out.count("\n") == 1
    assert err == "" and not list(tmp_path.iterdir())
