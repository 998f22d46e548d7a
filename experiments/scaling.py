"""python -m experiments.scaling [--tiny] [--out=DIR]

Milliseconds per step against batch, resolution, devices and images in the data set, and
milliseconds per image of test-time voting against k; each with its exponent, the slope
in log-log coordinates (1 is linear), written as JSON and one figure.

Where the cost is not linear, and why:
  batch       below 1 at small batches: launching some 900 kernels and the optimiser's
              pass over all weights do not depend on the batch;
  resolution  2 in the side, less where a stage's map no longer fills the device;
  devices     (weak scaling, batch per device fixed) 0 on real ones, as gradients are
              reduced while the backward pass goes on; virtual CPU devices share the
              cores, so there it is 1 and shows correctness alone;
  images      0: the split lies on the device and a step gathers its batch;
  k           1: every mask is a forward pass.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np


def log_slope(values: list[float], times: list[float]) -> float:
    """The exponent e of times ~ values^e, by least squares."""
    return float(np.polyfit(np.log(values), np.log(times), 1)[0])


def milliseconds(program, *, calls: int, repeats: int) -> float:
    """Median over `repeats` samples of `calls` calls, after one warm-up."""
    program.run(1)
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        program.run(calls)
        samples.append(1e3 * (time.perf_counter() - start) / calls)
    return statistics.median(samples)


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
        "resolution": ([64, 96, 128, 224] if small else [96, 160, 224, 320], rest),
        "devices": ([1, 2, 4, 8], {**rest, "size": 64 if small else 224}),
        "images": ([64, 512, 4096], {**rest, "size": 64 if small else 224}),
        "k": ([4, 8, 16, 31], {"images": 1 if small else 16, "size": 224}),
    }


def measure(name: str, value: int, rest: dict, model: dict) -> float:
    """Milliseconds of one point of one sweep."""
    from tools import benchmark_programs as programs

    if name == "k":
        program = programs.tta_programs(("all",), **rest, **model, **{"tta.k": value})
        return milliseconds(program["all"], calls=1, repeats=3)
    shape, fields = dict(rest), {**programs.FULL, **model}
    if name == "batch":
        shape["batch"] = value
    elif name == "resolution":
        shape["size"] = value
    elif name == "images":
        shape["count"] = value
    else:
        shape |= {"devices": value, "batch": value * rest["batch"]}
    calls = 2 if jax.default_backend() == "cpu" else 20
    return milliseconds(
        programs.step_program(**shape, **fields), calls=calls, repeats=3
    )


def plot(result: dict, path: Path) -> None:
    """One panel per sweep, log-log, with the exponent in its title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = result["sweeps"]
    figure, panels = plt.subplots(1, len(found), figsize=(3.2 * len(found), 3))
    for panel, (name, sweep) in zip(panels, found.items(), strict=True):
        panel.loglog(sweep["values"], sweep["ms"], "o-", color="black")
        panel.set_title(f"{name}: exponent {sweep['exponent']:.2f}", fontsize=10)
        panel.set_xticks(sweep["values"], [str(v) for v in sweep["values"]])
        panel.minorticks_off()
        panel.set_ylim(min(sweep["ms"]) / 2, max(sweep["ms"]) * 2)
    panels[0].set_ylabel("ms")
    figure.suptitle(f"{result['model']} on {result['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.scaling")
    parser.add_argument("--tiny", action="store_true", help="tiny network, seconds")
    parser.add_argument("--out", type=Path, default=Path("experiments/results"))
    parser.add_argument("--budget_s", type=float, default=600.0)
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + given.budget_s
    jax.config.update("jax_num_cpu_devices", 2 if given.tiny else 8)
    on_cpu = jax.default_backend() == "cpu"
    model = {
        "model.name": "tiny" if given.tiny else "resnet50",
        "model.dtype": "float32" if on_cpu else "bfloat16",
    }
    result = {
        "device": jax.devices()[0].device_kind,
        "model": model["model.name"],
        "dtype": model["model.dtype"],
        "sweeps": {},
        "skipped": [],
    }
    for name, (values, rest) in sweeps(given.tiny).items():
        if name == "devices":
            values = [v for v in values if v <= jax.device_count()]
        if len(values) < 2 or time.monotonic() > deadline:
            result["skipped"].append(name)
            continue
        times = [measure(name, value, rest, model) for value in values]
        exponent = log_slope(values, times)
        result["sweeps"][name] = {"values": values, "ms": times, "exponent": exponent}
        shown = ", ".join(
            f"{v}: {t:.1f} ms" for v, t in zip(values, times, strict=True)
        )
        print(f"{name:10} {shown}; exponent {exponent:.2f}", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    name = f"scaling_{jax.default_backend()}"
    (given.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, given.out / f"{name}.png")
    print(f"written: {given.out / name}.json and .png")


if __name__ == "__main__":
    main(sys.argv[1:])
