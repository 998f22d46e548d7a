"""python -m experiments.growth [--devices 1 8 64 256] [--json=FILE]

What a pod would have to do, from the compiled program alone: the full step of the tiny
network is compiled for that many virtual CPU devices, never run, and its collectives
are counted with their bytes. Beside it a model of a ResNet-50's step on machines that
nobody has measured: the roofline floor of a device at an assumed share, all-reduces of
the gradients by bandwidth and of batch norm's statistics by latency. Rates are the
vendors'; everything assumed is written beside the result.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from tools import benchmark_programs as programs
from tools import roofline
from tools.benchmark_session import describe, make_session

BYTES = {"pred": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
SIZE = 32  # Pixels; sums of gradients and statistics have no pixels.
PER_DEVICE = 2  # Images.
SHARE = 0.6  # Of the floor that a device attains: the target of gpu_report.py.
WEIGHTS = 23_512_130  # Of a ResNet-50 with two classes.
# A norm sums two values a channel forward and two backward, one after the other.
NORM_CHANNELS, NORMS = 26_560, 53


class Pod(NamedTuple):
    """A machine as its vendor describes it."""

    name: str
    devices: int
    batch: int  # Images per device.
    device: roofline.Machine
    link_bytes_per_s: float  # Into and out of a device at once, one direction.
    latency_s: float  # Of one small all-reduce over all devices.


PODS = (
    # 3.35 TB/s and 989 TFLOP/s dense bfloat16; NVLink 4 450 GB/s a direction.
    Pod("H100 node", 8, 256, roofline.Machine(3.35e12, 9.89e14), 4.5e11, 15e-6),
    # 819 GB/s and 197 TFLOP/s; two axes of the 16 x 16 torus, 90 GB/s each; a
    # microsecond a hop, 8 hops an axis, there and back on both.
    Pod("v5e-256", 256, 64, roofline.Machine(8.19e11, 1.97e14), 1.8e11, 32e-6),
)


def collectives(hlo: str) -> dict[str, dict]:
    """Operation -> how many there are, their bytes in all, and the largest array."""
    found, numbers = {}, Counter()
    for line in hlo.splitlines():
        match = re.search(rf" = (.*?) ({KINDS})(-start)?\(", line)
        if not match:
            continue
        for array, kind, shape in re.findall(r"((\w+)\[([\d,]*)\])", match[1]):
            sides = [int(side) for side in shape.split(",") if side]
            size = BYTES[kind] * int(np.prod(sides, initial=1))
            found.setdefault(match[2], []).append((size, array))
        numbers[match[2]] += 1
    return {
        name: {
            "number": numbers[name],
            "bytes": sum(size for size, _ in arrays),
            "largest": max(arrays)[1],
        }
        for name, arrays in found.items()
    }


def compile_for(devices: int) -> dict:
    """Collectives of the full step over all devices of this process."""
    begun = time.monotonic()
    program = programs.step_program(
        batch=PER_DEVICE * devices,
        size=SIZE,
        devices=devices,
        count=PER_DEVICE * devices,
        **programs.FULL,
        **{"model.name": "tiny"},
    )
    return {
        "devices": devices,
        "batch": PER_DEVICE * devices,
        "collectives": collectives(program.hlo),
        "state_bytes": program.about["state_bytes"],
        "seconds": time.monotonic() - begun,
    }


def model(pod: Pod) -> dict:
    """Seconds of a ResNet-50's plain step, bfloat16, gradients summed in float32.

    A ring or a torus moves 2 (N - 1) / N of the bytes over each link. Gradients travel
    while the backward pass goes on, at best entirely (`hidden`), at worst not at all
    (`exposed`); a norm waits for its statistics in both.
    """
    shape = {"batch": pod.batch, "itemsize": 2}
    floor = pod.batch * 1e-6 * roofline.floor_us("train", pod.device, **shape)
    update = pod.batch * 1e-6 * roofline.optimizer_us(pod.device, batch=pod.batch)
    alone = floor / SHARE + update
    ring = 2 * (pod.devices - 1) / pod.devices
    gradients = ring * 4 * WEIGHTS / pod.link_bytes_per_s
    statistics = 2 * NORMS * pod.latency_s
    statistics += ring * 4 * 4 * NORM_CHANNELS / pod.link_bytes_per_s
    seconds = {
        "one device": alone,
        "hidden": statistics + max(alone, gradients),
        "exposed": statistics + alone + gradients,
    }
    images = pod.devices * pod.batch
    return {
        "pod": pod.name,
        "assumed": {**pod._asdict(), "device": pod.device._asdict(), "share": SHARE},
        "gradients_ms": 1e3 * gradients,
        "statistics_ms": 1e3 * statistics,
        "step_ms": {name: 1e3 * value for name, value in seconds.items()},
        "images_per_s": {
            name: images / seconds[name] for name in ("hidden", "exposed")
        },
        "efficiency": {name: alone / seconds[name] for name in ("hidden", "exposed")},
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.growth")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument(
        "--json", type=Path, default=Path("experiments/results/growth.json")
    )
    parser.add_argument("--here", action="store_true", help="for this process alone")
    given = parser.parse_args(arguments)
    if given.here:
        print(json.dumps(compile_for(jax.device_count())))
        return
    programs_of = []
    for devices in given.devices:  # Their number is fixed when a process starts.
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "experiments.growth", "--here"]
        done = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        programs_of.append(json.loads(done.stdout.splitlines()[-1]))
        print(programs_of[-1], flush=True)
    result = describe(make_session(model="tiny", size=SIZE))
    result = {name: result[name] for name in ("git", "time", "host", "versions")}
    result |= {"network": "tiny", "pixels": SIZE, "programs": programs_of}
    result["model"] = [model(pod) for pod in PODS]
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    for one in result["model"]:
        print(one["pod"], one["step_ms"], one["efficiency"])
    print(f"written: {given.json}")


if __name__ == "__main__":
    main(sys.argv[1:])
