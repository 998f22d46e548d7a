"""Writes tests/golden/explanation_metrics.json from Quantus and pytorch-grad-cam.

Run once, in an environment of its own (neither library is a dependency):

    pip install torch quantus==0.6.0
    pip install --no-deps grad-cam==1.5.7 ttach
    python experiments/oracle_explanation_metrics.py

The model is a fixed two-layer net, so that the tests can repeat it in NumPy. Maps are
in [0, 1] and pairwise distinct; no library normalises them again.
"""

import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import quantus
import torch
from quantus.functions.perturb_func import noisy_linear_imputation
from quantus.functions.similarity_func import correlation_spearman

if importlib.util.find_spec("torchvision") is None:
    # pytorch-grad-cam imports it for targets and pictures, never for its metrics.
    for name in ("torchvision", "torchvision.transforms"):
        sys.modules[name] = mock.MagicMock()
    sys.modules["torchvision.transforms.functional"] = types.SimpleNamespace(
        resize=None
    )

from pytorch_grad_cam.metrics.cam_mult_image import (  # noqa: E402
    DropInConfidence,
    IncreaseInConfidence,
)
from pytorch_grad_cam.metrics.perturbation_confidence import (  # noqa: E402
    PerturbationConfidenceMetric,
    RemoveLeastRelevantFirst,
    RemoveMostRelevantFirst,
)
from pytorch_grad_cam.metrics.road import NoisyLinearImputer  # noqa: E402

TARGET = Path(__file__).parents[1] / "tests" / "golden" / "explanation_metrics.json"
SIZE, STEP, PERCENTILES = 8, 8, (10, 30, 50, 70, 90)


class Net(torch.nn.Module):
    """softmax(W2 relu(W1 x)) in float64."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = torch.tensor(first), torch.tensor(second)

    def forward(self, x):
        hidden = torch.relu(x.flatten(1).to(self.first.dtype) @ self.first)
        return torch.softmax(hidden @ self.second, dim=1)


def inputs():
    rng = np.random.default_rng(0)
    maps = np.stack([rng.permutation(SIZE * SIZE) for _ in range(4)]) / (SIZE * SIZE)
    spread = np.array([[1], [2], [3], [4]])  # One spread per image.
    maps = ((maps + 1 / 128) ** spread).round(9).reshape(4, SIZE, SIZE)
    masks = np.zeros((4, SIZE, SIZE), int)
    masks[0, 2:6, 1:5] = masks[1, :3, :] = masks[2, 4:, 4:] = masks[3, 3, 3:7] = 1
    peak = np.unravel_index(maps[2].argmax(), (SIZE, SIZE))
    masks[2][peak] = 1  # One image at least must hit.
    return {
        "maps": maps,
        "other_maps": rng.random((4, SIZE, SIZE)).round(6),
        "masks": masks,
        "images": rng.normal(size=(4, SIZE, SIZE)).round(4),
        "labels": np.array([0, 1, 2, 1]),
        "first": (rng.normal(size=(SIZE * SIZE, 6)) / 4).round(4),
        "second": rng.normal(size=(6, 3)).round(4),
        "removed": np.sort(rng.choice(SIZE * SIZE, 30, replace=False)),
    }


def localisation_and_complexity(data):
    options = {"abs": False, "normalise": False, "disable_warnings": True}
    x, a = data["images"][:, None], data["maps"][:, None]
    s = data["masks"][:, None].astype(bool)
    metrics = {
        "pointing_game": quantus.PointingGame(**options),
        "energy_pointing_game": quantus.RelevanceMassAccuracy(**options),
        "relevance_rank_accuracy": quantus.RelevanceRankAccuracy(**options),
        "localisation_auc": quantus.AUC(**options),
        "gini": quantus.Sparseness(**options),
        "entropy": quantus.Complexity(**options),
    }
    return {
        name: np.asarray(
            metric.evaluate_batch(x_batch=x.copy(), a_batch=a.copy(), s_batch=s), float
        )
        for name, metric in metrics.items()
    }


def faithfulness(data):
    net = Net(data["first"], data["second"]).eval()
    x, a = data["images"][:, None], data["maps"][:, None]
    flipping = quantus.PixelFlipping(
        features_in_step=STEP,
        perturb_baseline=0.0,
        abs=False,
        normalise=False,
        disable_warnings=True,
    )
    curve = flipping(
        model=net, x_batch=x, y_batch=data["labels"], a_batch=a, softmax=False
    )
    tensor, cams = torch.tensor(x, dtype=torch.float32), data["maps"]
    targets = [lambda output, k=k: output[k] for k in data["labels"]]
    imputer = NoisyLinearImputer(noise=0)

    def removal(order, p):
        metric = PerturbationConfidenceMetric(order(p, imputer))
        return metric(tensor, cams, targets, net)

    road = [
        (removal(RemoveLeastRelevantFirst, p) - removal(RemoveMostRelevantFirst, p)) / 2
        for p in PERCENTILES
    ]
    return {
        "deletion_curve": np.asarray(curve),
        "drop_in_confidence": DropInConfidence()(tensor, cams, targets, net),
        "increase_in_confidence": IncreaseInConfidence()(tensor, cams, targets, net),
        "road": np.mean(road, axis=0),
        "imputed": noisy_linear_imputation(
            data["images"][:1].copy(), data["removed"], noise=0.0
        )[0],
    }


def main():
    data = inputs()
    pairs = zip(data["maps"], data["other_maps"], strict=True)
    values = {
        **localisation_and_complexity(data),
        **faithfulness(data),
        "spearman": [correlation_spearman(a.ravel(), b.ravel()) for a, b in pairs],
    }
    packages = ("quantus", "grad-cam", "torch", "numpy", "scipy")
    content = {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "step": STEP,
        "percentiles": PERCENTILES,
        "inputs": {name: value.tolist() for name, value in data.items()},
        "values": {name: np.asarray(v).tolist() for name, v in values.items()},
    }
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(content) + "\n")
    for name, value in values.items():
        print(name, np.shape(value), np.round(np.ravel(value)[:4], 5))


if __name__ == "__main__":
    main()
