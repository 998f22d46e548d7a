"""Split assignments, pure NumPy: which image goes to train, val or test.

Neighbouring slices of one patient are nearly the same picture, so an image-level
split scores memory. `patient_disjoint` is right where patients are known; `blocked`
is the honest stand-in where only the file numbers are.
"""

from collections.abc import Mapping

import numpy as np

SERIES = "series "  # Begins the name of a patient of whom a DICOM series is known only.
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

    Args:
      patients: str [N]; each "" counts as a patient of its own.
      labels: int [N].
      seed: of the shuffle.
      fractions: shares of train, val and test.

    Returns:
      str [N], "train", "val" or "test".
    """
    classes, label = np.unique(labels, return_inverse=True)
    sizes = [counts(n, fractions) for n in np.bincount(label)]
    wanted = [[size[name] for size in sizes] for name in FRACTIONS]
    return np.array(list(FRACTIONS))[_fill(patients, label, wanted, seed)]


def drawn(patients: list[str], labels: np.ndarray) -> tuple[str, np.ndarray]:
    """The scheme's name and the split of each image, where none is given.

    Args:
      patients: [N], "" where unknown.
      labels: int [N].
    """
    if any(patients):
        scheme = "patient-disjoint"
        if any(patient.startswith(SERIES) for patient in patients):
            scheme += ", a DICOM series without PatientID taken for a patient"
        return scheme, patient_disjoint(patients, labels)
    return "random (image-level)", random_stratified(labels)


def grouped_folds(
    patients: np.ndarray, labels: np.ndarray, folds: int, seed: int = 0
) -> np.ndarray:
    """Folds that share no patient, with near equal sizes and class shares.

    Args:
      patients: str [N]; each "" counts as a patient of its own.
      labels: int [N].
      folds: how many.
      seed: of the shuffle.

    Returns:
      int [N], 0 .. folds - 1.

    Raises:
      ValueError: for more folds than patients.
    """
    if folds > (known := len(np.unique(named(patients)))):
        raise ValueError(f"{folds} folds of {known} patients; ask for fewer folds")
    classes, label = np.unique(labels, return_inverse=True)
    # The remainders of the classes go to different folds.
    turn = np.argsort(np.argsort(label, kind="stable")) % folds
    wanted = np.zeros((folds, len(classes)))
    np.add.at(wanted, (turn, label), 1)
    return _fill(patients, label, wanted, seed)


def turned(numbers: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Places of the images within their class, from a random one on and round the end.

    Args:
      numbers: int [N], the order of acquisition, e.g. from the file names.
      labels: int [N].
      seed: of the first place; 0 begins with the lowest number.

    Returns:
      int [N], 0 .. images of the class - 1.
    """
    place, random = np.empty(len(labels), int), np.random.default_rng(seed)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ordered = members[np.argsort(np.asarray(numbers)[members], kind="stable")]
        ordered = np.roll(ordered, -random.integers(len(ordered)) if seed else 0)
        place[ordered] = np.arange(len(ordered))
    return place


def blocked_folds(places: np.ndarray, labels: np.ndarray, folds: int) -> np.ndarray:
    """Folds of contiguous places: each class, in order, is cut into equal runs.

    Args:
      places: int [N], the order of acquisition, or what `turned` makes of it.
      labels: int [N].
      folds: how many.

    Returns:
      int [N], 0 .. folds - 1.

    Raises:
      ValueError: for more folds than images of a class.
    """
    fold = np.empty(len(labels), int)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if folds > len(members):
            raise ValueError(
                f"{folds} folds of a class of {len(members)} images; ask for fewer "
                "folds"
            )
        ordered = members[np.argsort(np.asarray(places)[members], kind="stable")]
        for number, run in enumerate(np.array_split(ordered, folds)):
            fold[run] = number
    return fold


def named(patients: np.ndarray) -> list[str]:
    """Patient ids [N] in which each unknown patient, "", is somebody."""
    return [f"\0{i}" if not p else str(p) for i, p in enumerate(patients)]


def _fill(patients, label: np.ndarray, wanted, seed: int) -> np.ndarray:
    """The place of each image, int [N], that keeps patients whole.

    Patients come in order of falling size, ties shuffled; each goes where most images
    of its classes are still missing of `wanted` [places, K].
    """
    groups, group = np.unique(named(patients), return_inverse=True)
    missing = np.array(wanted, float)
    images = np.zeros((len(groups), missing.shape[1]), int)
    np.add.at(images, (group, label), 1)
    chosen = np.empty(len(groups), int)
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    for g in shuffled[np.argsort(-images[shuffled].sum(1), kind="stable")]:
        chosen[g] = np.argmax(missing @ images[g])
        missing[chosen[g]] -= images[g]
    return chosen[group]
