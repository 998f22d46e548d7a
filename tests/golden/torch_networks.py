"""Writes torch_networks.json: what published PyTorch networks say on made-up weights.

    python tests/golden/torch_networks.py

Run where torch, torchvision, timm, pretrainedmodels and efficientnet_lite_pytorch are
installed; nothing is downloaded. Weights and images follow from names and shapes by
`weight` and `images` below, which tests/test_models_peers.py imports, so that outputs
alone are stored: some features and logits in float64 of the running and of the training
form, and a digest of every name and shape that the peer's state_dict holds.
"""

import hashlib
import json
import zlib
from importlib import metadata
from pathlib import Path

import numpy as np

OUTPUT = Path(__file__).with_suffix(".json")
SIDE = 96  # Pixels: maps of odd and of even side on the way.
SHOWN = 8  # Logits and channels that are stored.


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values of a tensor by its torch name; RandomState is frozen by NumPy."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) < 2:
        return rng.uniform(-0.2, 0.2, shape).astype(np.float32)
    bound = (6 / np.prod(shape[1:])) ** 0.5  # He et al. (2015), by the fan-in.
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def images() -> np.ndarray:
    """Two images, float32 [2, SIDE, SIDE, 3]."""
    shape = (2, SIDE, SIDE, 3)
    return np.random.RandomState(0).uniform(-2, 2, shape).astype(np.float32)


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """Of every name and shape of a state_dict, in any order."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def peers() -> dict:
    """Our name / their package -> (package, network, its features); dropout is off."""
    import pretrainedmodels
    import timm
    import torchvision
    from efficientnet_lite_pytorch import EfficientNet
    from torch import nn

    dense = torchvision.models.densenet121()
    b0 = torchvision.models.efficientnet_b0(dropout=0.0, stochastic_depth_prob=0.0)
    timm_b0 = timm.create_model("efficientnet_b0")
    timm_lite = timm.create_model("tf_efficientnet_lite2")
    nasnet = pretrainedmodels.nasnetamobile(num_classes=1000, pretrained=None)
    nasnet.avg_pool, nasnet.dropout = nn.AdaptiveAvgPool2d(1), nn.Identity()

    def port(name: str) -> tuple:
        off = {"image_size": SIDE, "dropout_rate": 0.0, "drop_connect_rate": 0.0}
        net = EfficientNet.from_name(name, **off)
        return "efficientnet_lite_pytorch", net, net.extract_features

    return {
        "densenet121": ("torchvision", dense, lambda x: dense.features(x).relu()),
        "efficientnet_b0": ("torchvision", b0, b0.features),
        "efficientnet_b0 timm": ("timm", timm_b0, timm_b0.forward_features),
        "efficientnet_lite0": port("efficientnet-lite0"),
        "efficientnet_lite1": port("efficientnet-lite1"),
        "efficientnet_lite2": port("efficientnet-lite2"),
        "efficientnet_lite2 timm": ("timm", timm_lite, timm_lite.forward_features),
        "nasnet_mobile": (
            "pretrainedmodels",
            nasnet,
            lambda x: nasnet.features(x).relu(),
        ),
    }


def outputs(network, features) -> dict:
    """Features and logits in evaluation and in training, float64."""
    import torch

    state = network.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    for name, shape in shapes.items():
        if not name.endswith("num_batches_tracked"):
            state[name].copy_(torch.from_numpy(weight(name, shape)))
    network.double()
    x = torch.from_numpy(images().transpose(0, 3, 1, 2).copy()).double()
    result = {
        "names_and_shapes": digest(shapes),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    start = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        for mode in ("eval", "train"):
            network.train(mode == "train")
            network.load_state_dict(start)
            maps = features(x)
            network.load_state_dict(start)
            result[mode] = {
                "features_mean": float(maps.mean()),
                "features": maps[:, :SHOWN, 1, 2].tolist(),
                "logits": network(x)[:, :SHOWN].tolist(),
            }
    return result


def main() -> None:
    """Writes the file beside this one."""
    networks = {}
    for name, (package, network, features) in peers().items():
        print(name)
        networks[name] = {"package": package, **outputs(network, features)}
    packages = ("torch", "numpy", *{n["package"] for n in networks.values()})
    versions = {name: metadata.version(name) for name in sorted(packages)}
    content = {"versions": versions, "networks": networks}
    OUTPUT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
