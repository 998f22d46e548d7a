"""How well the distance of features tells images of another kind: AUROC per pair.

python -m experiments.foreign --source cxr=DIR site_a=DIR site_b=DIR

For every source some images are those that a run would have been trained on, some its
validation images, some its own new ones; the foreign ones come from every other source,
from phantoms and from natural photographs (crops of scikit-learn's two). Reported are
the AUROC of `novelty.neighbour_distance` and the share that is flagged at the threshold
of the validation images. Features are those of EfficientNet-Lite0 with ImageNet
weights: no run is needed, and a trained one may do better or worse. Images of one
patient can fall on both sides: what is asked is whether a kind of image is told.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from configs import common
from configs.rows import apply_rows
from cxai_jax import data
from cxai_jax.data import inputs, novelty, transforms
from cxai_jax.data.augment import normalise
from cxai_jax.scoring.metrics import auc
from cxai_jax.training.results import versions
from cxai_jax.training.run import build_network
from cxai_jax.writer import write_json

RESULTS = Path(__file__).parent / "results"
BATCH = 20
PARTS = {"reference": 120, "held_out": 60, "new": 60}  # Images of a source.
SEED = 0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", nargs="+", required=True, help="NAME=FOLDER")
    parser.add_argument("--size", type=int, default=128, help="pixels of the input")
    parser.add_argument("--name", default="foreign", help="of the file in results/")
    given = parser.parse_args(arguments)
    random = np.random.default_rng(SEED)
    folders = dict(one.split("=", 1) for one in given.source)
    images = {name: drawn(folder, random) for name, folder in folders.items()}
    images["phantom"] = phantoms()
    features = make_features(given.size)
    seen = {name: features(of_kind) for name, of_kind in images.items()}
    photographs = {"photographs": features(photograph_crops(random))}
    found = {
        "pairs": measure(seen, photographs),
        "images": {name: len(one) for name, one in (seen | photographs).items()},
        "parts": PARTS,
        "neighbours": novelty.NEIGHBOURS,
        "features": "efficientnet_lite0, ImageNet weights, pooled",
        "size": given.size,
        "seed": SEED,
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
    }
    write_json(RESULTS / f"{given.name}.json", found)
    for row in found["pairs"]:
        print(row)


def measure(
    seen: Mapping[str, np.ndarray], foreign_only: Mapping[str, np.ndarray]
) -> list[dict]:
    """Every source as the known one against all others.

    Args:
      seen: source -> features [N, D], N at least the sum of PARTS.
      foreign_only: kinds that nothing is trained on.

    Returns:
      Rows with the AUROC of the distance and the shares flagged.
    """
    rows = []
    for name, features in seen.items():
        ends = np.cumsum(list(PARTS.values()))
        reference, held_out, new = np.split(features[: ends[-1]], ends[:-1])
        known = novelty.describe_features(reference, held_out)
        known["reference"] = known["reference"].astype(np.float32)

        def distance(one, known=known):
            directions = novelty.directions(one)
            return novelty.neighbour_distance(directions, known["reference"])

        own = distance(new)
        for other, features_there in (seen | foreign_only).items():
            if other == name:
                continue
            there = distance(features_there)
            label = np.repeat([False, True], [len(own), len(there)])
            rows.append(
                {
                    "known": name,
                    "foreign": other,
                    "auroc": auc(label, np.concatenate([own, there])),
                    "own_flagged": float((own > known["threshold"]).mean()),
                    "foreign_flagged": float((there > known["threshold"]).mean()),
                }
            )
    return rows


def drawn(folder: str, random: np.random.Generator) -> list[np.ndarray]:
    """As many gray images of a folder as PARTS needs, in random order."""
    files = inputs.find([folder]).files
    wanted = sum(PARTS.values())
    if len(files) < wanted:
        raise ValueError(f"{folder} holds {len(files)} images, {wanted} are needed")
    return [
        transforms.open_gray(files[i]) for i in random.permutation(len(files))[:wanted]
    ]


def phantoms() -> list[np.ndarray]:
    """Phantom slices, in random order."""
    config = common.get_config().data
    config.name, config.phantom_images = "phantom", 2 * sum(PARTS.values())
    config.image_size = config.resize = 128
    splits = data.load(config).splits.values()
    images = [one for records in splits for one in records.images]
    order = np.random.default_rng(SEED).permutation(len(images))
    return [images[i] for i in order[: sum(PARTS.values())]]


def photograph_crops(random: np.random.Generator) -> list[np.ndarray]:
    """Square gray crops of scikit-learn's two photographs, 20 of each."""
    from sklearn.datasets import load_sample_images

    crops = []
    for picture in load_sample_images().images:
        gray = transforms.to_gray(picture)
        for side in random.integers(160, 400, 20):
            row, column = (random.integers(0, n - side) for n in gray.shape[:2])
            crops.append(gray[row : row + side, column : column + side])
    return crops


def make_features(size: int):
    """Builds the function from gray images to pooled features [N, D]."""
    config = apply_rows(common.get_config(), "lite0")
    network = build_network(config, 2)

    @jax.jit
    def pooled(images):
        x = normalise(images, network.scale.mean, network.scale.std)
        _, out = network.model.apply(network.variables, x, "eval")
        return out.features.mean((1, 2))

    def features(images: Sequence[np.ndarray]) -> np.ndarray:
        ready = np.stack([transforms.squash(one, size) for one in images])
        ready = ready.reshape(len(ready), size, size, 1)
        batches = range(0, len(ready) - BATCH + 1, BATCH)
        return np.concatenate([pooled(ready[i : i + BATCH]) for i in batches])

    return features


if __name__ == "__main__":
    main()
