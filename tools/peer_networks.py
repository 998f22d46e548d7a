"""The peer's networks: timm's, with our weights, for training and for evaluation.

timm has our padding, epsilons and activations: its `tf_` Lite network pads as
TensorFlow does. The names of its tensors are those that `cxai_jax.models.pretrained`
reads, so our weights find their places by the same rules, the other way round.
"""

from collections.abc import Callable

import numpy as np
from flax.traverse_util import flatten_dict

from cxai_jax.models import pretrained
from tools.benchmark_peer import NETWORKS

try:
    import timm
    import torch
    from torch import nn
except ImportError as error:
    raise ImportError(
        "the PyTorch peer needs torch and timm, which this project does not depend on: "
        "pip install torch timm, or leave out --peer=torch"
    ) from error

CLASSES = 2
OURS_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}  # Axes of kernels; others stay.


class Network(nn.Module):
    """Returns logits [B, K] and the features [B, D, h, w] before the global pool."""

    def __init__(self, name: str):
        super().__init__()
        self.trunk = timm.create_model(NETWORKS[name], num_classes=CLASSES)
        self.fc = self.trunk.get_classifier()

    def forward(self, x):
        features = self.trunk.forward_features(x)
        return self.fc(features.mean((2, 3))), features


def load_ours(network: Network, name: str, variables: dict) -> None:
    """Copies our weights into the peer, strict both ways.

    Args:
      network: of the same name.
      name: a key of NETWORKS.
      variables: NumPy {"params": ..., "batch_stats": ...} of our backbone.

    Raises:
      ValueError: a weight of ours that finds no place.
      KeyError, RuntimeError: one of the peer's that is not filled, or another shape.
    """
    ours, tensors = flatten_dict(variables, sep="/"), {}
    for key in network.trunk.state_dict():
        if not pretrained.IGNORED.fullmatch(key):
            value = ours.pop(pretrained.translate(key, name))
            axes = OURS_TO_TORCH.get(value.ndim, range(value.ndim))
            tensors[key] = torch.from_numpy(value.transpose(axes).copy())
    if ours:
        raise ValueError(f"the peer's {name} has no place for {', '.join(ours)}")
    network.trunk.load_state_dict(tensors, strict=False)


def make_network(name: str, variables: dict, device: str, *, channels_last: bool):
    """A network in train mode on `device`, with our weights."""
    network = Network(name)
    load_ours(network, name, variables)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return network.to(device, memory_format=layout).train()


def to_torch(images: np.ndarray, device: str, *, channels_last: bool):
    """NumPy [B, H, W, C] -> tensor [B, C, H, W] on `device`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    return tensor.to(device).contiguous(memory_format=layout)


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


def make_inference(
    model: str,
    batches: list,
    *,
    variables: dict,
    device: str = "cpu",
    bf16: bool = False,
) -> Callable[[int], float]:
    """Builds `run(calls)`: evaluation forward passes, synchronised at the end.

    `run.about` holds the logits of the first batch.

    Args:
      model: a key of NETWORKS.
      batches: (float32 [B, H, W, 3], labels) NumPy pairs, taken in turn.
      variables: our weights.
      device: "cpu" or "cuda".
      bf16: bfloat16 autocast.
    """
    network = make_network(model, variables, device, channels_last=True).eval()
    forward = Forward(network, bf16=bf16)
    given = [to_torch(images, device, channels_last=True) for images, _ in batches]
    done = 0

    @torch.inference_mode()
    def run(calls: int) -> float:
        nonlocal done
        for _ in range(calls):
            logits, _ = forward(given[done % len(given)])
            done += 1
        return logits[0, 0].item()

    with torch.inference_mode():
        run.about = {"logits": forward(given[0])[0].cpu().numpy()}
    return run
