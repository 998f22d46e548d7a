"""Is a new image like those a model was trained on? Hashes and grey-level ranges.

A run keeps what is needed to answer that in its workdir; `predict` reads it and flags
images that were trained on or lie outside the training ranges. The hash survives
scaling, as the original of a training image is rarely of the size that was stored.

What no range tells is told by the network's features: an image is foreign if it lies
farther from the training images than 95 % of the validation images do (k nearest
neighbours on normalised features, Sun et al. 2022).
"""

import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from cxai_jax import disk
from cxai_jax.data import transforms
from cxai_jax.data.records import Records
from cxai_jax.writer import read_json

FILE = "training_images.json"
FEATURES = "training_features.npz"
NEIGHBOURS = 5  # k; the distance is that to the k-th.
FOREIGN = "unlike the training images"
KEPT = 1000  # Training images at most whose features are kept.
LIKE = 0.95  # Share of the validation images that are called alike.
SIDE = 16  # Rows and columns of the difference hash: 256 bits.
RISE = 4  # Grey levels that count as a rise: noise of a dark background does not.
SAME = 8  # Bits in which two hashes of one picture differ at most.
SEEN = "seen in training"
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
    share = np.array(Image.fromarray(image[..., 0]).histogram()) / image.size
    levels = np.arange(256)
    mean = share @ levels
    return {
        "aspect": image.shape[1] / image.shape[0],
        "brightness": float(mean),
        "contrast": float(np.sqrt(share @ (levels - mean) ** 2)),
    }


def difference_hash(image: np.ndarray) -> np.ndarray:
    """Where brightness rises from left to right, on a 16 x 16 grid: bits packed [32].

    Hardly changes when the picture is scaled or compressed: 42 originals of COVID-CT
    differ from their scaled copies in at most 3 of the 256 bits, 11 others from every
    copy in at least 43, except one near duplicate in 17.

    Args:
      image: gray uint8 [H, W, 1].
    """
    small = Image.fromarray(image[..., 0]).resize(
        (SIDE + 1, SIDE), Image.Resampling.BILINEAR
    )
    return np.packbits(np.diff(np.asarray(small, np.int16), axis=1) > RISE)


def is_known(image: np.ndarray, hashes: np.ndarray) -> bool:
    """Whether one of the hashes, uint8 [N, 32], is that of the image.

    Never of a blank image: its hash is near that of every other blank one.
    """
    own = difference_hash(image)
    if np.bitwise_count(own).sum() <= SAME:
        return False
    return bool((np.bitwise_count(hashes ^ own).sum(1) <= SAME).any())


def as_gray(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 1]: luma where uint8 [H, W, C] has colour, else as it is."""
    return transforms.to_gray(image) if image.shape[-1] == 3 else image


def describe(records: Records) -> dict:
    """Hashes and ranges of the training images, as JSON values.

    Args:
      records: what the run was fitted on.

    Returns:
      `difference_hashes`, hexadecimal, sorted; and `ranges`: statistic -> [smallest,
      largest].
    """

    def read(i):
        image = as_gray(records.images[i])
        return difference_hash(image).tobytes().hex(), statistics(image)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes, rows = zip(*pool.map(read, range(len(records))), strict=True)
    return {
        "difference_hashes": sorted(set(hashes)),
        "ranges": {
            name: [min(r[name] for r in rows), max(r[name] for r in rows)]
            for name in FLAGS
        },
    }


def load(workdir: Path) -> dict:
    """What `describe` returned for the run in `workdir`, its hashes as uint8 [N, 32].

    Raises:
      FileNotFoundError: if the run did not write it.
      ValueError: if an earlier version wrote it, or it is damaged.
    """
    path, again = workdir / FILE, "score the run again with --mode=eval to write it"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {again}")
    known = read_json(path)
    if "difference_hashes" not in known:
        raise ValueError(f"{path} is of an earlier version; {again}")
    try:
        packed = bytes.fromhex("".join(known["difference_hashes"]))
        hashes = np.frombuffer(packed, np.uint8).reshape(-1, SIDE * SIDE // 8)
        for name in FLAGS:
            low, high = known["ranges"][name]
            if not float(low) <= float(high):
                raise ValueError(f"{name} reaches from {low} to {high}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {again}") from None
    return known | {"difference_hashes": hashes}


def flags(image: np.ndarray, known: dict, input_size: int) -> list[str]:
    """What to tell a reader about an image beside its prediction.

    Args:
      image: gray uint8 [H, W, 1], as opened.
      known: what `load` returned.
      input_size: pixels, side of the network's input.
    """
    found = []
    if is_known(image, known["difference_hashes"]):
        found.append(SEEN)
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


def directions(features: np.ndarray) -> np.ndarray:
    """Features [N, D] scaled to length 1; a vector of zeros stays."""
    features = np.asarray(features, np.float32)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(length, 1e-12)


def neighbour_distance(
    features: np.ndarray, reference: np.ndarray, *, itself: bool = False
) -> np.ndarray:
    """Euclidean distance to the k-th nearest of the reference, k = 5, float32 [N].

    Args:
      features, reference: `directions` [N, D] and [M, D].
      itself: whether the features are the reference, each then no neighbour of itself.
    """
    inner = features @ reference.T
    squared = np.maximum(2 - 2 * inner, 0)
    if itself:
        np.fill_diagonal(squared, np.inf)
    k = min(NEIGHBOURS, squared.shape[1] - itself)
    return np.sqrt(np.partition(squared, k - 1, axis=1)[:, k - 1])


def describe_features(trained_on: np.ndarray, held_out: np.ndarray | None) -> dict:
    """What tells a foreign image by the network's features.

    Args:
      trained_on: pooled features of training images [N, D].
      held_out: of validation images; None sets the threshold on the training images,
        each compared with the others.

    Returns:
      reference float16 [M, D], the directions of at most KEPT training images; and
      threshold float32, the distance within which LIKE of the held-out images lie.
    """
    rows = np.linspace(0, len(trained_on) - 1, min(KEPT, len(trained_on))).round()
    reference = directions(trained_on[rows.astype(int)]).astype(np.float16)
    known = reference.astype(np.float32)
    if held_out is None:
        distance = neighbour_distance(known, known, itself=True)
    else:
        distance = neighbour_distance(directions(held_out), known)
    threshold = np.quantile(distance, LIKE, method="higher")
    return {"reference": reference, "threshold": np.float32(threshold)}


def save_features(workdir: Path, described: dict) -> None:
    """Writes what `describe_features` returned."""
    disk.write_arrays(workdir / FEATURES, described)


def load_features(workdir: Path) -> dict:
    """What `describe_features` returned for the run in `workdir`.

    Raises:
      FileNotFoundError: if the run did not write it.
      ValueError: if it is damaged.
    """
    path, again = workdir / FEATURES, "score the run again with --mode=eval to write it"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; {again}")
    try:
        with np.load(path, allow_pickle=False) as file:
            reference = file["reference"].astype(np.float32)
            threshold = float(file["threshold"])
        if reference.ndim != 2 or not len(reference) or not np.isfinite(threshold):
            raise ValueError(f"reference {reference.shape}, threshold {threshold}")
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}); {again}") from None
    return {"reference": reference, "threshold": threshold}


def foreign(pooled: np.ndarray, known: dict) -> list[str]:
    """For each image what to tell a reader who must not trust its prediction; or "".

    Args:
      pooled: the network's features [N, D].
      known: what `load_features` returned.
    """
    distance = neighbour_distance(directions(pooled), known["reference"])
    ratio = distance / max(known["threshold"], 1e-12)
    return [
        f"{FOREIGN} ({one:.2f} times the accepted distance)" if one > 1 else ""
        for one in ratio
    ]
