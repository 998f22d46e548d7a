"""One of two processes is killed: the other ends soon, and both can go on."""

import socket
import time

import pytest
from training_process import Training

BOUND_S = 30  # Of the timeout of 20 s, and the end of the process.


def pair(workdir):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    arguments = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    arguments += ["--host_timeout_s=20"]
    return [Training(workdir, *arguments, f"--process_id={i}") for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_ends_and_both_continue(tmp_path, victim):
    workdir = tmp_path / "run"
    hosts = pair(workdir)
    hosts[0].wait_for_checkpoint(workdir)
    hosts[victim].process.kill()
    begun = time.monotonic()
    survivor = hosts[1 - victim]
    assert survivor.end() == 1, survivor.output
    assert time.monotonic() - begun < BOUND_S
    assert f"error: process {victim} of 2 is gone" in survivor.output
    if victim == 1:  # Where the coordinator is gone, JAX may have its say first.
        survivor.one_line("^error: process 1 of 2 is gone .*same command continues$")
    hosts = pair(workdir)
    for training in hosts:
        training.succeed()
    assert "continuing" in hosts[0].output
