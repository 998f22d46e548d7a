"""python -m experiments.curve_cost [--images=8] [--size=224] [--model=resnet18]

What a deletion and an insertion curve cost, per point: ours, of so many images in one
call as `scoring.explanations` makes it, and the network alone on as many images. Where
torch, timm and quantus are installed Quantus' PixelFlipping runs beside them, in a
process of its own, with timm's network of the same weights in channels-last, the same
maps, points and baseline; and that network alone. The curves are compared first, then
all run in turn. CPU seconds stand beside the clock.

Quantus' definition is made ours by its options: maps as they are (no `abs`, no
`normalise`), the gray value of a normalised 0 as baseline, and maps that are ranks,
since it breaks ties another way. It leaves out the point of nothing removed, which ours
runs once for both curves. It has no insertion: the blurred images, made beforehand, are
flipped to the values of the whole ones.
"""

import argparse
import functools
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import demo
from cxai_jax import host, models
from cxai_jax import mesh as meshes
from cxai_jax.data import phantom
from cxai_jax.data.augment import normalise
from cxai_jax.maps import grid, quality
from cxai_jax.models import convert
from cxai_jax.scoring.explanations import POINTS
from cxai_jax.training.run import build_network
from tools import benchmark_timing as timing
from tools.benchmark_peer import Peer
from tools.benchmark_session import describe, make_session
from tools.benchmark_timing import Contender

PEERS = ("torch", "timm", "quantus")
TOLERANCE = 1e-4  # Of probabilities, between two libraries in float32.
AT_ONCE = 32  # Images per forward pass, the default of the curves.


class Problem(NamedTuple):
    """What is explained."""

    images: np.ndarray  # Gray values, float32 [B, H, W, 1].
    maps: np.ndarray  # Ranks, so that there are no ties: float32 [B, H, W].
    labels: np.ndarray  # int32 [B].
    step: int  # Pixels per point.
    fill: float  # Gray value of a removed pixel.

    @property
    def points(self) -> int:
        """Of both curves but for the whole image."""
        return 2 * (self.maps[0].size // self.step)


def make_problem(model: str, number: int, size: int) -> Problem:
    """Phantoms with the ranks of smooth maps.

    Raises:
      ValueError: for an unknown model, or a size that does not fall into the points.
    """
    mean = models.normalisation(model)[0]
    if number < 1 or size < 8 or size * size % POINTS:
        raise ValueError(
            f"--images={number} --size={size}: give at least one image and a multiple "
            "of 4 pixels, 8 or more"
        )
    config = demo.get_config().data
    config.phantom_images, config.resize = 12, size
    records = phantom.load(config).splits["train"].images
    gray = np.stack([records[i % len(records)][:size, :size] for i in range(number)])
    cells = np.random.default_rng(0).normal(size=(number, 7, 7))
    smooth = np.asarray(grid.upsample(jnp.asarray(cells), size))
    ranks = smooth.reshape(number, -1).argsort(1).argsort(1).astype(np.float32)
    return Problem(
        gray.astype(np.float32),
        ranks.reshape(number, size, size),
        np.arange(number, dtype=np.int32) % 2,
        size * size // POINTS,
        float(sum(mean) / 3 if mean else gray.mean()),
    )


def ours(network, problem: Problem) -> dict[str, Callable]:
    """Name -> run(calls): both curves [2, B, POINTS + 1], and the network alone."""

    def probabilities(variables, gray):
        x = normalise(gray, network.scale.mean, network.scale.std)
        logits = network.model.apply(variables, x, "eval")[0]
        return jax.nn.softmax(logits.astype(jnp.float32))

    mesh = meshes.scoring_mesh(len(problem.images))
    given = problem.images, problem.maps, problem.labels
    given = meshes.put_rows(given, mesh)
    every = [meshes.put_rows(gray, mesh) for gray in batches(problem)]

    def both(variables, gray, maps, labels):
        of = functools.partial(probabilities, variables)
        whole = jnp.take_along_axis(of(gray), labels[:, None], 1)[:, 0]
        given = of, gray, maps, labels
        more = {"step": problem.step, "at_once": AT_ONCE, "whole": whole}
        removed = quality.deletion_curve(*given, fill=problem.fill, **more)
        return removed, quality.insertion_curve(*given, **more)

    both = jax.jit(meshes.side_by_side(both, mesh))
    alone = jax.jit(probabilities)
    variables = meshes.put_replicated(network.variables, mesh)

    def curves(calls):
        for _ in range(calls):
            found = both(variables, *given)
        return np.asarray(found)

    def forward(calls):
        for gray in calls * every:
            found = alone(variables, gray)
        return np.asarray(found)

    return {"curves": curves, "network alone": forward}


def batches(problem: Problem) -> list[np.ndarray]:
    """As many images as both curves have, in batches."""
    every = np.tile(problem.images, (problem.points, 1, 1, 1))
    return [every[i : i + AT_ONCE] for i in range(0, len(every), AT_ONCE)]


def write_weights(model: str, images: np.ndarray, folder: Path) -> Path:
    """Random weights of timm's network that tell images apart, as a state dict.

    Norms have the statistics of these images, and no scale is 0.
    """
    import timm
    import torch

    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=2).train()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
                module.weight.uniform_(0.5, 1.0)
        network.get_classifier().weight.normal_(std=0.1)
        network(torch_normalised(model, torch.from_numpy(to_channels(images))))
    torch.save(network.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def to_channels(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def torch_normalised(model: str, gray):
    """Gray [B, 1, H, W] as the backbone's input, channels last."""
    import torch

    mean, std = (torch.tensor(x)[:, None, None] for x in models.normalisation(model))
    return ((gray - mean) / std).contiguous(memory_format=torch.channels_last)


def torch_network(model: str, weights: Path):
    """Gray [B, 1, H, W] -> probabilities, with the weights of a file."""
    import timm
    import torch

    class Probabilities(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = timm.create_model(model, num_classes=2)
            self.network.load_state_dict(torch.load(weights, weights_only=True))
            self.network.to(memory_format=torch.channels_last)

        def forward(self, gray):
            return self.network(torch_normalised(model, gray)).softmax(1)

    return Probabilities().eval()


def make_quantus(model: str, weights: Path, problem: Problem) -> Callable:
    """run(calls): both curves [2, B, POINTS], without the point of nothing replaced."""
    import quantus

    network = torch_network(model, weights)
    whole, blurred = problem.images, np.asarray(quality.blurred(problem.images))
    finish = whole.reshape(len(whole), -1)
    options = {"features_in_step": problem.step, "abs": False, "normalise": False}
    options |= {"disable_warnings": True}

    def restore(arr, indices, **_):
        arr, rows = arr.copy(), np.arange(len(arr))[:, None]
        arr[rows, indices] = finish[rows, indices]
        return arr

    deletion = quantus.PixelFlipping(perturb_baseline=problem.fill, **options)
    insertion = quantus.PixelFlipping(perturb_func=restore, **options)

    def curve(metric, start):
        return metric(
            model=network,
            x_batch=to_channels(start),
            y_batch=problem.labels,
            a_batch=problem.maps[:, None],
            channel_first=True,
            softmax=False,  # The network's own.
            batch_size=len(start),
        )

    def run(calls):
        for _ in range(calls):
            found = curve(deletion, whole), curve(insertion, blurred)
        return np.asarray(found)

    return run


def make_torch(model: str, weights: Path, problem: Problem) -> Callable:
    """run(calls): the network alone, as often as the curves call it."""
    import torch

    network = torch_network(model, weights)
    every = [torch.from_numpy(to_channels(gray)) for gray in batches(problem)]

    def run(calls):
        with torch.inference_mode():
            for gray in calls * every:
                found = network(gray)
        return found.numpy()

    return run


def largest_difference(mine: np.ndarray, other: np.ndarray) -> float:
    """Between our curves [2, B, P + 1] and Quantus' [2, B, P].

    Raises:
      ValueError: if it is more than TOLERANCE.
    """
    # Quantus begins after the first step.
    difference = float(np.abs(mine[:, :, 1:] - other).max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the curves differ by {difference:.1e}, more than {TOLERANCE}: nothing "
            "was timed"
        )
    return difference


def measure(model: str, problem: Problem, repeats: int) -> dict:
    """Rows of all that can run here, and how far the curves differ."""
    with tempfile.TemporaryDirectory() as folder:
        config = demo.get_config()
        config.model.name, config.data.image_size = model, problem.maps.shape[1]
        peers = {}
        if with_peer(model):
            weights = write_weights(model, problem.images, Path(folder))
            tensors, _ = convert.convert(str(weights), model)
            config.model.pretrained = str(Path(folder) / "weights.npz")
            np.savez(config.model.pretrained, **tensors)
            given = {"model": model, "weights": weights, "problem": problem}
            peers["Quantus"] = Peer(make_quantus, **given)
            peers["PyTorch's network alone"] = Peer(make_torch, **given)
        found = ours(build_network(config, 2), problem)
    mine, about = found["curves"](1), {}
    about["range_of_curves"] = [float(mine.min()), float(mine.max())]
    if peers:
        other = peers["Quantus"].run(1)
        about["largest_difference"] = largest_difference(mine, other)
        about["tolerance"] = TOLERANCE
    contenders = [Contender(name, run) for name, run in found.items()]
    contenders += [Contender(name, peer.run, peer.cpu) for name, peer in peers.items()]
    rounds = timing.interleave(contenders, calls=1, repeats=repeats)
    for peer in peers.values():
        peer.close()
    passes = {name: problem.points for name in rounds[0]}
    passes["curves"] += 1  # The whole image.
    about["rows"] = {name: row(rounds, name, passes[name]) for name in rounds[0]}
    return about


def row(rounds: list, name: str, passes: int) -> dict:
    """Times of one contender, of both curves and per point, and ratios to the others.

    Args:
      passes: points whose images it puts through the network.
    """
    taken = timing.times(rounds, name)
    others = [other for other in rounds[0] if other != name]
    return {
        "points": passes,
        "ms_per_point": taken["p50"] / passes,
        "cpu_ms_per_point": taken["cpu_p50"] / passes,
        "foreign_load": timing.foreign_load(rounds, name),
        "times_faster_than": {
            other: timing.paired_ratio(rounds, name, other) for other in others
        },
        "ms": taken,
    }


def with_peer(model: str) -> bool:
    """Whether PyTorch, Quantus and timm's network of that name are installed."""
    if not all(map(importlib.util.find_spec, PEERS)):
        return False
    import timm

    return timm.is_model(model) and bool(models.spec_of(model).rules)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.curve_cost")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--json", type=Path, default=Path("experiments/results/curve_cost_cpu.json")
    )
    given = parser.parse_args(arguments)
    host.keep_freed_memory()
    host.one_device_a_core()
    try:
        problem = make_problem(given.model, given.images, given.size)
        found = measure(given.model, problem, given.rounds)
    except ValueError as error:
        sys.exit(f"error: {error}")
    result = describe(make_session())
    result = {n: result[n] for n in ("git", "time", "host", "device", "versions")}
    installed = filter(importlib.util.find_spec, PEERS)
    result["versions"] |= {name: metadata.version(name) for name in installed}
    result |= {"network": given.model, "images": given.images, "pixels": given.size}
    result |= {"points_of_a_curve": POINTS, "images_at_once": AT_ONCE, **found}
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    if "largest_difference" in found:
        print(f"curves differ by {found['largest_difference']:.1e}")
    for name, one in found["rows"].items():
        ratios = [
            f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) {other}"
            for other, ratio in one["times_faster_than"].items()
        ]
        print(
            f"{name:24}{one['ms_per_point']:8.1f} ms a point, CPU "
            f"{one['cpu_ms_per_point']:8.1f}; others used {one['foreign_load']:.0%}; "
            f"times faster than: {', '.join(ratios)}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
