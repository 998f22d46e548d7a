"""python -m tools.benchmark [suite ...] [--peer=torch] [--json=FILE] [--budget_s=300]

How fast training and testing are here, as a share of what the machine allows: the
headline is "% of floor", the time that a ResNet-50's kernels need at the measured copy
and matrix-product rates (tools/roofline.py), over the time taken. Beside it stand
ratios, taken within interleaved rounds, to the plain lowering and to PyTorch
(tools/peer_torch.py, networks of timm). Rows on a CPU that others used meanwhile say
"noisy".
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax

from cxai_jax import host
from tools.benchmark_peer import NETWORKS
from tools.benchmark_session import (
    Session,
    describe,
    make_session,
    measure_roof,
    smoke_session,
)
from tools.benchmark_suites import SUITES


def run_suites(session: Session, suites: list[str]) -> dict:
    """Measures the roof and then each suite; returns what `--json` writes."""
    measure_roof(session)
    print(
        f"{jax.devices()[0].device_kind}, {session.dtype}: "
        + ", ".join(f"{name} {value:.4g}" for name, value in session.roof.items()),
        flush=True,
    )
    for suite in suites:
        SUITES[suite](session)
    if session.skipped:
        print("out of time, skipped: " + "; ".join(session.skipped), flush=True)
    return describe(session)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark")
    known = list(SUITES)
    parser.add_argument("suites", nargs="*", help=f"default smoke; {', '.join(known)}")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu", "tpu"), default="auto"
    )
    parser.add_argument("--peer", choices=("none", "torch"), default="none")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--budget_s", type=float, default=300.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--malloc",
        choices=("keep", "default"),
        default="keep",
        help="default: freed memory goes back to the kernel (host.py)",
    )
    parser.add_argument("--size", type=int, default=224, help="pixels, not of smoke")
    parser.add_argument(
        "--model", default="resnet50", help="not of smoke, infer and conv"
    )
    given = parser.parse_args(arguments)
    suites = given.suites or ["smoke"]
    if unknown := set(suites) - set(known):
        parser.error(f"unknown suite {sorted(unknown)[0]!r}; known: {', '.join(known)}")
    if given.peer != "none" and given.model not in NETWORKS:
        parser.error(f"--peer has no {given.model}; supported: {', '.join(NETWORKS)}")
    if given.device != "auto":
        name = "cuda" if given.device == "gpu" else given.device
        jax.config.update("jax_platforms", name)
    host.one_device_a_core()
    if given.malloc == "keep":
        host.keep_freed_memory()
    deadline = time.monotonic() + given.budget_s
    if suites == ["smoke"]:
        session = smoke_session()
        session.deadline = deadline
    else:
        session = make_session(
            deadline=deadline,
            peer=given.peer == "torch",
            repeats=given.repeats,
            size=given.size,
            model=given.model,
        )
    result = run_suites(session, suites)
    result["flags"]["malloc"] = given.malloc
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {given.json}")
    return int(any(row["wrong"] for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
