"""The process of the benchmark's peer: results, CPU time and the end of both sides."""

import time

import pytest

from tools.benchmark_peer import Peer
from tools.benchmark_timing import Contender, take_sample


def make_adder(start):
    total = start

    def run(count):
        nonlocal total
        total += count
        return total

    return run


def make_burner():
    def run(count):
        end = time.process_time() + 0.05 * count
        while time.process_time() < end:
            pass

    return run


def make_failure():
    raise ValueError("this peer cannot be built")


def test_calls_reach_one_lasting_function():
    peer = Peer(make_adder, start=10)
    assert [peer.run(1), peer.run(2)] == [11, 13]
    peer.close()
    assert not peer._process.is_alive()


def test_its_work_counts_as_own_and_not_as_foreign():
    peer = Peer(make_burner)
    sample = take_sample(Contender("peer", peer.run, peer.cpu), calls=4)
    peer.close()
    assert sample.cpu >= 0.05


def test_a_peer_that_cannot_be_built_is_an_error(capfd):
    with pytest.raises(RuntimeError, match="peer's process ended"):
        Peer(make_failure)
    assert "this peer cannot be built" in capfd.readouterr().err
