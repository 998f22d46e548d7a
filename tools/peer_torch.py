"""The other side of the benchmark: the same work in PyTorch, written for this purpose.

Two versions of the step and, in peer_voting.py, of test-time voting, by what a reader
of the paper would run (method.md 1-3, 10):

  published  what the published trainer does: two class-map passes, in train mode and
             image by image; NCHW; sliced and resized boxes; patches read one channel at
             a time; a host read of the loss each step. Voting runs 33 forwards of two
             copies of one image, with autograd on.
  fair       what a careful PyTorch user would write: one class map, vectorised,
             channels last, no host read. Voting is one batch of 32.

Deviations from the published code, all in its favour or without cost: the contrastive
term reads the cells that were ranked and computes Eq. 1 (the published reads miss
them) of unit vectors, as the benchmark's own step does (raw products of an untrained
network diverge); the vote rule is the paper's; the head has two classes.
"""

import copy
import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tools.peer_networks import Forward, make_network, to_torch

STRIDE = 32  # Pixels of a cell of the class map, in every network here.


def sample_box(lam: float, size: int) -> tuple[int, int, int, int]:
    """CutMix's box: (row0, col0, row1, col1), half open, clipped."""
    half = int(size * math.sqrt(1 - lam)) // 2
    row, column = random.randrange(size), random.randrange(size)
    low = max(row - half, 0), max(column - half, 0)
    return *low, min(row + half, size), min(column + half, size)


def random_draw(images) -> tuple:
    """What one step mixes: the order [B] of the partners, destination and source."""
    order = torch.randperm(images.shape[0], device=images.device)
    size = images.shape[-1]
    return order, *(sample_box(random.betavariate(1, 1), size) for _ in range(2))


def area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


# --- published ------------------------------------------------------------------------


def percent_maps(network, images, labels, grad: bool = False):
    """Semantic percent maps [B, H, W], image by image, in the network's own mode."""
    with torch.set_grad_enabled(grad):
        logits, features = network(images)
        probs = F.softmax(logits, dim=1)
    maps, scores, size = [], [], images.shape[-1]
    with torch.no_grad():
        for i in range(images.shape[0]):
            every_class = F.conv2d(
                features[i : i + 1],
                network.fc.weight[:, :, None, None],
                network.fc.bias,
            )
            one = every_class[0, labels[i]]
            scores.append(probs[i, labels[i]])
            up = F.interpolate(
                one[None, None], (size, size), mode="bilinear", align_corners=False
            )[0, 0]
            up = up - up.min()
            maps.append(up / up.sum())
    return torch.stack(maps), torch.stack(scores), logits


def published_snapmix(network, images, labels):
    """Mixed images, partner labels and both weights; draws per batch, on the host."""
    maps, _, _ = percent_maps(network, images, labels)
    order, box, source = random_draw(images)
    labels_b, maps_b = labels[order], maps[order]
    weight_a = torch.ones(images.shape[0]).to(images.device)
    weight_b = torch.zeros(images.shape[0]).to(images.device)
    if area(box) and area(source):
        patch = images[order, :, source[0] : source[2], source[1] : source[3]].clone()
        patch = F.interpolate(
            patch,
            (box[2] - box[0], box[3] - box[1]),
            mode="bilinear",
            align_corners=True,
        )
        images = images.clone()
        images[:, :, box[0] : box[2], box[1] : box[3]] = patch
        inside = maps[:, box[0] : box[2], box[1] : box[3]].sum((1, 2))
        given = maps_b[:, source[0] : source[2], source[1] : source[3]].sum((1, 2))
        weight_a = 1 - inside / (maps.sum((1, 2)) + 1e-8)
        weight_b = given / (maps_b.sum((1, 2)) + 1e-8)
        same = labels == labels_b
        before = weight_a.clone()
        weight_a[same] += weight_b[same]
        weight_b[same] += before[same]
        share = 1 - area(box) / images.shape[-1] ** 2
        weight_a[torch.isnan(weight_a)] = share
        weight_b[torch.isnan(weight_b)] = 1 - share
    return images, labels_b, weight_a, weight_b


def sampled_patches(features, cells):
    """Reads cells [B, n] of [B, D, h, w] as the published code does: grid_sample over
    every channel on its own. The coordinates here hit the centres of the cells."""
    batch, depth, height, width = features.shape
    rows, columns = cells // width, cells % width
    at = torch.stack(
        [(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1
    )
    at = at[:, None].repeat(1, depth, 1, 1).reshape(batch * depth, 1, -1, 2)
    maps = features.reshape(batch * depth, 1, height, width)
    read = F.grid_sample(maps, at.to(maps.dtype), align_corners=False)
    return read.reshape(batch, depth, -1).permute(0, 2, 1)


def equation_one(gram):
    """Eq. 1 from the Gram matrix [B, 4, 4] of the cells u1, u2, v1, v2."""
    against = torch.logsumexp(gram[:, :2, 2:].reshape(-1, 4), dim=1)
    within_u, within_v = gram[:, 0, 1], gram[:, 2, 3]
    return F.softplus(against - within_u) + F.softplus(against - within_v)


def published_step(network, images, labels):
    """Loss of one step of the published trainer, with its two class-map passes."""
    maps, _, _ = percent_maps(network, images, labels)
    windows = F.unfold(maps[:, None], kernel_size=STRIDE, stride=STRIDE)
    relevance = windows.sum(1)
    mixed, labels_b, weight_a, weight_b = published_snapmix(network, images, labels)
    logits, features = network(mixed)
    top = relevance.topk(2, dim=1).indices
    bottom = (-relevance).topk(2, dim=1).indices
    # The sampler refuses bfloat16 on some devices, and the dot products overflow it.
    features = features.float()
    u, v = sampled_patches(features, top), sampled_patches(features, bottom)
    cells = F.normalize(torch.cat([u, v], dim=1), dim=2)
    contrastive = equation_one(cells @ cells.transpose(1, 2)).mean()
    loss = weight_a * F.cross_entropy(logits, labels, reduction="none")
    loss = loss + weight_b * F.cross_entropy(logits, labels_b, reduction="none")
    return loss.mean() + contrastive


# --- fair -----------------------------------------------------------------------------


def interpolation(size: int, cells: int, device) -> "torch.Tensor":
    """Half-pixel bilinear interpolation as a matrix [size, cells]."""
    eye = torch.eye(cells, device=device)[None]
    return F.interpolate(eye, size, mode="linear", align_corners=False)[0].T


def one_class_map(network, images, labels, mode: str):
    """Class map [B, h, w] of each image's label, by one matrix product."""
    network.train(mode == "train")
    with torch.no_grad():
        _, features = network(images)
        maps = torch.einsum("bdhw,bd->bhw", features.float(), network.fc.weight[labels])
    network.train()
    return maps


def taps(box: tuple[int, int], source: tuple[int, int], place):
    """Lower and upper source pixel and the upper one's share, for each `place`."""
    steps = max(box[1] - box[0] - 1, 1)
    along = (place - box[0]).clamp(0, steps)
    along = along * (source[1] - source[0] - 1)
    low = source[0] + along // steps
    return low, (low + 1).clamp(max=source[1] - 1), (along % steps) / steps


def fair_snapmix(images, labels, maps, draw):
    """SnapMix with static shapes: gathers instead of slices, no host read."""
    device, size = images.device, images.shape[-1]
    order, box, source = draw
    labels_b, maps_b = labels[order], maps[order]
    if not (area(box) and area(source)):
        ones = torch.ones(images.shape[0], device=device)
        return images, labels_b, ones, torch.zeros_like(ones)
    pasted, place = images[order], torch.arange(size, device=device)
    for axis in (0, 1):
        low, high, share = taps(box[axis::2], source[axis::2], place)
        share = share.view((-1, 1) if axis == 0 else (1, -1)).to(images.dtype)
        low, high = (pasted.index_select(axis + 2, index) for index in (low, high))
        pasted = torch.lerp(low, high, share)
    rows, columns = ((place >= box[i]) & (place < box[i + 2]) for i in (0, 1))
    images = torch.where(rows[:, None] & columns, pasted, images)

    matrix = interpolation(size, maps.shape[-1], device)
    lowest = (matrix @ maps @ matrix.T).amin((1, 2))
    total = torch.einsum("i,bij,j->b", matrix.sum(0), maps, matrix.sum(0))
    total = total - lowest * size**2

    def share_in(box, maps, lowest, total):
        row, column = (matrix[box[i] : box[i + 2]].sum(0) for i in (0, 1))
        inside = torch.einsum("i,bij,j->b", row, maps, column)
        return (inside - lowest * area(box)) / total

    weight_a = 1 - share_in(box, maps, lowest, total)
    weight_b = share_in(source, maps_b, lowest[order], total[order])
    both, same = weight_a + weight_b, labels == labels_b
    weight_a, weight_b = (torch.where(same, both, w) for w in (weight_a, weight_b))
    left = 1 - area(box) / size**2
    weight_a, weight_b = weight_a.nan_to_num(left), weight_b.nan_to_num(1 - left)
    return images, labels_b, weight_a, weight_b


def fair_step(network, images, labels, mode: str, draw: tuple):
    """Loss of the whole method, one class map, everything vectorised."""
    maps = one_class_map(network, images, labels, mode)
    mixed, labels_b, weight_a, weight_b = fair_snapmix(images, labels, maps, draw)
    logits, features = network(mixed)
    own = torch.where(weight_a >= weight_b, labels, labels_b)
    relevance = torch.einsum(
        "bdhw,bd->bhw", features.detach().float(), network.fc.weight.detach()[own]
    )
    # The mass of the upsampled map over each cell's pixels.
    count = relevance.shape[-1]
    windows = interpolation(STRIDE * count, count, images.device)
    windows = windows.reshape(count, STRIDE, -1).sum(1)
    ranked = (windows @ relevance @ windows.T).flatten(1)
    cells = torch.cat([ranked.topk(2).indices, (-ranked).topk(2).indices], dim=1)
    flat = features.flatten(2).transpose(1, 2)
    picked = flat.gather(1, cells[..., None].expand(-1, -1, flat.shape[-1])).float()
    picked = F.normalize(picked, dim=2)
    contrastive = equation_one(picked @ picked.transpose(1, 2)).mean()
    loss = weight_a * F.cross_entropy(logits, labels, reduction="none")
    loss = loss + weight_b * F.cross_entropy(logits, labels_b, reduction="none")
    return loss.mean() + contrastive


# --- what the benchmark calls ---------------------------------------------------------


def loss_of(kind: str, network, images, labels, draw: tuple | None = None):
    """Loss of one step of a kind of `make_step`; `draw` of the fair ones alone."""
    if kind == "published":
        return published_step(network, images, labels)
    if kind in ("plain", "plain_nchw"):
        return F.cross_entropy(network(images)[0], labels)
    mode = kind.removeprefix("fair_")
    return fair_step(network, images, labels, mode, draw or random_draw(images))


def first_step(kind: str, network, forward: Forward, batch: tuple, draw) -> dict:
    """Loss and gradient norm of a step that leaves no trace in the network."""
    before = copy.deepcopy(network.state_dict())
    loss = loss_of(kind, forward, *batch, draw)
    loss.backward()
    squares = [p.grad.double().square().sum() for p in network.parameters()]
    network.zero_grad(set_to_none=True)
    network.load_state_dict(before)
    return {"loss": loss.item(), "gradient_norm": math.sqrt(sum(squares))}


def make_step(
    kind: str,
    batches: list,
    *,
    model: str,
    variables: dict,
    check: str = "",
    draw: tuple | None = None,
    device: str = "cpu",
    bf16: bool = False,
    compiled: bool = False,
    rate: float = 0.01,
) -> Callable[[int], float]:
    """Builds `run(steps) -> loss of the last step`, synchronised at its end.

    `run.about` holds loss and gradient norm of the first batch before any step.

    Args:
      kind: "plain_nchw", "plain", "published", "fair_eval" or "fair_train" (mode of
        the class-map pass).
      batches: (float32 [B, H, W, 3], int64 [B]) NumPy pairs, taken in turn.
      model: a key of `benchmark_peer.NETWORKS`.
      variables: our weights.
      check: kind whose loss `run.about` tells, `kind` itself unless given.
      draw: what that loss mixes, (order [B], destination, source); None: at random.
      device: "cpu" or "cuda".
      bf16: bfloat16 autocast.
      compiled: through torch.compile.
      rate: learning rate.
    """
    channels_last = kind not in ("plain_nchw", "published")
    network = make_network(model, variables, device, channels_last=channels_last)
    forward = Forward(network, bf16=bf16, compiled=compiled)
    given = [
        (
            to_torch(images, device, channels_last=channels_last),
            torch.from_numpy(labels).long().to(device),
        )
        for images, labels in batches
    ]
    if draw:
        draw = (torch.tensor(draw[0], device=device), *draw[1:])
    about = first_step(check or kind, network, forward, given[0], draw)
    optimizer = torch.optim.SGD(
        network.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    done = 0

    def run(steps: int) -> float:
        nonlocal done
        for _ in range(steps):
            images, labels = given[done % len(given)]
            done += 1
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(kind, forward, images, labels)
            loss.backward()
            optimizer.step()
            if kind == "published":
                loss.item()  # It prints the loss each step.
        return loss.item()

    run.about = about
    return run
