"""Does the test split share pictures or patients with the training split?

Four checks over every pair of splits: equal files, equal pixels, near duplicates
(Pearson correlation of 64 x 64 thumbnails) and shared patients; and one over all
images: equal pixels with different labels.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from PIL import Image

SIDE = 64  # Pixels, side of a thumbnail.
THRESHOLD = 0.97  # Correlation above which two images count as near duplicates.
SIMILAR = 0.9  # Reported as well: neighbouring slices of one patient reach it.
BLOCK = 2  # Pixels, side of the blocks whose means bound a correlation.
FEW = 50  # One pair in so many is computed by itself, more of them as a matrix.
CHUNK = 2048  # Thumbnails per side of one matrix product: 64 MB of float32.
EXAMPLES = 5  # Pairs listed per finding.


def digest(data: bytes) -> str:
    """sha256 hex digest of a file's bytes."""
    return hashlib.sha256(data).hexdigest()


def pixel_digest(image: np.ndarray) -> str:
    """sha256 hex digest of shape and pixels."""
    return digest(str(image.shape).encode() + np.ascontiguousarray(image).tobytes())


def thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 [64, 64] of a gray or RGB uint8 [H, W, C], aspect ignored."""
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    size = (SIDE, SIDE)
    return np.asarray(picture.convert("L").resize(size, Image.Resampling.BILINEAR))


def near_pairs(
    first: np.ndarray, second: np.ndarray, threshold: float = THRESHOLD
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of thumbnails that correlate above the threshold, and the best partner.

    For standardised x and y and the projection P onto block means, Px.Py + |x - Px|
    |y - Py| >= x.y: a product of a quarter of the size leaves few pairs to compute.

    Args:
      first: uint8 [N, 64, 64].
      second: uint8 [M, 64, 64].
      threshold: of Pearson's r; a constant thumbnail correlates with nothing.

    Returns:
      int [P, 2], index into `first` and into `second`; and float32 [M], the highest
      correlation of each of `second` with any of `first`, which may be given too low
      where it is below SIMILAR and the threshold.
    """
    ruled_in = min(threshold, SIMILAR) - 1e-4  # Room for rounding.
    bounds = np.empty((len(second), SIDE**2 // BLOCK**2 + 1), np.float32)
    for j in range(0, len(second), CHUNK):
        bounds[j : j + CHUNK] = _bounds(_standardise(second[j : j + CHUNK]))
    found = [np.zeros((0, 2), int)]
    best = np.full(len(second), -1, np.float32)
    for i in range(0, len(first), CHUNK):
        rows = _standardise(first[i : i + CHUNK])
        row_bounds = _bounds(rows)
        for j in range(0, len(second), CHUNK):
            a, b = np.nonzero(row_bounds @ bounds[j : j + CHUNK].T > ruled_in)
            if not len(a):
                continue
            used, column = np.unique(b, return_inverse=True)
            r = _products(rows, _standardise(second[j + used]), a, column)
            np.maximum.at(best, j + b, r)
            near = r > threshold
            found.append(np.stack([i + a[near], j + b[near]], axis=1))
    return np.concatenate(found), best


def examine(
    splits: Sequence[str],
    names: Sequence[str],
    labels: Sequence[int],
    patients: Sequence[str],
    file_digests: Sequence[str],
    pixel_digests: Sequence[str],
    thumbnails: np.ndarray,
) -> dict:
    """Looks for pictures and patients that two splits share.

    Args:
      splits: [N] "train", "val" or "test".
      names: [N] source files, for the examples.
      labels: [N] class indices.
      patients: [N], "" where unknown.
      file_digests: [N], equal for byte duplicates ("" where there is no file).
      pixel_digests: [N], equal for pixel duplicates.
      thumbnails: uint8 [N, 64, 64].

    Returns:
      A dict that JSON can hold: `pairs["train-test"]` has for each of byte_duplicates,
      pixel_duplicates, near_duplicates the number of images of the later split with
      such a partner in the earlier one (a pixel duplicate is a near duplicate too),
      similar those with a correlation above 0.9, shared_patients their number,
      near_duplicates_with_other_label counts pairs, and examples;
      conflicting_labels: groups of equal pixels with more than one label, over all
      splits; unknown_patients: images without a patient; verdict: one line.
    """
    split_of, names, labels = map(np.asarray, (splits, names, labels))
    patients, pixels = np.asarray(patients, str), np.asarray(pixel_digests, str)
    files = np.asarray(file_digests, str)
    present = [s for s in ("train", "val", "test") if s in split_of]
    pairs, findings = {}, []
    for early, late in combinations(present, 2):
        a, b = np.flatnonzero(split_of == early), np.flatnonzero(split_of == late)
        equal = _equal_pairs(pixels[a], pixels[b])
        near, best = near_pairs(thumbnails[a], thumbnails[b])
        near = np.unique(np.concatenate([equal, near]), axis=0)
        partners = {
            "byte_duplicates": _equal_pairs(files[a], files[b]),
            "pixel_duplicates": equal,
            "near_duplicates": near,
        }
        shared = sorted((set(patients[a]) & set(patients[b])) - {""})
        found = {key: len(np.unique(p[:, 1])) for key, p in partners.items()}
        found["similar"] = int(np.sum(best > SIMILAR))
        found["shared_patients"] = len(shared)
        found["near_duplicates_with_other_label"] = int(
            np.sum(labels[a[near[:, 0]]] != labels[b[near[:, 1]]])
        )
        found["examples"] = {
            key: [[str(names[a[i]]), str(names[b[j]])] for i, j in p[:EXAMPLES]]
            for key, p in partners.items()
            if len(p)
        }
        if shared:
            found["examples"]["shared_patients"] = shared[:EXAMPLES]
        pairs[f"{early}-{late}"] = found
        findings += _sentences(found, early, late, len(b))
    conflicts = _conflicts(pixels, labels, names)
    unknown = int(np.sum(patients == ""))
    return {
        "threshold": THRESHOLD,
        "pairs": pairs,
        "conflicting_labels": {
            "groups": len(conflicts),
            "examples": conflicts[:EXAMPLES],
        },
        "unknown_patients": unknown,
        "verdict": _verdict(findings, len(conflicts), unknown, len(names)),
    }


def _standardise(thumbnails: np.ndarray) -> np.ndarray:
    """float32 [N, 4096] rows of mean 0 and norm 1; 0 for a constant thumbnail."""
    rows = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _bounds(rows: np.ndarray) -> np.ndarray:
    """float32 [N, 1025]: sums of blocks, orthonormal, and the norm of what they lack.

    The product of two of them is at least that of the standardised rows [N, 4096].
    """
    blocks = SIDE // BLOCK
    sums = rows.reshape(-1, blocks, BLOCK, blocks, BLOCK).sum((2, 4)) / BLOCK
    seen = sums.reshape(len(rows), blocks**2)
    missed = np.square(rows).sum(1) - np.square(seen).sum(1)
    return np.c_[seen, np.sqrt(np.maximum(missed, 0))]


def _products(rows: np.ndarray, columns: np.ndarray, a, b) -> np.ndarray:
    """float32 [P], rows[a[p]] . columns[b[p]]."""
    if len(a) * FEW > len(rows) * len(columns):
        return (rows @ columns.T)[a, b]
    parts = [slice(p, p + CHUNK) for p in range(0, len(a), CHUNK)]
    return np.concatenate(
        [np.einsum("pd,pd->p", rows[a[p]], columns[b[p]]) for p in parts]
    )


def _equal_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """int [P, 2]: index of the first equal, non-empty item, for each of `second`."""
    place = {key: i for i, key in reversed(list(enumerate(first))) if key}
    pairs = [(place[key], j) for j, key in enumerate(second) if key in place]
    return np.array(pairs, int).reshape(-1, 2)


def _conflicts(pixels, labels, names) -> list[list[str]]:
    groups = defaultdict(list)
    for i, key in enumerate(pixels):
        groups[key].append(i)
    return [
        [str(names[i]) for i in members]
        for members in groups.values()
        if len(set(labels[members])) > 1
    ]


def _sentences(found: dict, early: str, late: str, total: int) -> list[str]:
    said = []
    if found["near_duplicates"]:
        equal = found["pixel_duplicates"]
        other = found["near_duplicates_with_other_label"]
        said.append(
            f"{found['near_duplicates']} of {total} {late} images have a near "
            f"duplicate in {early}"
            + (f" ({equal} pixel-identical)" if equal else "")
            + (f" ({other} of these pairs with the other label)" if other else "")
        )
    if found["shared_patients"]:
        said.append(
            f"{found['shared_patients']} patients are in both {early} and {late}"
        )
    return said


def _verdict(findings: list[str], conflicts: int, unknown: int, total: int) -> str:
    said = []
    if findings:
        said.append("LEAKS: " + ", ".join(findings))
    if conflicts:
        said.append(f"{conflicts} groups of equal images have conflicting labels")
    if unknown == total:
        said.append("no patient ids: shared patients cannot be ruled out")
    elif unknown:
        said.append(f"{unknown} of {total} images have no patient id")
    return "; ".join(said) or "clean"
