"""python -m experiments.road_cost [--images=8] [--size=224] [--json=FILE]

What ROAD's imputation costs: seconds to fill phantoms of which 10, 30, 50, 70 and 90 %
of the pixels are kept, the most and the least salient of smooth maps. The graph's
multigrid solver, a sparse direct solve of the same system (SciPy), and where
pytorch-grad-cam is installed (pip install grad-cam) its imputer, in turn, after their
values were compared. CPU seconds of the process stand beside the clock.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from scipy.sparse import diags_array, lil_array
from scipy.sparse.linalg import splu

from configs import demo
from cxai_jax.data import phantom
from cxai_jax.maps import grid, imputation
from tools.benchmark_session import describe, make_session
from tools.benchmark_timing import Load

PERCENTILES = (10, 30, 50, 70, 90)


def sparse_solution(image, keep):
    """The system of ROAD by a sparse direct solve in float64: [H, W, C]."""
    height, width = keep.shape
    places = np.arange(keep.size).reshape(keep.shape)
    weights = lil_array((keep.size, keep.size))
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        one = places[: height - dy, max(0, -dx) : width - max(0, dx)].ravel()
        other = one + dy * width + dx
        weights[one, other] = weights[other, one] = 1 / 12 if dy and dx else 1 / 6
    weights, kept = weights.tocsr(), keep.ravel()
    laplace = diags_array(weights.sum(1)) - weights
    filled = image.astype(np.float64).reshape(keep.size, -1)
    known = weights[~kept][:, kept] @ filled[kept]
    filled[~kept] = splu(laplace.tocsc()[~kept][:, ~kept].tocsc()).solve(known)
    return filled.reshape(image.shape)


def peer_solution(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """pytorch-grad-cam's, without noise."""
    import torch
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    channels = torch.from_numpy(image.transpose(2, 0, 1).copy())
    filled = NoisyLinearImputer(noise=0)(channels, torch.from_numpy(keep * 1.0))
    return filled.numpy().transpose(1, 2, 0)


def make_problems(images: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images [P, H, W, 3] and what is kept of them [P, H, W]."""
    config = demo.get_config().data
    config.phantom_images, config.resize = 12, size
    records = phantom.load(config).splits["train"].images
    gray = np.stack([records[i % len(records)][:size, :size] for i in range(images)])
    x = np.repeat((gray / 255 - 0.45) / 0.225, 3, axis=3).astype(np.float32)
    cells = np.random.default_rng(0).normal(size=(images, 7, 7))
    maps = np.asarray(grid.upsample(jax.numpy.asarray(cells), size))
    kept = []
    for percent in PERCENTILES:
        for sign in (1, -1):
            edge = np.percentile(sign * maps, 100 - percent, axis=(1, 2), keepdims=True)
            kept.append(sign * maps >= edge)
    return np.tile(x, (len(kept), 1, 1, 1)), np.concatenate(kept)


def contenders(images: int) -> dict[str, Callable]:
    """Name -> solve(images [P, H, W, C], keep [P, H, W])."""

    def graph(x, keep):
        batches = [slice(i, i + images) for i in range(0, len(x), images)]
        return np.concatenate([imputation.impute(x[b], keep[b]) for b in batches])

    def each(solve):
        return lambda x, keep: np.stack(list(map(solve, x, keep)))

    found = {"graph": graph, "sparse direct solve": each(sparse_solution)}
    if importlib.util.find_spec("pytorch_grad_cam"):
        found["pytorch-grad-cam"] = each(peer_solution)
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.road_cost")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--json", type=Path, default=Path("experiments/results/road_cost_cpu.json")
    )
    given = parser.parse_args(arguments)
    x, keep = make_problems(given.images, given.size)
    solvers = contenders(given.images)
    filled = {name: solve(x, keep) for name, solve in solvers.items()}  # Compiles.
    exact = filled["sparse direct solve"]
    taken = {name: [] for name in solvers}
    for number in range(given.rounds):
        for name in sorted(solvers, reverse=number % 2 == 1):
            before, clock = Load(), time.perf_counter()
            solvers[name](x, keep)
            wall, after = time.perf_counter() - clock, Load()
            cpu, foreign = after.own - before.own, before.foreign_until(after)
            taken[name].append({"wall_s": wall, "cpu_s": cpu, "foreign": foreign})
    rows = {
        name: {
            **{k: statistics.median(one[k] for one in taken[name]) for k in samples[0]},
            "samples": samples,
            "largest_difference": float(np.abs(filled[name] - exact).max()),
        }
        for name, samples in taken.items()
    }
    result = describe(make_session())
    result = {name: result[name] for name in ("git", "time", "host", "versions")}
    result |= {"images": given.images, "pixels": given.size, "channels": 3}
    result |= {"percentiles": PERCENTILES, "deviation_of_images": float(x.std())}
    result["solvers"] = rows
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(
            f"{name:20} {row['wall_s']:7.2f} s, CPU {row['cpu_s']:7.2f} s, others "
            f"used {row['foreign']:.0%}; differs by {row['largest_difference']:.1e}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
