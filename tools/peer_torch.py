"""The other side of the benchmark: the same work in PyTorch, written for this purpose.

Two versions of the step and of test-time voting, by what a reader of the paper would
run (method.md 1-3, 10):

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

import math
import random
from collections.abc import Callable

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError as error:
    raise ImportError(
        "the PyTorch peer needs torch, which this project does not depend on: "
        "pip install torch, or leave out --peer=torch"
    ) from error

SIZE = 224
BLOCKS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, "v1.5"), 1x1, each with batch norm, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        shape = ((channels, width, 1, 1), (width, width, 3, stride))
        shape += ((width, 4 * width, 1, 1),)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in shape
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in shape)
        self.shortcut = nn.Identity()
        if channels != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False),
                nn.BatchNorm2d(4 * width),
            )

    def forward(self, x):
        y = F.relu(self.norms[0](self.convs[0](x)), inplace=True)
        y = F.relu(self.norms[1](self.convs[1](y)), inplace=True)
        y = self.norms[2](self.convs[2](y))
        return F.relu(y + self.shortcut(x), inplace=True)


class ResNet50(nn.Module):
    """Returns logits [B, K] and the features [B, D, h, w] before the global pool."""

    def __init__(self, num_classes: int = 2, extra_bn: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        blocks, channels = [], 64
        for stage, count in enumerate(BLOCKS):
            width = 64 << stage
            for block in range(count):
                stride = 2 if stage and not block else 1
                blocks.append(Bottleneck(channels, width, stride))
                channels = 4 * width
        self.blocks = nn.ModuleList(blocks)
        self.extra = nn.ModuleDict()
        if extra_bn:  # The published network: after layer2 and after layer4.
            self.extra = nn.ModuleDict(
                {"7": nn.BatchNorm2d(512), "16": nn.BatchNorm2d(2048)}
            )
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if str(number) in self.extra:
                x = F.relu(self.extra[str(number)](x))
        return self.fc(x.mean((2, 3))), x


def load_flax(network: ResNet50, variables: dict) -> None:
    """Copies the weights of `cxai_jax.models.resnet`, so that losses can be compared.

    Both are walked in the order in which the layers were defined.
    """
    params, stats = variables["params"], variables["batch_stats"]

    def copy(target, value):
        target.data.copy_(torch.tensor(value).reshape(target.shape))

    def conv_norm(conv, norm, path):
        own, running = params, stats
        for name in path:
            own, running = own[name], running[name]
        copy(conv.weight, own["kernel"].transpose(3, 2, 0, 1))
        copy(norm.weight, own["norm"]["scale"])
        copy(norm.bias, own["norm"]["bias"])
        copy(norm.running_mean, running["norm"]["mean"])
        copy(norm.running_var, running["norm"]["var"])

    conv_norm(network.conv1, network.bn1, ("conv1",))
    names = [f"layer{s + 1}_{b}" for s in range(4) for b in range(BLOCKS[s])]
    for name, block in zip(names, network.blocks, strict=True):
        for i in range(3):
            conv_norm(block.convs[i], block.norms[i], (name, f"conv{i + 1}"))
        if not isinstance(block.shortcut, nn.Identity):
            conv_norm(*block.shortcut, (name, "downsample"))
    copy(network.fc.weight, params["head"]["kernel"].T)
    copy(network.fc.bias, params["head"]["bias"])


def sample_box(lam: float) -> tuple[int, int, int, int]:
    """CutMix's box: (row0, col0, row1, col1), half open, clipped."""
    half = int(SIZE * math.sqrt(1 - lam)) // 2
    row, column = random.randrange(SIZE), random.randrange(SIZE)
    low = max(row - half, 0), max(column - half, 0)
    return *low, min(row + half, SIZE), min(column + half, SIZE)


def area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


# --- published ------------------------------------------------------------------------


def percent_maps(network, images, labels, grad: bool = False):
    """Semantic percent maps [B, H, W], image by image, in the network's own mode."""
    with torch.set_grad_enabled(grad):
        logits, features = network(images)
        probs = F.softmax(logits, dim=1)
    maps, scores = [], []
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
                one[None, None], (SIZE, SIZE), mode="bilinear", align_corners=False
            )[0, 0]
            up = up - up.min()
            maps.append(up / up.sum())
    return torch.stack(maps), torch.stack(scores), logits


def published_snapmix(network, images, labels):
    """Mixed images, partner labels and both weights; draws per batch, on the host."""
    maps, _, _ = percent_maps(network, images, labels)
    order = torch.randperm(images.shape[0]).to(images.device)
    labels_b, maps_b = labels[order], maps[order]
    weight_a = torch.ones(images.shape[0]).to(images.device)
    weight_b = torch.zeros(images.shape[0]).to(images.device)
    box, source = (sample_box(random.betavariate(1, 1)) for _ in range(2))
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
        share = 1 - area(box) / SIZE**2
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
    side = SIZE // 7
    windows = F.unfold(maps[:, None], kernel_size=side, stride=side)
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


def taps(box: tuple[int, int], source: tuple[int, int], device):
    """Lower and upper source pixel and the upper one's share, for each of SIZE."""
    steps = max(box[1] - box[0] - 1, 1)
    along = (torch.arange(SIZE, device=device) - box[0]).clamp(0, steps)
    along = along * (source[1] - source[0] - 1)
    low = source[0] + along // steps
    return low, (low + 1).clamp(max=source[1] - 1), (along % steps) / steps


def fair_snapmix(images, labels, maps):
    """SnapMix with static shapes: gathers instead of slices, no host read."""
    device = images.device
    order = torch.randperm(images.shape[0], device=device)
    labels_b, maps_b = labels[order], maps[order]
    box, source = (sample_box(random.betavariate(1, 1)) for _ in range(2))
    if not (area(box) and area(source)):
        ones = torch.ones(images.shape[0], device=device)
        return images, labels_b, ones, torch.zeros_like(ones)
    pasted = images[order]
    for axis in (0, 1):
        low, high, share = taps(box[axis::2], source[axis::2], device)
        share = share.view((-1, 1) if axis == 0 else (1, -1)).to(images.dtype)
        low, high = (pasted.index_select(axis + 2, index) for index in (low, high))
        pasted = torch.lerp(low, high, share)
    place = torch.arange(SIZE, device=device)
    rows, columns = ((place >= box[i]) & (place < box[i + 2]) for i in (0, 1))
    images = torch.where(rows[:, None] & columns, pasted, images)

    matrix = interpolation(SIZE, maps.shape[-1], device)
    lowest = (matrix @ maps @ matrix.T).amin((1, 2))
    total = torch.einsum("i,bij,j->b", matrix.sum(0), maps, matrix.sum(0))
    total = total - lowest * SIZE**2

    def share_in(box, maps, lowest, total):
        row, column = (matrix[box[i] : box[i + 2]].sum(0) for i in (0, 1))
        inside = torch.einsum("i,bij,j->b", row, maps, column)
        return (inside - lowest * area(box)) / total

    weight_a = 1 - share_in(box, maps, lowest, total)
    weight_b = share_in(source, maps_b, lowest[order], total[order])
    both, same = weight_a + weight_b, labels == labels_b
    weight_a, weight_b = (torch.where(same, both, w) for w in (weight_a, weight_b))
    left = 1 - area(box) / SIZE**2
    weight_a, weight_b = weight_a.nan_to_num(left), weight_b.nan_to_num(1 - left)
    return images, labels_b, weight_a, weight_b


def fair_step(network, images, labels, mode: str):
    """Loss of the whole method, one class map, everything vectorised."""
    maps = one_class_map(network, images, labels, mode)
    mixed, labels_b, weight_a, weight_b = fair_snapmix(images, labels, maps)
    logits, features = network(mixed)
    own = torch.where(weight_a >= weight_b, labels, labels_b)
    relevance = torch.einsum(
        "bdhw,bd->bhw", features.detach().float(), network.fc.weight.detach()[own]
    )
    ranked = relevance.flatten(1)
    cells = torch.cat([ranked.topk(2).indices, (-ranked).topk(2).indices], dim=1)
    flat = features.flatten(2).transpose(1, 2)
    picked = flat.gather(1, cells[..., None].expand(-1, -1, flat.shape[-1])).float()
    picked = F.normalize(picked, dim=2)
    contrastive = equation_one(picked @ picked.transpose(1, 2)).mean()
    loss = weight_a * F.cross_entropy(logits, labels, reduction="none")
    loss = loss + weight_b * F.cross_entropy(logits, labels_b, reduction="none")
    return loss.mean() + contrastive


def plain_step(network, images, labels):
    return F.cross_entropy(network(images)[0], labels)


# --- what the benchmark calls ---------------------------------------------------------


def make_network(device: str, *, channels_last: bool, variables=None, extra_bn=False):
    """A ResNet-50 on `device`, with our weights if `variables` holds them."""
    network = ResNet50(extra_bn=extra_bn)
    if variables is not None:
        load_flax(network, variables)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return network.to(device, memory_format=layout).train()


class Forward:
    """A network whose forward pass, and nothing else, may be compiled and in bfloat16.

    Logits come out in float32.
    """

    def __init__(self, network, *, bf16: bool, compiled: bool = False):
        self.fc, self.train = network.fc, network.train
        self._device = network.fc.weight.device.type
        self._call = torch.compile(network) if compiled else network
        self._bf16 = bf16

    def __call__(self, x):
        with torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
            logits, features = self._call(x)
        return logits.float(), features


def make_step(
    kind: str,
    batches: list,
    *,
    device: str = "cpu",
    bf16: bool = False,
    compiled: bool = False,
    variables=None,
    rate: float = 0.01,
) -> Callable[[int], float]:
    """Builds `run(steps) -> loss of the last step`, synchronised at its end.

    Args:
      kind: "plain_nchw", "plain", "published", "fair_eval" or "fair_train" (mode of
        the class-map pass).
      batches: (float32 [B, H, W, 3], int64 [B]) NumPy pairs, taken in turn.
      device: "cpu" or "cuda".
      bf16: bfloat16 autocast.
      compiled: through torch.compile.
      variables: our weights, or None.
      rate: learning rate.
    """
    channels_last = kind not in ("plain_nchw", "published")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = make_network(device, channels_last=channels_last, variables=variables)
    forward = Forward(network, bf16=bf16, compiled=compiled)
    optimizer = torch.optim.SGD(
        network.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    given = [
        (
            torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            .to(device)
            .contiguous(memory_format=layout),
            torch.from_numpy(labels).long().to(device),
        )
        for images, labels in batches
    ]

    def loss_of(images, labels):
        if kind == "published":
            return published_step(forward, images, labels)
        if kind in ("plain", "plain_nchw"):
            return plain_step(forward, images, labels)
        return fair_step(forward, images, labels, kind.removeprefix("fair_"))

    done = 0

    def run(steps: int) -> float:
        nonlocal done
        for _ in range(steps):
            images, labels = given[done % len(given)]
            done += 1
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(images, labels)
            loss.backward()
            optimizer.step()
            if kind == "published":
                loss.item()  # It prints the loss each step.
        return loss.item()

    return run


def make_voting(
    kind: str,
    images,
    *,
    device: str = "cpu",
    bf16: bool = False,
    variables=None,
    k: int = 31,
    theta: float = 0.2,
) -> Callable[[int], list]:
    """Builds `run(n) -> labels of n images` by test-time voting.

    Args:
      kind: "published" (33 forwards of two copies) or "batched" (one of k + 1).
      images: float32 NumPy [N, H, W, 3], taken in turn.
    """
    channels_last = kind == "batched"
    network = make_network(device, channels_last=channels_last, variables=variables)
    network.eval()
    forward = Forward(network, bf16=bf16)
    given = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    vote = published_voting if kind == "published" else batched_voting
    done = 0

    def run(count: int) -> list:
        nonlocal done
        labels = []
        for _ in range(count):
            labels.append(vote(forward, given[done % len(given)], k, theta))
            done += 1
        return labels

    return run


def published_voting(network, image, k: int, theta: float) -> int:
    """One forward and one class-map pass, then k masked ones, each on two copies."""
    images = image[None].repeat(2, 1, 1, 1)
    first = F.softmax(network(images)[0], dim=1)[0, 0].item()
    label = 0 if first > 0.5 else 1
    chosen = torch.full((2,), label, device=image.device)
    maps, _, _ = percent_maps(network, images, chosen, grad=True)
    side = 8
    cells = F.unfold(maps[:1, None], kernel_size=side, stride=side).sum(1)[0]
    votes = []
    for cell in cells.topk(k).indices.tolist():
        row, column = side * (cell // (SIZE // side)), side * (cell % (SIZE // side))
        images = images.clone()
        images[0, :, row : row + side, column : column + side] = 0.0
        prob = F.softmax(network(images)[0], dim=1)[0, 0].item()
        own = prob if label == 0 else 1 - prob
        votes.append(own < theta)
    return 1 - label if sum(votes) > k / 2 else label


@torch.no_grad()
def batched_voting(network, image, k: int, theta: float) -> int:
    """The original gives score and class map; its k masked versions are one batch."""
    cells_per_side = SIZE // 8
    image = image[None].contiguous(memory_format=torch.channels_last)
    logits, features = network(image)
    label = logits[0].argmax()
    maps = torch.einsum("bdhw,d->bhw", features.float(), network.fc.weight[label])
    matrix = interpolation(SIZE, maps.shape[-1], image.device)
    matrix = matrix.reshape(cells_per_side, 8, -1).sum(1)
    order = (matrix @ maps[0] @ matrix.T).flatten().topk(k).indices
    rank = torch.full((cells_per_side**2,), k, device=image.device)
    rank[order] = torch.arange(k, device=image.device)
    keep = rank[None] > torch.arange(k, device=image.device)[:, None]
    keep = keep.reshape(k, 1, cells_per_side, cells_per_side)
    keep = keep.repeat_interleave(8, 2).repeat_interleave(8, 3)
    masked = torch.where(keep, image, image.amin())
    masked = masked.contiguous(memory_format=torch.channels_last)
    own = F.softmax(network(masked)[0].float(), dim=1)[:, label]
    opposing = (own < theta).sum()
    return int(torch.where(opposing > k / 2, 1 - label, label))
