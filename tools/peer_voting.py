"""Test-time voting in PyTorch, as published and batched; see peer_torch.py."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tools.peer_networks import Forward, make_network, to_torch
from tools.peer_torch import interpolation, percent_maps

SHARE = 28  # Cells that voting masks along a side: 8 pixels of 224 each.


def make_voting(
    kind: str,
    images,
    *,
    model: str,
    variables: dict,
    device: str = "cpu",
    bf16: bool = False,
    k: int = 31,
    theta: float = 0.2,
) -> Callable[[int], list]:
    """Builds `run(n) -> labels of n images` by test-time voting.

    `run.about` holds the unmasked probabilities of the first image.

    Args:
      kind: "published" (33 forwards of two copies) or "batched" (one of k + 1).
      images: float32 NumPy [N, H, W, 3], taken in turn.
      model: a key of `benchmark_peer.NETWORKS`.
      variables: our weights.
      device: "cpu" or "cuda".
      bf16: bfloat16 autocast.
      k: masks per image.
      theta: probability of its own label under which a masked image opposes.
    """
    channels_last = kind == "batched"
    network = make_network(model, variables, device, channels_last=channels_last)
    forward = Forward(network.eval(), bf16=bf16)
    given = to_torch(images, device, channels_last=False)
    vote = published_voting if kind == "published" else batched_voting
    done = 0

    def run(count: int) -> list:
        nonlocal done
        labels = []
        for _ in range(count):
            labels.append(vote(forward, given[done % len(given)], k, theta))
            done += 1
        return labels

    with torch.no_grad():
        probs = F.softmax(forward(given[:1])[0], dim=1)[0]
    run.about = {"probs": probs.tolist()}
    return run


def cell_grid(image) -> tuple[int, int]:
    """Pixels along a side of a cell, and cells along a side of the image."""
    side = max(1, image.shape[-1] // SHARE)
    return side, image.shape[-1] // side


def published_voting(network, image, k: int, theta: float) -> int:
    """One forward and one class-map pass, then k masked ones, each on two copies."""
    images = image[None].repeat(2, 1, 1, 1)
    first = F.softmax(network(images)[0], dim=1)[0, 0].item()
    label = 0 if first > 0.5 else 1
    chosen = torch.full((2,), label, device=image.device)
    maps, _, _ = percent_maps(network, images, chosen, grad=True)
    side, across = cell_grid(image)
    cells = F.unfold(maps[:1, None], kernel_size=side, stride=side).sum(1)[0]
    votes = []
    for cell in cells.topk(k).indices.tolist():
        row, column = side * (cell // across), side * (cell % across)
        images = images.clone()
        images[0, :, row : row + side, column : column + side] = 0.0
        prob = F.softmax(network(images)[0], dim=1)[0, 0].item()
        own = prob if label == 0 else 1 - prob
        votes.append(own < theta)
    return 1 - label if sum(votes) > k / 2 else label


@torch.no_grad()
def batched_voting(network, image, k: int, theta: float) -> int:
    """The original gives score and class map; its k masked versions are one batch."""
    side, across = cell_grid(image)
    image = image[None].contiguous(memory_format=torch.channels_last)
    logits, features = network(image)
    label = logits[0].argmax()
    maps = torch.einsum("bdhw,d->bhw", features.float(), network.fc.weight[label])
    matrix = interpolation(image.shape[-1], maps.shape[-1], image.device)
    matrix = matrix.reshape(across, side, -1).sum(1)
    order = (matrix @ maps[0] @ matrix.T).flatten().topk(k).indices
    rank = torch.full((across**2,), k, device=image.device)
    rank[order] = torch.arange(k, device=image.device)
    keep = rank[None] > torch.arange(k, device=image.device)[:, None]
    keep = keep.reshape(k, 1, across, across)
    keep = keep.repeat_interleave(side, 2).repeat_interleave(side, 3)
    masked = torch.where(keep, image, image.amin())
    masked = masked.contiguous(memory_format=torch.channels_last)
    own = F.softmax(network(masked)[0].float(), dim=1)[:, label]
    opposing = (own < theta).sum()
    return int(torch.where(opposing > k / 2, 1 - label, label))
