"""python -m experiments.gpu_report [--tiny] [--json=FILE] [--budget_s=450]

Everything that the project promises of a GPU, measured in one go on one card from a
clean tree: no network, no data set (images are synthetic), PyTorch only if it is there.
Writes one JSON with the benchmark's rows, the evidence in the compiled programs and a
line per target. A section that fails is recorded with its error and the rest goes on.
With --tiny the same code runs on a small network in about a minute, on a CPU too.
"""

import argparse
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from tools import benchmark_peer
from tools import benchmark_programs as programs
from tools.benchmark_parts import measure_ops
from tools.benchmark_session import Session, describe, make_session, measure_roof
from tools.benchmark_suites import measure_steps, measure_tta
from tools.benchmark_voting import tta_programs

# Sites A and B together, the paper's training images, and its epochs.
IMAGES, EPOCHS, BATCH = 2383, 200, 64
LARGE_COPY = 1 << 20  # Bytes from which a transpose or copy is worth a line.
TYPE_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "u8": 1, "pred": 1}


class Target:
    """One promised figure: `value` of the report against `must` and `stretch`."""

    def __init__(self, name: str, must: float, stretch: float, at_most: bool = False):
        self.name, self.must, self.stretch, self.at_most = name, must, stretch, at_most

    def judge(self, value: float | None) -> dict:
        reached = "not measured"
        if value is not None:
            sign = -1 if self.at_most else 1
            reached = "missed"
            for level in ("must", "stretch"):
                if sign * value >= sign * getattr(self, level):
                    reached = level
        return {
            "target": self.name,
            "must": self.must,
            "stretch": self.stretch,
            "measured": value,
            "reached": reached,
        }


TARGETS = (
    Target("plain step, batch 256, images/s", 6500, 8200),
    Target("plain step, batch 32, images/s", 4000, 6000),
    Target("full step, batch 256, images/s", 5500, 6900),
    Target("class-map overhead, batch 256, %", 25, 20, at_most=True),
    Target("voting, all 32 forwards, images/s", 800, 1300),
    Target("voting, early exit over all", 1.6, 1.9),
    Target("full step over the published behaviour", 3.0, 5.0),
    Target("full step over fair eager", 1.0, 1.3),
    Target("full step over fair compiled", 0.9, 1.05),
    Target("cold compile, s", 120, 60, at_most=True),
    Target("cached compile, s", 15, 5, at_most=True),
    Target("200 epochs of sites A+B, s", 90, 90, at_most=True),
)


def measure_compile(session: Session, report: dict) -> None:
    """Seconds to compile the full step, cold and from the persistent cache."""
    seconds = {}
    for name in ("cold", "cached"):
        jax.clear_caches()
        program = full_program(session)
        about = program.about
        seconds[f"{name}_s"] = about["trace_s"] + about["compile_s"]
        seconds[f"{name}_hit"] = about["cache_hit"]
    report["compile"] = seconds
    report["hlo"]["train"] = examine(program.hlo) | {
        name: program.about[name]
        for name in ("donated_bytes", "state_bytes", "peak_bytes")
    }


def full_program(session: Session, **fields) -> programs.Program:
    return programs.step_program(
        batch=min(session.batches),
        size=session.size,
        **{**session.fields, **programs.FULL, **programs.EVAL_MAPS, **fields},
    )


def examine(hlo: str) -> dict:
    """What to look for in an optimised program's text."""
    lines = hlo.splitlines()

    def count(pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in lines)

    large = []
    for line in lines:
        match = re.search(r"= (\w+)\[([\d,]+)\]\S* (transpose|copy)\(", line)
        if match:
            size = TYPE_BYTES.get(match[1], 4)
            for side in match[2].split(","):
                size *= int(side)
            if size > LARGE_COPY:
                large.append(f"{match[3]} {match[1]}[{match[2]}]")
    return {
        "convolutions": count(r"custom-call.*__cudnn\$conv|= \S+ convolution\("),
        "fused_convolutions": count(
            r"__cudnn\$convBiasActivationForward|__cudnn\$fusion"
        ),
        "fusions": count(r" fusion\("),
        "select_and_scatter": count(r" select-and-scatter\("),
        "all_reduces": count(r" all-reduce(-start)?\("),
        "all_gathers": count(r" all-gather(-start)?\("),
        "large_copies": large,
    }


def measure_folded(session: Session, report: dict) -> None:
    """The evaluation forward pass: batch norm folded, so no kernel of its own."""
    made = tta_programs(
        ("all",),
        images=session.voting_images,
        size=session.size,
        **{**session.fields, "tta.k": 1},
    )
    # Two forward passes: of the images, and of their one mask.
    report["hlo"]["voting_k1"] = examine(made["all"].hlo)


def measure_training(session: Session, report: dict) -> None:
    """200 epochs of sites A and B, from a part of them that is really run.

    Whole dispatches of `steps_per_call` steps, augmentation and all, as `train` does.
    """
    tiny = session.model == "tiny"
    batch, images = (8, 64) if tiny else (BATCH, IMAGES)
    per_call, calls = (4, 2) if tiny else (50, 6)
    program = programs.epoch_program(
        "device",
        batch=batch,
        count=images,
        **session.fields,
        **programs.EVAL_MAPS,
        **{
            "data.image_size": session.size,
            "data.resize": session.size * 8 // 7,
            "train.steps_per_call": per_call,
        },
    )
    program.run(1)
    start = time.perf_counter()
    program.run(calls)
    per_step = (time.perf_counter() - start) / (calls * per_call)
    steps = EPOCHS * (images // batch)
    report["training"] = {
        "images": images,
        "batch": batch,
        "steps_run": calls * per_call,
        "images_per_s": batch / per_step,
        "epochs": EPOCHS,
        "projected_s": steps * per_step,
    }


def find(rows: list[dict], suite: str, variant: str, batch: int) -> dict:
    for row in rows:
        if (row["suite"], row["variant"], row["bs"]) == (suite, variant, batch):
            return row
    return {}


def judge(report: dict, batches: tuple[int, ...], voting_images: int) -> list[dict]:
    """One line per target, from the report's rows."""
    rows = report["benchmark"]["rows"]
    small, large = min(batches), max(batches)
    plain = {b: find(rows, "step_plain", "plain", b) for b in batches}
    full = {b: find(rows, "step_full", "full, eval maps", b) for b in batches}
    voting = {
        kind: find(rows, "tta", kind, voting_images).get("img_s")
        for kind in ("all", "early_unanimous")
    }

    def over(name):
        return full[large].get("ratios", {}).get(name, {}).get("median")

    overhead = gain = None
    if plain[large] and full[large]:
        overhead = 100 * (plain[large]["img_s"] / full[large]["img_s"] - 1)
    if all(voting.values()):
        gain = voting["early_unanimous"] / voting["all"]
    measured = (
        plain[large].get("img_s"),
        plain[small].get("img_s"),
        full[large].get("img_s"),
        overhead,
        voting["all"],
        gain,
        over("published"),
        over("fair_eval"),
        over("fair_eval, compiled"),
        report.get("compile", {}).get("cold_s"),
        report.get("compile", {}).get("cached_s"),
        report.get("training", {}).get("projected_s"),
    )
    return [
        target.judge(value) for target, value in zip(TARGETS, measured, strict=True)
    ]


def sections(session: Session, report: dict) -> dict[str, Callable[[], None]]:
    """What is measured, the most wanted first."""
    return {
        "roof": lambda: measure_roof(session),
        "compile": lambda: measure_compile(session, report),
        "plain": lambda: measure_steps(session, "step_plain"),
        "full": lambda: measure_steps(session, "step_full"),
        "voting": lambda: measure_tta(session),
        "training": lambda: measure_training(session, report),
        "folded": lambda: measure_folded(session, report),
        "operations": lambda: measure_ops(replace(session, repeats=2)),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu_report")
    parser.add_argument("--tiny", action="store_true", help="small, on any backend")
    parser.add_argument("--budget_s", type=float, default=450.0)
    parser.add_argument(
        "--json", type=Path, default=Path("experiments/results/gpu_report.json")
    )
    given = parser.parse_args(arguments)
    if jax.default_backend() == "cpu" and not given.tiny:
        sys.exit(
            "error: no accelerator here; --tiny runs the same code on a small network"
        )
    begun = time.monotonic()
    changes = {"deadline": begun + given.budget_s, "repeats": 3}
    if given.tiny:
        changes |= {"model": "tiny", "size": 32, "batches": (4, 8), "calls": 1}
    else:
        changes["peer"] = benchmark_peer.installed()
    session = make_session(**changes)
    report = {"hlo": {}, "errors": {}, "seconds": {}}
    # Empty at first, so that the first compilation is a cold one.
    cache = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", cache.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for name, section in sections(session, report).items():
        if not session.time_left(name):
            continue
        start = time.monotonic()
        try:
            section()
        except Exception as error:  # One failure must not cost the other figures.
            traceback.print_exc()
            report["errors"][name] = f"{type(error).__name__}: {error}"
        report["seconds"][name] = time.monotonic() - start
        print(f"[{name}: {report['seconds'][name]:.0f} s]", flush=True)
        report["benchmark"] = describe(session)
        report["targets"] = judge(report, session.batches, session.voting_images)
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    for line in report["targets"]:
        value = line["measured"]
        shown = "-" if value is None else f"{value:.4g}"
        print(f"{line['target']:42}{shown:>10}  must {line['must']}: {line['reached']}")
    print(f"{time.monotonic() - begun:.0f} s; written: {given.json}")
    sys.exit(bool(report["errors"]))


if __name__ == "__main__":
    main(sys.argv[1:])
