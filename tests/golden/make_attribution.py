"""Writes attribution.json: maps of the published AGF code on made-up weights.

    python tests/golden/make_attribution.py CHECKOUT

CHECKOUT holds github.com/shirgur/AGFVisualization; run where torch is installed. The
weights and images are `weight` and `images` of torch_networks.py, the head's divided by
the largest logit, which would saturate the softmax, so that maps and that number alone
are stored: float64, over their maximum as published, of two images and a class each, as
means over 8 x 8 pixels.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch_networks import images, weight

COMMIT = "64c0159"  # Of the published code.
CLASSES = (3, 7)  # Explained, of the two images.
NETWORKS = ("resnet18", "resnet50")


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    torch.Tensor.cuda = lambda self, *_: self  # It asks for a GPU by name.
    torch.set_default_dtype(torch.float64)
    from modules import layers, resnet

    # A basic block adds a tuple to a tensor where its shortcut is the identity, which
    # fails; a bottleneck makes tuples of both, as is done here for either.
    published = layers.Add.AGF

    def add(self, *args, **kwargs):
        shares, gradients = published(self, *args, **kwargs)
        return shares, [(one,) for one in gradients]

    layers.Add.AGF = add
    found, largest = {}, {}
    for name in NETWORKS:
        network = getattr(resnet, name)(num_classes=10)
        state = network.state_dict()
        network.load_state_dict(
            {
                key: torch.tensor(weight(key, tuple(value.shape)), dtype=value.dtype)
                if value.dim()
                else value
                for key, value in state.items()
            }
        )
        network.eval()
        x = torch.tensor(images().transpose(0, 3, 1, 2), dtype=torch.float64)
        largest[name] = network(x).abs().max().item()
        for tensor in (network.fc.weight, network.fc.bias):
            tensor.data /= largest[name]
        network(x)
        maps = network.AGF(class_id=list(CLASSES)).detach().numpy()[:, 0]
        side = maps.shape[1] // 8
        maps = maps.reshape(2, side, 8, side, 8).mean((2, 4))
        found[name] = np.round(maps, 8).tolist()
    about = {"commit": COMMIT, "torch": torch.__version__, "classes": CLASSES}
    about["largest_logit"] = largest
    path = Path(__file__).with_name("attribution.json")
    path.write_text(json.dumps(about | {"maps": found}) + "\n")


if __name__ == "__main__":
    main()
