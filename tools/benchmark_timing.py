"""How the benchmark takes time: interleaved, paired, and gated on foreign load.

Contenders run in turn within a round, and the order of the next round is reversed, so
that drift of a shared machine hits all alike; ratios are taken within a round. One
sample is several calls with one wait at the end. On a CPU a sample counts as quiet if
other processes used less than a tenth of the machine while it ran. Where none is quiet,
CPU seconds say more than the clock: they count the own work alone, and on one core
(`taskset -c 0`) no thread spins while it waits for another.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

QUIET = 0.10  # Share of the machine that others may use during a sample.


class Sample(NamedTuple):
    """One sample: several calls and one wait."""

    seconds: float  # per call
    foreign: float  # share of the machine that other processes used
    cpu: float = 0.0  # CPU seconds of this process, per call


class Contender(NamedTuple):
    """Something to be timed. `run(calls)` makes the calls and waits for the last.

    `cpu()` is a clock of the CPU seconds of whatever process does the work.
    """

    name: str
    run: Callable[[int], object]
    cpu: Callable[[], float] = time.process_time


class Load:
    """CPU seconds: the machine's busy and total, and the own by the given clock."""

    def __init__(self, cpu: Callable[[], float] = time.process_time):
        self.own = cpu()
        try:
            with open("/proc/stat") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
        except OSError:  # Not Linux: the load of others is unknown.
            ticks = [0] * 8
        hertz = os.sysconf("SC_CLK_TCK")
        self.total = sum(ticks) / hertz
        self.busy = self.total - (ticks[3] + ticks[4]) / hertz  # idle, iowait

    def foreign_until(self, later: "Load") -> float:
        """Share of the machine that others used; 1.0 where it cannot be known."""
        total = later.total - self.total
        if total <= 0:
            return 1.0
        foreign = (later.busy - self.busy) - (later.own - self.own)
        return min(1.0, max(0.0, foreign / total))


def take_sample(contender: Contender, calls: int) -> Sample:
    """Times `calls` calls with one wait at the end."""
    before, start = Load(contender.cpu), time.perf_counter()
    contender.run(calls)
    seconds = time.perf_counter() - start
    after = Load(contender.cpu)
    cpu = (after.own - before.own) / calls
    return Sample(seconds / calls, before.foreign_until(after), cpu)


def interleave(
    contenders: list[Contender],
    *,
    calls: int,
    repeats: int,
    warmup: int = 1,
    deadline: float = float("inf"),
) -> list[dict[str, Sample]]:
    """Rounds of one sample per contender, in alternating order.

    Args:
      contenders: names must differ.
      calls: calls per sample.
      repeats: rounds at most; at least two are made, whatever the deadline.
      warmup: calls of each contender before the first round.
      deadline: `time.monotonic()` after which no further round begins.

    Returns:
      One dict per round, name -> Sample.
    """
    for contender in contenders:
        if warmup:
            contender.run(warmup)
    rounds = []
    for number in range(repeats):
        if number >= 2 and time.monotonic() > deadline:
            break
        ordered = contenders[::-1] if number % 2 else contenders
        rounds.append({c.name: take_sample(c, calls) for c in ordered})
    return rounds


def times(rounds: list[dict[str, Sample]], name: str) -> dict:
    """Milliseconds per call of one contender, and the median of its CPU time."""
    values = [1e3 * given[name].seconds for given in rounds]
    ordered = sorted(values)
    return {
        "p50": statistics.median(values),
        "p90": ordered[round(0.9 * (len(ordered) - 1))],
        "min": ordered[0],
        "max": ordered[-1],
        "all": values,
        "cpu_p50": statistics.median(1e3 * given[name].cpu for given in rounds),
    }


def paired_ratio(rounds: list[dict[str, Sample]], name: str, other: str) -> dict:
    """How many times faster `name` is than `other`, within each round.

    Only rounds in which both samples were quiet count, unless there are none. `cpu` is
    the same by CPU seconds, over all rounds (0 on systems that do not count them).
    """
    quiet = [r for r in rounds if max(r[name].foreign, r[other].foreign) < QUIET]
    used = quiet or rounds
    ratios = [given[other].seconds / given[name].seconds for given in used]
    cpu = [r[other].cpu / r[name].cpu for r in rounds if r[name].cpu > 0]
    return {
        "cpu": statistics.median(cpu or [0.0]),
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "rounds": len(ratios),
        "quiet": bool(quiet),
    }


def is_noisy(rounds: list[dict[str, Sample]], name: str) -> bool:
    """Whether less than half of a contender's samples were quiet."""
    quiet = sum(given[name].foreign < QUIET for given in rounds)
    return 2 * quiet < len(rounds)


def foreign_load(rounds: list[dict[str, Sample]], name: str) -> float:
    """Median share of the machine that others used during a contender's samples."""
    return statistics.median(given[name].foreign for given in rounds)
