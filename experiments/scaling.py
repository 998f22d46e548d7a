"""python -m experiments.scaling [--tiny] [--out=DIR] [--budget_s=600]

Milliseconds per step against batch, resolution, devices and images in the data set, and
milliseconds per call of test-time voting against k: interleaved samples, the exponent
between neighbours (the slope in log-log coordinates; 1 is linear), and the roofline
floor of the same work at the measured copy and matrix-product rates, which says what
the arithmetic alone would cost. Written as JSON and one figure.

What to expect, and why the cost is not linear:
  batch       below 1: reading the weights, 94 MB, and updating them does not depend on
              the batch, nor, on a GPU, does launching some 900 kernels; and the last
              stage has 49 pixels per image, too few rows for a fast matrix product;
  resolution  below 2 in the side for the same reasons, the more the smaller the maps;
  devices     (weak scaling, batch per device fixed) 0 on real ones, as gradients are
              reduced while the backward pass goes on; virtual CPU devices share the
              cores, so there it is 1 at best, and the excess is what sharding costs;
  images      0: the split lies on the device and a step gathers its batch;
  k           below 1: every mask is a forward pass, but the original is one as well,
              and few masks make a small batch.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from cxai_jax import host
from tools import benchmark_programs as programs
from tools import benchmark_timing as timing
from tools import benchmark_voting as voting
from tools import roofline
from tools.benchmark_session import Session, describe, make_session, measure_roof


def exponents(values: list[float], times: list[float]) -> list[float]:
    """The exponent e of times ~ values^e between each value and the next."""
    return (np.diff(np.log(times)) / np.diff(np.log(values))).tolist()


def sweeps(tiny: bool) -> dict[str, tuple[list[int], dict]]:
    """What is varied: name -> (values, the fixed rest)."""
    if tiny:
        rest = {"batch": 8, "size": 32}
        return {
            "batch": ([4, 16], rest),
            "resolution": ([32, 64], rest),
            "devices": ([1, 2], rest),
            "images": ([32, 128], rest),
            "k": ([4, 16], {"images": 1, "size": 32}),
        }
    small = jax.default_backend() == "cpu"
    rest = {"batch": 4 if small else 64, "size": 224}
    return {
        "batch": ([1, 2, 4, 8] if small else [8, 16, 32, 64, 128, 256], rest),
        "resolution": ([64, 96, 128, 160, 224] if small else [96, 160, 224, 320], rest),
        "devices": ([1, 2, 4, 8], {**rest, "size": 64 if small else 224}),
        "images": ([64, 512, 4096], {**rest, "size": 64 if small else 224}),
        "k": ([4, 8, 16, 31], {"images": 1 if small else 16, "size": 224}),
    }


def make_program(name: str, value: int, rest: dict, model: dict) -> programs.Program:
    """The program of one point of one sweep: the full step, or all votes."""
    if name == "k":
        return voting.tta_programs(("all",), **rest, **model, **{"tta.k": value})["all"]
    shape = dict(rest)
    if name == "batch":
        shape["batch"] = value
    elif name == "resolution":
        shape["size"] = value
    elif name == "images":
        shape["count"] = value
    else:
        shape |= {"devices": value, "batch": value * rest["batch"]}
    return programs.step_program(**shape, **programs.FULL, **model)


def floor_ms(name: str, value: int, rest: dict, session: Session) -> float | None:
    """Milliseconds that the kernels of a ResNet-50 need for a point at best."""
    if session.model != "resnet50" or name not in ("batch", "resolution", "k"):
        return None
    machine, itemsize = session.machine, session.itemsize
    if name == "k":
        batch = (1 + value) * rest["images"]
        shape = {"batch": batch, "itemsize": itemsize, "size": rest["size"]}
        return batch * roofline.floor_us("infer_folded", machine, **shape) / 1e3
    shape = {**rest, "itemsize": itemsize}
    shape["batch" if name == "batch" else "size"] = value
    works = [roofline.floor_us(w, machine, **shape) for w in ("train", "forward")]
    update = roofline.optimizer_us(machine, batch=shape["batch"])
    return shape["batch"] * (sum(works) + update) / 1e3


def measure(name: str, values: list[int], rest: dict, session: Session) -> dict:
    """One sweep: its points take turns, so that drift hits all alike."""
    made = {v: make_program(name, v, rest, session.fields) for v in values}
    contenders = [timing.Contender(str(v), made[v].run) for v in values]
    rounds = session.interleave(contenders, warmup=2)
    taken = [timing.times(rounds, str(v)) for v in values]
    floors = [floor_ms(name, v, rest, session) for v in values]
    times = [t["p50"] for t in taken]
    return {
        "values": values,
        "fixed": rest,
        "ms": times,
        "min": [t["min"] for t in taken],
        "max": [t["max"] for t in taken],
        "floor_ms": None if None in floors else floors,
        "exponents": exponents(values, times),
        "foreign_load": [timing.foreign_load(rounds, str(v)) for v in values],
        "peak_bytes": [made[v].about["peak_bytes"] for v in values],
    }


def print_sweep(name: str, sweep: dict) -> None:
    parts = [f"{v}: {t:.1f}" for v, t in zip(sweep["values"], sweep["ms"], strict=True)]
    slopes = ", ".join(f"{e:.2f}" for e in sweep["exponents"])
    print(f"{name:10} ms at {', '.join(parts)}; exponents {slopes}", flush=True)


def plot(result: dict, path: Path) -> None:
    """One panel per sweep, log-log: range and median, and the floor where known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, ScalarFormatter

    found = result["sweeps"]
    figure, panels = plt.subplots(1, len(found), figsize=(3.2 * len(found), 3.2))
    for panel, (name, sweep) in zip(np.atleast_1d(panels), found.items(), strict=True):
        values, times = sweep["values"], np.array(sweep["ms"])
        spread = [times - sweep["min"], np.array(sweep["max"]) - times]
        panel.errorbar(values, times, spread, fmt="o-", color="black", capsize=2)
        low = times.min()
        if floor := sweep["floor_ms"]:
            panel.plot(values, floor, ":", color="black")
            place = (values[-1], floor[-1])
            shift = {"xytext": (0, -9), "textcoords": "offset points"}
            panel.annotate("floor", place, **shift, ha="right", va="top")
            low = min(floor)
        slopes = ", ".join(f"{e:.2f}" for e in sweep["exponents"])
        panel.set(xscale="log", yscale="log", xlabel=name)
        panel.set_title(f"exponents {slopes}", fontsize=9)
        panel.set_xticks(values, [str(v) for v in values])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.minorticks_off()
        panel.set_ylim(low / 2, 2 * times.max())
    np.atleast_1d(panels)[0].set_ylabel("ms")
    dtype, kind = result["dtype"], result["device"]["kind"]
    cpu = result["host"]["cpu"] if kind == "cpu" else kind
    figure.suptitle(f"{result['model']}, {dtype}, {cpu}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.scaling")
    parser.add_argument("--tiny", action="store_true", help="tiny network, seconds")
    parser.add_argument("--out", type=Path, default=Path("experiments/results"))
    parser.add_argument("--budget_s", type=float, default=600.0)
    given = parser.parse_args(arguments)
    host.keep_freed_memory()
    jax.config.update("jax_num_cpu_devices", 2 if given.tiny else 8)
    session = make_session(
        model="tiny" if given.tiny else "resnet50",
        deadline=time.monotonic() + given.budget_s,
    )
    session.calls = min(session.calls, 20)
    measure_roof(session)
    found = {}
    for name, (values, rest) in sweeps(given.tiny).items():
        if name == "devices":
            values = [v for v in values if v <= jax.device_count()]
        if len(values) > 1 and session.time_left(name):
            found[name] = measure(name, values, rest, session)
            print_sweep(name, found[name])
    result = describe(session) | {
        "model": session.model,
        "dtype": session.dtype,
        "sweeps": found,
    }
    del result["rows"]
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"scaling_{jax.default_backend()}"
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, path.with_suffix(".png"))
    print(f"written: {path}.json and .png")


if __name__ == "__main__":
    main(sys.argv[1:])
