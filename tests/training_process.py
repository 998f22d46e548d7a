"""Trainings as processes of their own, to be killed, stopped and starved."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from cxai_jax.config import load_config_file
from cxai_jax.training import run as runs
from cxai_jax.training.checkpoint import Checkpoints, checksum

REPO = Path(__file__).parents[1]
WAIT_S = 900
# The compiler is not what is tested, and takes most of the time.
FAST = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
}


class Training:
    """`python -m cxai_jax.main` on the small config, its output read from a file.

    A pipe carries the output there, which no limit of the process's files cuts short.
    """

    def __init__(self, workdir: Path, *arguments, module="cxai_jax.main", **options):
        self.file = tempfile.NamedTemporaryFile(suffix=".log")  # Gone with this object.
        self.log = Path(self.file.name)
        command = [sys.executable, "-u", "-m", module]
        if module == "cxai_jax.main":
            command += ["--config=tests/faults/short_run.py", f"--workdir={workdir}"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
        environment |= FAST | options.pop("env", {})
        self.pipe = subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, stdout=self.file, start_new_session=True
        )
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=REPO,
            env=environment,
            stdout=self.pipe.stdin,
            stderr=subprocess.STDOUT,
            **options,
        )
        self.pipe.stdin.close()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str) -> None:
        """Until the output has the pattern; fails where the process ends before."""
        self.until(lambda: re.search(pattern, self.output), pattern)

    def wait_for_checkpoint(self, workdir: Path) -> None:
        """Until one is whole."""
        latest = workdir / "checkpoints/latest"
        self.until(
            lambda: any(path.name.isdigit() for path in latest.glob("*")),
            "a checkpoint",
        )

    def until(self, condition, what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            ended = self.process.poll() is not None
            if ended and self.end() is not None and condition():
                return
            assert not ended and time.monotonic() < deadline, (what, self.output)
            time.sleep(0.005)

    def end(self) -> int:
        """The exit code, once it is over and all of its output is there."""
        code = self.process.wait(WAIT_S)
        self.pipe.wait(WAIT_S)
        return code

    def succeed(self) -> "Training":
        assert self.end() == 0, self.output
        return self

    def one_line(self, pattern: str) -> None:
        """No traceback and no crash, but one line that fits the pattern."""
        assert "Traceback" not in self.output, self.output
        assert "Fatal" not in self.output, self.output
        found = [x for x in self.output.splitlines() if re.search(pattern, x)]
        assert len(found) == 1, (pattern, self.output)


def small():
    """The config of these trainings."""
    return load_config_file(str(REPO / "tests/faults/short_run.py"))


def template(workdir: Path):
    """The structure of their state."""
    run = runs.open_run(small(), workdir)
    method = runs.make_method(run.config, run.network, total_steps=1)
    return runs.initial_state(run, method)


def final_state(workdir: Path) -> tuple[int, str]:
    """Step and checksum of the newest checkpoint, as they are on disk."""
    state, step, _ = Checkpoints(workdir).restore("latest", template(workdir))
    return step, checksum(jax.tree.map(np.asarray, state))


def same_end(workdir: Path, reference: Path) -> None:
    """The run ended as the one that nothing interrupted, to the bit."""

    def rows(folder):
        text = (folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(row) for row in text]
        return [{n: v for n, v in row.items() if n != "images_per_s"} for row in rows]

    assert final_state(workdir) == final_state(reference)
    assert rows(workdir) == rows(reference)
    ours, theirs = (
        json.loads((folder / "results.json").read_text())
        for folder in (workdir, reference)
    )
    assert ours["metrics"] == theirs["metrics"]
    assert ours["steps"] == theirs["steps"]


def picture(path: Path, seed: int = 0) -> None:
    """An image to predict."""
    pixels = np.random.default_rng(seed).integers(0, 255, (200, 200), np.uint8)
    Image.fromarray(pixels).save(path)
