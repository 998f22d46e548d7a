"""Writes tests/golden/covidnet.json: the published COVID-Net port, run in float64.

    python tests/golden/make_covidnet.py MODEL.py     (with torch and numpy installed)

MODEL.py is code/model.py of github.com/med-air/Contrastive-COVIDNet at 43b36b2; none of
it is stored. Its channel numbers are divided by 16, its weights are those of `weights`.
Sites go through it one after another, as its train loop does. The cases are read by
tests/models/test_covidnet.py.
"""

import json
import re
import sys
import types
import zlib
from pathlib import Path

import numpy as np

SHRINK = 16
SITES = (1, 0, 1, 0, 0, 1)  # 1 is site B, which the port calls ucsd.
LABELS = (0, 1, 1, 0, 1, 0)
SIZE = 96
CASES = ("covidnet", "sepnorm")


def images() -> np.ndarray:
    """float64 [B, H, W, 3]."""
    return np.random.default_rng(0).normal(size=(len(SITES), SIZE, SIZE, 3))


def weights(name: str, shape) -> np.ndarray:
    """The tensor that a torch name has, away from 0 and 1 where it is of a norm."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
        return random.uniform(0.5, 1.5, shape)
    fan_in = np.prod(shape[1:]) if len(shape) > 1 else 100
    return 0.6 * random.normal(size=shape) / np.sqrt(fan_in)


def published(source: str, with_norms: bool):
    """The published network with a sixteenth of its channels."""
    import torch

    narrow = re.sub(
        r"\b(64|256|512|1024|2048|128)\b", lambda m: str(int(m[0]) // SHRINK), source
    )
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))
    module = types.ModuleType("published")
    exec(compile(narrow, "model.py", "exec"), module.__dict__)
    model = module.CovidNet(bnd=with_norms, bna=with_norms).double()
    state = {
        name: torch.from_numpy(np.asarray(weights(name, tuple(t.shape)), np.float64))
        for name, t in model.state_dict().items()
        if t.is_floating_point()
    }
    model.load_state_dict(state, strict=False)
    return model


def run(model, training: bool):
    """(sigmoids [B, K], embeddings [B, D]) in the order of the batch."""
    import torch

    model.train(training)
    x = torch.from_numpy(images().transpose(0, 3, 1, 2).copy())
    found = [None] * len(SITES)
    for site, tag in enumerate(("new", "ucsd")):
        rows = [i for i, s in enumerate(SITES) if s == site]
        for row, *values in zip(rows, *model(x[rows], tag), strict=True):
            found[row] = values
    return [torch.stack(part) for part in zip(*found, strict=True)]


def main() -> None:
    import torch

    source = Path(sys.argv[1]).read_text(encoding="utf-8")
    page = {"torch": torch.__version__, "commit": "43b36b2", "cases": {}}
    for case in CASES:
        model = published(source, case == "sepnorm")
        names = {
            name: list(t.shape)
            for name, t in model.state_dict().items()
            if t.is_floating_point()
        }
        tested = run(model, training=False)
        model = published(source, case == "sepnorm")
        trained = run(model, training=True)
        loss = torch.nn.functional.cross_entropy(trained[0], torch.tensor(LABELS))
        loss.backward()
        page["cases"][case] = {
            "tensors": names,
            "eval": [part.tolist() for part in tested],
            "train": [part.tolist() for part in trained],
            "loss": loss.item(),
            "gradients": {  # L2 norms.
                name: float(p.grad.norm())
                for name, p in model.named_parameters()
                if p.grad is not None
            },
        }
    target = Path(__file__).with_name("covidnet.json")
    target.write_text(json.dumps(page) + "\n")


if __name__ == "__main__":
    main()
