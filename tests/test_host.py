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
