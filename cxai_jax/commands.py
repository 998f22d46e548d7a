"""`cxai-prepare` and `cxai-export` before their modules are loaded.

The first line comes at once, and Ctrl-C at any time ends in one.
"""

import importlib
import signal
import sys

from cxai_jax import signals

BEGINS_ANEW = "the same command begins anew"


def prepare() -> int:
    return launched("cxai_jax.data.prepare")


def export() -> int:
    return launched("cxai_jax.inference.export")


def launched(module: str) -> int:
    """Runs `main` of a module; returns its exit code, 128 + n for signal n."""
    signals.begin("before anything was written", BEGINS_ANEW)
    if not {"-h", "--help"} & set(sys.argv):
        print("loading", flush=True)
    command = importlib.import_module(module)
    try:
        for number in signals.HEEDED:
            signal.signal(number, _interrupt)
        signals.move(None)  # What is half written is to be cleared away.
        return command.main()
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        name = signal.Signals(number).name
        print(f"stopped by {name}, nothing is left of it; {BEGINS_ANEW}")
        return 128 + number


def _interrupt(number, frame):
    raise KeyboardInterrupt(number)
