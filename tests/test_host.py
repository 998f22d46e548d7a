import os
import subprocess
import sys

import pytest

from cxai_jax import host

PROGRAM = """
import resource
from cxai_jax import host

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * (1 << 27)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = host.keep_freed_memory()
print(int(kept), faults(), faults())
"""


def test_memory_that_was_freed_is_not_faulted_in_again():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    kept, first, second = map(int, run.stdout.split())
    if not kept:
        pytest.skip("not glibc")
    assert second <= first / 10 and first > 10


def test_programs_too_large_to_keep_give_their_memory_back():
    text = PROGRAM.replace(
        "print(",
        "assert host.limit(1)\nassert not host.limit(1 << 60)\nprint(",
    )
    run = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True
    )
    kept, first, second = map(int, run.stdout.split())
    if not kept:
        pytest.skip("not glibc")
    assert second >= first / 2 and first > 10


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(host.ctypes, "CDLL", lambda _: object())
    assert not host.keep_freed_memory()


def test_deterministic_sets_the_flag_or_says_that_it_is_too_late(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    monkeypatch.setattr(host.xla_bridge, "backends_are_initialized", lambda: True)
    monkeypatch.setattr(host.jax, "default_backend", lambda: "cpu")
    host.be_deterministic()  # A CPU needs no flag.
    monkeypatch.setattr(host.jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="too late, .* XLA_FLAGS=--xla_gpu_determ"):
        host.be_deterministic()
    monkeypatch.setattr(host.xla_bridge, "backends_are_initialized", lambda: False)
    for _ in range(2):
        host.be_deterministic()
        flags = "--xla_a=1 --xla_gpu_deterministic_ops=true"
        assert os.environ["XLA_FLAGS"] == flags
