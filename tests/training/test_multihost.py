"""Two processes on loopback train together, through the same `train` as one does.

Each holds two virtual devices and reads its own half of every batch; they write one
checkpoint, which a single process then restores on another number of devices. This
file is also the program that the subprocesses run.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).parents[2]
TIMEOUT = 900  # Seconds; a process that lost its partner would wait for ever.
MARK = "result: "  # The collectives library prints lines of its own.


def tiny_config(residency: str):
    from small import small

    fields = {"data.residency": residency, "mix.groups": 4, "train.epochs": 1.0}
    return small(**fields, **{"train.checkpoint_every_epochs": 0.0, "tta.k": 0})


def work(action: str, workdir: str, residency: str) -> None:
    """Runs in a subprocess: trains, or scores what was trained."""
    import jax
    from jax.experimental import multihost_utils

    jax.config.update("jax_num_cpu_devices", int(os.environ["TEST_DEVICES"]))
    if action == "train":
        jax.distributed.initialize(
            os.environ["TEST_COORDINATOR"], 2, int(os.environ["TEST_PROCESS"])
        )
        # Connects the hosts now, while they are in step: the first collective waits
        # 30 s for the others, and on a busy machine compilation takes them further
        # apart than that.
        multihost_utils.sync_global_devices("joined")
    from cxai_jax.training import loop

    run = {"train": loop.train, "score": loop.score}[action]
    results = run(tiny_config(residency), Path(workdir))
    about = {
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "local_devices": jax.local_device_count(),
        "steps": results["steps"],
        "residency": results.get("time", {}).get("residency"),
    }
    print(MARK + json.dumps(about), flush=True)


def start(action: str, workdir: Path, residency: str, *, devices: int, **names):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Compiling is what takes the time.
        "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
        "TEST_DEVICES": str(devices),
        **names,
    }
    return subprocess.Popen(
        [sys.executable, __file__, action, str(workdir), residency],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPO,
    )


def finish(*processes) -> list[dict]:
    """What each process reported; a failure shows the output of all of them."""
    outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    told = "\n---- other process ----\n".join(output[-4000:] for output in outputs)
    assert all(process.returncode == 0 for process in processes), told
    marked = [
        [line for line in output.splitlines() if MARK in line] for output in outputs
    ]
    return [json.loads(lines[-1].partition(MARK)[2]) for lines in marked]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def train_on_two_hosts(workdir: Path, residency: str) -> list[dict]:
    coordinator = f"localhost:{free_port()}"
    hosts = [
        start(
            "train",
            workdir,
            residency,
            devices=2,
            TEST_COORDINATOR=coordinator,
            TEST_PROCESS=str(i),
        )
        for i in range(2)
    ]
    try:
        return finish(*hosts)
    finally:
        for host in hosts:
            host.kill()


def losses(workdir: Path) -> list[float]:
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    found = {}
    for residency in ("device", "host"):
        workdir = folder / residency
        found[residency] = (workdir, train_on_two_hosts(workdir, residency))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("residency", ["device", "host"])
def test_two_processes_train_together(runs, residency):
    workdir, hosts = runs[residency]
    for about in hosts:
        assert (about["processes"], about["local_devices"]) == (2, 2)
        assert about["residency"] == residency
    # One writer: every step is logged once, and one results file tells the story.
    assert len(losses(workdir)) == hosts[0]["steps"] > 1
    results = json.loads((workdir / "results.json").read_text())
    assert results["device"]["hosts"] == 2
    assert results["device"]["count"] == 4


@pytest.mark.slow
def test_both_residencies_feed_the_same_batches(runs):
    device, host = (losses(runs[name][0]) for name in ("device", "host"))
    assert device == pytest.approx(host, rel=1e-4)


@pytest.mark.slow
def test_checkpoint_restores_on_another_number_of_devices(runs):
    workdir, hosts = runs["device"]
    path = workdir / "predictions_test.npz"
    with np.load(path) as file:
        before = dict(file)
    path.unlink()
    (about,) = finish(start("score", workdir, "device", devices=1))
    assert (about["processes"], about["devices"]) == (1, 1)
    assert about["steps"] == hosts[0]["steps"]
    with np.load(path) as file:
        np.testing.assert_array_equal(file["names"], before["names"])
        np.testing.assert_allclose(
            file["logits"], before["logits"], rtol=1e-4, atol=1e-5
        )


if __name__ == "__main__":
    work(*sys.argv[1:])
