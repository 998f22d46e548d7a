"""Split assignments, pure NumPy: which image goes to train, val or test.

Neighbouring slices of one patient are nearly the same picture, so an image-level
split scores memory. `patient_disjoint` is right where patients are known; `blocked`
is the honest stand-in where only the file numbers are.
"""

from collections.abc import Mapping

import numpy as np

FRACTIONS = {"train": 0.65, "val": 0.10, "test": 0.25}


def counts(total: int, fractions: Mapping[str, float] = FRACTIONS) -> dict[str, int]:
    """Sizes of the splits of `total` items: rounded shares, the rest to train.

    From 2 items on test gets at least one, from 3 items on val as well.
    """
    test = min(max(1, round(fractions["test"] * total)), total - 1)
    val = min(max(1, round(fractions["val"] * total)), total - 1 - test)
    test, val = max(test, 0), max(val, 0)
    return {"train": total - val - test, "val": val, "test": test}


def blocked(
    numbers: np.ndarray,
    labels: np.ndarray,
    fractions: Mapping[str, float] = FRACTIONS,
    blocks: int = 3,
) -> np.ndarray:
    """Contiguous runs of file numbers, per class.

    Each class, sorted by number, is cut into `blocks` equal runs, and each run into
    train, val and test in this order: neighbours stay together except at 3 `blocks` - 1
    cuts, and early as well as late numbers are tested.

    Args:
      numbers: int [N], the order of acquisition, e.g. from the file names.
      labels: int [N].
      fractions: shares of train, val and test.
      blocks: runs per class.

    Returns:
      str [N], "train", "val" or "test"; every image is assigned.
    """
    split = np.empty(len(labels), "<U5")
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ordered = members[np.argsort(np.asarray(numbers)[members], kind="stable")]
        for run in np.array_split(ordered, min(blocks, max(1, len(ordered) // 3))):
            sizes = counts(len(run), fractions)
            split[run] = np.repeat(list(sizes), list(sizes.values()))
    return split


def random_stratified(
    labels: np.ndarray, seed: int = 0, fractions: Mapping[str, float] = FRACTIONS
) -> np.ndarray:
    """Image-level random split with equal class shares; it leaks between neighbours.

    Args:
      labels: int [N].
      seed: of the shuffle.
      fractions: shares of train, val and test.

    Returns:
      str [N], "train", "val" or "test".
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    return blocked(np.argsort(order), labels, fractions, blocks=1)


def patient_disjoint(
    patients: np.ndarray,
    labels: np.ndarray,
    seed: int = 0,
    fractions: Mapping[str, float] = FRACTIONS,
) -> np.ndarray:
    """Random split in which no patient is in two splits, with near equal class shares.

    Patients come in order of falling size, ties shuffled; each goes where most images
    of its classes are still missing.

    Args:
      patients: str [N]; each "" counts as a patient of its own.
      labels: int [N].
      seed: of the shuffle.
      fractions: shares of train, val and test.

    Returns:
      str [N], "train", "val" or "test".
    """
    labels = np.asarray(labels)
    alone = [f"\0{i}" if not p else str(p) for i, p in enumerate(patients)]
    groups, group = np.unique(alone, return_inverse=True)
    classes, label = np.unique(labels, return_inverse=True)
    images = np.zeros((len(groups), len(classes)), int)
    np.add.at(images, (group, label), 1)
    sizes = [counts(n, fractions) for n in images.sum(0)]
    names = list(FRACTIONS)
    missing = np.array([[size[name] for size in sizes] for name in names], float)
    chosen = np.empty(len(groups), int)
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    for g in shuffled[np.argsort(-images[shuffled].sum(1), kind="stable")]:
        chosen[g] = np.argmax(missing @ images[g])
        missing[chosen[g]] -= images[g]
    return np.array(names)[chosen[group]]
