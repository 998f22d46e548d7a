"""The peer runs in a process of its own, as its users would run it.

In one process the two would share a heap and a pool of threads, and each would leave
the other's caches, pages and spinning threads as it found them useful.
"""

import importlib.util
import multiprocessing
import time
from collections.abc import Callable

import jax

# Our backbones that PyTorch has too -> their name in timm.
NETWORKS = {
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "densenet121": "densenet121",
}


def installed() -> bool:
    """Whether there is what the PyTorch peer needs."""
    return all(importlib.util.find_spec(name) for name in ("torch", "timm"))


def where() -> str:
    """PyTorch's name of the kind of device that JAX computes on."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


class Peer:
    """Something that `make(**options)` builds in another process.

    `about` is what its result told of itself before the first run.

    Args:
      make: picklable; returns `run(count) -> picklable`, perhaps with a dict
        `run.about`. What stands for the count is between the two.

    Raises:
      RuntimeError: if it cannot be built; the error is printed by that process.
    """

    def __init__(self, make: Callable, **options):
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(there, make, options), daemon=True
        )
        self._process.start()
        there.close()  # So that the end of that process is noticed here.
        self.about, self.cpu_seconds = self._receive()

    def run(self, count: int):
        """`run(count)` over there; waits for its result."""
        self._here.send(count)
        result, self.cpu_seconds = self._receive()
        return result

    def cpu(self) -> float:
        """CPU seconds that the other process had used when it last answered."""
        return self.cpu_seconds

    def close(self) -> None:
        """Ends the process and waits until its memory is free."""
        self._here.close()
        self._process.join()

    def _receive(self) -> tuple:
        try:
            return self._here.recv()
        except EOFError:
            raise RuntimeError(
                "the peer's process ended; what it printed says why"
            ) from None


def _serve(pipe, make: Callable, options: dict) -> None:
    run = make(**options)
    pipe.send((getattr(run, "about", {}), time.process_time()))
    while True:
        try:
            count = pipe.recv()
        except EOFError:
            return
        result = run(count)
        pipe.send((result, time.process_time()))
