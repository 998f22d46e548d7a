"""python -m tools.startup [--rows=baseline] [--json=FILE]

Seconds from a command to its first step and to its first prediction, by phase, cold
and with the caches that the first run left. A phase ends at the line that the command
prints when it begins the next; nothing in the command is changed or wrapped. Beside the
clock stand the CPU seconds of the command, which other processes change less, and what
`python -X importtime` says of its imports, as sums over each package.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tools.benchmark_session import describe, make_session
from tools.benchmark_timing import Load

IMPORTED = ("cxai_jax.main", "cxai_jax.train", "cxai_jax.training.loop")
IMPORTED += ("cxai_jax.predict", "cxai_jax.inference.predicting")
# What a line begins with -> what has ended by then.
STEP = {
    "loading JAX": "command line",
    "reading data": "imports",
    "compiling": "data, network, state",
    "compiled in": "trace and compile",
    "step 1/": "first step",
}
PREDICTION = {
    "loading JAX": "command line",
    "loading the model": "imports",
    "predicting": "model",
    "1/1 files": "programs and first prediction",
}


def phases(command: list[str], ends: dict[str, str]) -> dict:
    """Runs a command; seconds and CPU seconds of each phase, and in all.

    Raises:
      RuntimeError: if it fails, or a line is missing.
    """
    load, begun = Load(lambda: 0.0), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"CI": "1"},
    )
    found, said, before, waiting = {}, [], (0.0, 0.0), dict(ends)
    for line in process.stdout:
        said.append(line)
        start = next((start for start in waiting if line.startswith(start)), None)
        if start is None:
            continue
        now = time.monotonic() - begun, cpu_of(process.pid)
        taken = [b - a for a, b in zip(before, now, strict=True)]
        found[waiting.pop(start)] = dict(zip(("s", "cpu_s"), taken, strict=True))
        before = now
    process.wait()
    if process.returncode or waiting:
        raise RuntimeError(f"{' '.join(command)}: {''.join(said)[-2000:]}")
    totals = dict(zip(("s", "cpu_s"), before, strict=True))
    busy = load.foreign_until(Load(lambda: 0.0))
    return {"phases": found, "in all": totals, "machine_busy": busy}


def cpu_of(process: int) -> float:
    """CPU seconds of a process, from /proc; children apart."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def imports(module: str) -> dict:
    """CPU seconds to import a module, and seconds of each package's own lines."""
    clock = f"import time, {module}; print(time.process_time())"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", clock],
        capture_output=True,
        text=True,
        check=True,
    )
    packages = Counter()
    for own, name in re.findall(r"import time: +(\d+) \| +\d+ \| +(\S+)", done.stderr):
        packages[name.partition(".")[0]] += int(own) / 1e6
    largest = {name: value for name, value in packages.most_common(8)}
    return {"cpu_s": float(done.stdout), "packages_s": largest}


def measure(rows: str, folder: Path) -> dict:
    """Trains and predicts in a folder, twice each."""
    run = folder / "run"
    train = ["cxai_jax.main", f"--config=demo:{rows}", f"--workdir={run}"]
    train += ["--config.data.phantom_images=64", "--config.train.epochs=1.0"]
    train += ["--config.train.log_every_steps=1", "--config.eval.bootstrap=50"]
    train += ["--config.train.batch_size=8"]
    found = {"first step, cold": phases(train, STEP)}
    for path in run.iterdir():
        if path.name != "xla_cache":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    found["first step, cached"] = phases(train, STEP)
    image = folder / "image.png"
    draw(image)
    for kind in ("cold", "cached"):
        predict = ["cxai_jax.predict", f"--workdir={run}", f"--images={image}"]
        predict += [f"--out={folder / kind}"]
        found[f"first prediction, {kind}"] = phases(predict, PREDICTION)
    return found


def draw(path: Path) -> None:
    """One phantom as a PNG file."""
    from PIL import Image

    from configs import demo
    from cxai_jax.data import phantom

    config = demo.get_config().data
    config.phantom_images = 12
    image = phantom.load(config).splits["test"].images[0]
    Image.fromarray(image[..., 0]).save(path)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.startup")
    parser.add_argument("--rows", default="baseline", help="of configs/demo.py")
    parser.add_argument(
        "--json", type=Path, default=Path("experiments/results/startup_cpu.json")
    )
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given.rows, Path(folder))
    result = describe(make_session())
    result = {name: result[name] for name in ("git", "time", "host", "versions")}
    result |= {"config": f"demo:{given.rows}", "commands": found}
    result["imports"] = {module: imports(module) for module in IMPORTED}
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, one in found.items():
        told = ", ".join(
            f"{phase} {taken['s']:.1f} ({taken['cpu_s']:.1f})"
            for phase, taken in [*one["phases"].items(), ("in all", one["in all"])]
        )
        print(f"{name}: {told}; seconds (CPU seconds)")
    for name, one in result["imports"].items():
        print(f"import {name}: CPU {one['cpu_s']:.2f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
