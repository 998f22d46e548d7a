"""The process and its machine: memory, cores and what must be the same every time.

Freed host memory stays with the process, for XLA's CPU backend takes it anew. Every
execution of a program on CPU allocates its temporaries, 0.9 GB for a training step of a
ResNet-50 at batch 8, and frees them at its end. By default glibc returns blocks of this
size to the kernel, which clears every page again at the next step: 0.2 million page
faults, a twentieth of the step's time and a fifth of an EfficientNet-Lite0's
(experiments/results/benchmark_cpu*_default_malloc.json).
"""

import ctypes
import os

import jax
from jax._src import xla_bridge  # There is no public way to ask what has begun.

# Parameters of mallopt(3), from malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8
SETTINGS = {
    ARENA_MAX: 1,  # Other arenas than the main one cannot grow to such blocks.
    MMAP_MAX: 0,  # Large blocks come from the heap as well,
    TRIM_THRESHOLD: -1,  # which is never given back
    TOP_PAD: 64 << 20,  # and grows by this many bytes at least.
}
DEFAULTS = {MMAP_MAX: 65536, TRIM_THRESHOLD: 128 << 10}
# A small block in a freed large one makes the next execution look for room elsewhere:
# up to four copies of a program's temporaries were seen in the heap.
COPIES = 4
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
MOST = 8  # Devices that a CPU becomes.
cores = 0  # How many it became by `one_device_a_core`.


def keep_freed_memory() -> bool:
    """Makes malloc keep what is freed; to be called before the first device is used.

    Threads that already exist may have arenas of their own, which stay as they are.

    Returns:
      Whether it did: the C library is glibc.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(*setting) for setting in SETTINGS.items())


def limit(temporaries: int) -> bool:
    """Undoes `keep_freed_memory` where it could use up the machine's memory.

    Args:
      temporaries: bytes that one execution of the program takes and frees.

    Returns:
      Whether freed memory is still kept: COPIES of it fit into half of the memory.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if COPIES * temporaries <= memory // 2:
        return True
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for setting in DEFAULTS.items():
            library.mallopt(*setting)
    return False


def one_device_a_core() -> None:
    """Makes a device of every core of a CPU, for mesh.py to score on side by side.

    A forward pass has parts that keep one core busy; how much two devices of two cores
    gain is "one device" in experiments/results/peer_infer_cpu.json. To be called before
    the first device is used; where somebody else has said how many devices a CPU is, by
    XLA_FLAGS or jax_num_cpu_devices, it stays so.
    """
    global cores
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if said or jax.config.jax_num_cpu_devices > 0:
        return
    if not xla_bridge.backends_are_initialized():
        cores = min(usable_cores(), MOST)
        jax.config.update("jax_num_cpu_devices", cores)


def usable_cores() -> int:
    """Cores that this process may run on; JAX starts as many threads."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def be_deterministic() -> None:
    """Makes XLA choose only what gives the same bits every time on one device type.

    To be called before the first device is used. Only GPUs have faster choices that do
    not: autotuning, atomic scatters, some of cuDNN's convolutions.

    Raises:
      ValueError: if a GPU is in use already and was started without.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if DETERMINISTIC in flags:
        return
    if not xla_bridge.backends_are_initialized():
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()
    elif jax.default_backend() == "gpu":
        raise ValueError(
            "config.deterministic=True comes too late, a GPU is in use already; set "
            f"XLA_FLAGS={DETERMINISTIC} before Python starts"
        )
