"""Is a new image like those a model was trained on? Hashes and grey-level ranges.

A run keeps what is needed to answer that in its workdir; `predict`
reads it and flags images that were trained on or lie outside the training ranges.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cxai_jax.data import leakage, transforms
from cxai_jax.data.records import Records

FILE = "training_images.json"
# Statistic -> (flag below the training range, flag above it).
FLAGS = {
    "aspect": (
        "narrower than every training image",
        "wider than every training image",
    ),
    "brightness": (
        "darker than every training image",
        "brighter than every training image",
    ),
    "contrast": (
        "less contrast than every training image",
        "more contrast than every training image",
    ),
}


def statistics(image: np.ndarray) -> dict[str, float]:
    """Width / height, and the mean and standard deviation of uint8 [H, W, 1]."""
    return {
        "aspect": image.shape[1] / image.shape[0],
        "brightness": float(image.mean()),
        "contrast": float(image.std()),
    }


def stored_digest(image: np.ndarray, resize: int) -> str:
    """Hash of the pixels as they are stored for training: short side `resize`."""
    return leakage.pixel_digest(transforms.short_side(image, resize))


def describe(records: Records, resize: int) -> dict:
    """Hashes and ranges of the training images, as JSON values.

    Args:
      records: what the run was fitted on.
      resize: config.data.resize, pixels of the short side.

    Returns:
      `resize`, sorted `hashes`, and `ranges`: statistic -> [smallest, largest].
    """

    def read(i):
        image = records.images[i]
        return stored_digest(image, resize), statistics(image)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests, rows = zip(*pool.map(read, range(len(records))), strict=True)
    return {
        "resize": resize,
        "hashes": sorted(set(digests)),
        "ranges": {
            name: [min(r[name] for r in rows), max(r[name] for r in rows)]
            for name in FLAGS
        },
    }


def load(workdir: Path) -> dict:
    """What `describe` returned for the run in `workdir`, its hashes as a set.

    Raises:
      FileNotFoundError: if the run did not write it.
    """
    path = workdir / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; score the run again with --mode=eval to write it"
        )
    known = json.loads(path.read_text())
    return known | {"hashes": set(known["hashes"])}


def flags(image: np.ndarray, known: dict, input_size: int) -> list[str]:
    """What to tell a reader about an image beside its prediction.

    Args:
      image: gray uint8 [H, W, 1], as opened.
      known: what `load` returned.
      input_size: pixels, side of the network's input.
    """
    found = []
    if stored_digest(image, known["resize"]) in known["hashes"]:
        found.append("seen in training")
    if min(image.shape[:2]) < input_size:
        found.append(
            f"small: {image.shape[1]} x {image.shape[0]} pixels, enlarged to "
            f"{input_size}"
        )
    for name, value in statistics(image).items():
        low, high = known["ranges"][name]
        # Aspects of stored images are rounded to whole pixels.
        slack = 0.02 if name == "aspect" else 0.5
        if value < low - slack or value > high + slack:
            found.append(FLAGS[name][int(value > high)])
    return found
