"""How well the distance of features tells images of another kind: AUROC per pair.

python -m experiments.foreign --source cxr=DIR site_a=DIR site_b=DIR

For every source some images are those that a run would have been trained on, some its
validation images, some its own new ones; the foreign ones come from every other source,
from phantoms, from natural photographs (crops of scikit-learn's two) and from the MR
files that come with pydicom, most of them thumbnails. Reported are the AUROC of
`novelty.neighbour_distance`, the share that is flagged at the threshold of the
validation images, and of the MR files the share that their DICOM header gives away.
Features are those of EfficientNet-Lite0 with ImageNet weights: no run is needed, and a
trained one may do better or worse. Images of one patient can fall on both sides: what
is asked is whether a kind of image is told.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import pydicom.data

from configs import common
from configs.rows import apply_rows
from cxai_jax import data
from cxai_jax.data import dicom, inputs, novelty, transforms
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
    scans, told = mr_scans()
    others = {"photographs": features(photograph_crops(random)), "mr": features(scans)}
    found = {
        "pairs": measure(seen, others),
        "flagged_by_header": {"mr": told},
        "images": {name: len(one) for name, one in (seen | others).items()},
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


def mr_scans() -> tuple[list[np.ndarray], float]:
    """pydicom's MR images, each once, and the share that `predict` flags by header."""
    files = Path(pydicom.data.__file__).parent / "test_files"
    found = {}
    for path in sorted(filter(dicom.is_dicom, files.rglob("*"))):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True)
            if header.get("Modality") == "MR":
                found.setdefault(header.SOPInstanceUID, inputs.open_slices(path)[0])
        except (ValueError, pydicom.errors.InvalidDicomError):
            continue  # Damaged on purpose, or in need of a decoder.
    told = [any("modality MR" in note for note in one.notes) for one in found.values()]
    return [one.gray for one in found.values()], float(np.mean(told))


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
        filled = np.concatenate([ready, ready[:1].repeat(-len(ready) % BATCH, 0)])
        batches = range(0, len(filled), BATCH)
        found = np.concatenate([pooled(filled[i : i + BATCH]) for i in batches])
        return found[: len(ready)]

    return features


if __name__ == "__main__":
    main()
