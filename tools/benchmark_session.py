"""One run of the benchmark: sizes, the machine's limits, and the rows of its JSON."""

import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax import host
from cxai_jax.models import lowering
from tools import benchmark_timing as timing
from tools import roofline
from tools.benchmark_programs import Program
from tools.benchmark_timing import Contender

HOST_ENVIRONMENT = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "OMP_NUM_THREADS")

# By how much equal results may differ, of the largest.
ROUNDING = {"float32": 1e-3, "bfloat16": 0.08}


@dataclass
class Session:
    """One run of the benchmark: sizes, what has been measured, and the time left."""

    dtype: str
    batches: tuple[int, ...]
    calls: int  # calls per sample
    repeats: int
    peer: bool
    deadline: float
    voting_images: int
    epoch_images: int
    size: int = 224
    model: str = "resnet50"
    machine: roofline.Machine | None = None
    roof: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def time_left(self, what: str) -> bool:
        """Whether `what` may begin; notes it as skipped if not."""
        if time.monotonic() < self.deadline:
            return True
        self.skipped.append(what)
        return False

    @property
    def fields(self) -> dict:
        return {"model.name": self.model, "model.dtype": self.dtype}

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4

    def interleave(self, contenders: list[Contender], *, warmup: int) -> list:
        return timing.interleave(
            contenders,
            calls=self.calls,
            repeats=self.repeats,
            warmup=warmup,
            deadline=self.deadline,
        )


def make_session(**changes) -> Session:
    """Sizes that suit the backend; see performance.md 5 for both sets."""
    on_cpu = jax.default_backend() == "cpu"
    fields = {
        "dtype": "float32" if on_cpu else "bfloat16",
        "batches": (8,) if on_cpu else (32, 256),
        "calls": 1 if on_cpu else 50,
        "repeats": 5,
        "peer": False,
        "deadline": float("inf"),
        "voting_images": 1 if on_cpu else 32,
        "epoch_images": 32 if on_cpu else 2383,
    }
    return Session(**{**fields, **changes})


def smoke_session() -> Session:
    """The tiny network at 32 pixels, to see in seconds that the benchmark works."""
    return make_session(model="tiny", size=32, batches=(4,), repeats=2, calls=1)


def measure_roof(session: Session) -> None:
    """Copy rate and matrix-product rates of one device, on random data."""
    small = jax.default_backend() == "cpu"
    side, floats = (1024, 1 << 25) if small else (8192, 1 << 28)
    key = jax.random.key(0)
    rates = {}
    data = jax.random.normal(key, (floats,))
    copy = jax.jit(lambda x: x + 1.0)
    rates["copy_GBps"] = 8e-9 * floats / best_seconds(copy, data)
    for name in ("float32", "bfloat16"):
        matrix = jax.random.normal(key, (side, side)).astype(name)
        seconds = best_seconds(jax.jit(jnp.matmul), matrix, matrix)
        rates[f"{name}_TFLOPs"] = 2e-12 * side**3 / seconds
    session.roof = rates
    session.machine = roofline.Machine(
        bytes_per_s=1e9 * rates["copy_GBps"],
        flops_per_s=1e12 * rates[f"{session.dtype}_TFLOPs"],
    )


def best_seconds(function, *arguments, calls: int = 10) -> float:
    """Seconds per call: the best of five samples, since this is meant as a limit."""
    jax.block_until_ready(function(*arguments))
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        samples.append((time.perf_counter() - start) / calls)
    return min(samples)


def add_row(
    session: Session,
    suite: str,
    variant: str,
    program: Program,
    rounds: list,
    *,
    works: tuple[str, ...] = (),
    forwards: float = 1.0,
    trains: bool = False,
    compare: dict[str, str] | None = None,
) -> dict:
    """Turns rounds into one row of the JSON.

    Args:
      works: passes per image, for the floor; none for anything but a ResNet-50.
      forwards: how often each image goes through them.
      trains: whether the optimiser's traffic belongs to the floor.
      compare: label -> contender whose time is set in relation.
    """
    milliseconds = timing.times(rounds, variant)
    per_image = milliseconds["p50"] / 1e3 / program.images
    row = {
        "suite": suite,
        "variant": variant,
        "model": session.model,
        "size": session.size,
        "dtype": session.dtype,
        "bs": program.images,
        "steps": session.calls,
        "repeats": len(rounds),
        "img_s": 1 / per_image,
        "ms": milliseconds,
        "wrong": "",
        **program.about,
        "ratios": {
            label: {"ms": timing.times(rounds, other)["p50"]}
            | timing.paired_ratio(rounds, variant, other)
            for label, other in (compare or {}).items()
        },
        "foreign_load": timing.foreign_load(rounds, variant),
        "noisy": jax.default_backend() == "cpu" and timing.is_noisy(rounds, variant),
    }
    if works and session.machine and session.model == "resnet50":
        shape = {"batch": program.images, "itemsize": session.itemsize}
        shape["size"] = session.size
        floor = sum(roofline.floor_us(w, session.machine, **shape) for w in works)
        floor *= forwards
        moved = sum(roofline.bytes_per_image(w, **shape) for w in works) * forwards
        flops = sum(roofline.flops_per_image(w, session.size) for w in works) * forwards
        if trains:
            floor += roofline.optimizer_us(session.machine, batch=program.images)
        row |= {
            "floor_us": floor,
            "pct_floor": 1e-4 * floor / per_image,
            "mfu": flops / per_image / session.machine.flops_per_s,
            "gbps": 1e-9 * moved / per_image,
            "bytes_model": moved,
        }
    session.rows.append(row)
    print_row(row)
    return row


def wrong_values(dtype: str, found, expected: dict) -> str:
    """Which of the arrays `expected` by name differs from `found`; "" if none."""
    differing = []
    for name, values in expected.items():
        values, own = np.asarray(values), np.asarray(found)
        difference = float(np.abs(own - values).max() / np.abs(values).max())
        if not difference <= ROUNDING[dtype]:  # Not a number is wrong, too.
            differing.append(f"{name}'s values differ by {difference:.2g}")
    return "; ".join(differing)


def print_row(row: dict) -> None:
    parts = [
        f"{row['suite']:10} {row['variant']:22} bs {row['bs']:<4}",
        f"{row['img_s']:9.1f} img/s {row['ms']['p50']:9.2f} ms",
        f"({row['ms']['min']:.2f}-{row['ms']['max']:.2f})",
    ]
    if "pct_floor" in row:
        parts.append(f"{row['pct_floor']:5.1f} % of floor, MFU {row['mfu']:.2f}")
        parts.append(f"{row['gbps']:.1f} GB/s")
        if row.get("bytes_xla") and row["suite"] != "tta":
            ratio = row["bytes_xla"] / (row["bytes_model"] * row["bs"])
            parts.append(f"bytes x{ratio:.2f}")
    if row.get("peak_bytes"):
        peak = row["peak_bytes"] / 2**20
        parts.append(f"peak {peak:.0f} MB, {peak / row['bs']:.3g} per image")
    if row.get("compile_s"):
        cached = " cached" if row.get("cache_hit") else ""
        parts.append(f"compile {row['compile_s']:.1f} s{cached}")
    for name, ratio in row["ratios"].items():
        parts.append(
            f"| {ratio['median']:.2f}x {name} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
    if row["wrong"]:
        parts.append(f"WRONG: {row['wrong']}")
    if row["noisy"]:
        cpu = [f"{ratio['cpu']:.2f}x {name}" for name, ratio in row["ratios"].items()]
        parts.append(
            f"NOISY ({100 * row['foreign_load']:.0f} % foreign load); by CPU time "
            + ", ".join([f"{row['ms']['cpu_p50']:.0f} ms", *cpu])
        )
    print(" ".join(parts), flush=True)


def describe(session: Session) -> dict:
    """The whole run as the JSON that `tools/benchmark_compare.py` reads."""
    devices = jax.devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    ).stdout.strip()
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
    installed = {
        d.metadata["Name"].lower(): d.version for d in metadata.distributions()
    }
    return {
        "schema": 1,
        "git": git,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": {"cpu": cpu_name(), "threads": host.usable_cores()},
        "device": {
            "kind": devices[0].device_kind,
            "count": len(devices),
            "bytes": memory,
            "platform": str(devices[0].client.platform_version),
        },
        "versions": {"python": platform.python_version()}
        | {name: installed[name] for name in packages if name in installed},
        "flags": {n: os.environ[n] for n in HOST_ENVIRONMENT if n in os.environ},
        "lowering": lowering.AUTO.get(jax.default_backend(), lowering.AUTO["gpu"]),
        "roof": session.roof,
        "rows": session.rows,
        "skipped": session.skipped,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.machine()
