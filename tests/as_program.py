"""A test file that is also a program: the devices have to exist before JAX starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]


def report_of(file: str, *arguments: str, flags: str, **environment: str) -> dict:
    """The JSON object that the last line of `python FILE ARGUMENTS` is, on a CPU.

    Args:
      file: of a test, whose __main__ prints the line.
      *arguments: of the command.
      flags: XLA_FLAGS.
      **environment: further variables.
    """
    variables = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
    }
    done = subprocess.run(
        [sys.executable, file, *arguments],
        env={**os.environ, **variables, **environment},
        capture_output=True,
        text=True,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
