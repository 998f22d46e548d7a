"""What every data source hands over: a `Dataset` of splits, each a `Records`.

Images are decoded when they are asked for, so a data set of any size loads at once.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from cxai_jax.data.transforms import STORED_SIDE

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Mapped(Sequence):
    """The sequence `function(source[i])`, computed on access.

    Args:
      function: called with one item of `source`.
      source: anything with a length and integer indexing.
    """

    function: Callable[[Any], Any]
    source: Sequence

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Any:
        if not -len(self) <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        return self.function(self.source[int(i) % len(self)])


@dataclass(frozen=True)
class Records:
    """One split, N images.

    Args:
      images: sequence of uint8 [h, w, C], C = 1 or 3, decoded on access.
      labels: int32 [N], class index.
      sites: int32 [N], site index.
      patients: str [N], "" where the patient is unknown.
      names: str [N], source file, relative to the source folder.
      lung_masks: sequence of uint8 [h, w] (1 inside), or None if the source has none;
        single items may be None as well.
      lesion_masks: likewise.
      shapes: (h, w, C) that occur among the images or their superset, None if unknown.

    Raises:
      ValueError: if the fields differ in length.
    """

    images: Sequence
    labels: np.ndarray
    sites: np.ndarray
    patients: np.ndarray
    names: np.ndarray
    lung_masks: Sequence | None = None
    lesion_masks: Sequence | None = None
    shapes: frozenset | None = None

    def __post_init__(self):
        lengths = {f: len(c) for f, c in self.columns().items() if c is not None}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the fields of Records must be equally long: {lengths}")

    def __len__(self) -> int:
        return len(self.labels)

    def columns(self) -> dict[str, Any]:
        """The fields of N items by name, not copied."""
        return {name: getattr(self, name) for name in COLUMNS}

    def subset(self, rows: np.ndarray) -> "Records":
        """The records of the given row numbers (or boolean mask), in that order."""
        rows = np.arange(len(self))[rows]

        def take(column):
            if column is None or isinstance(column, np.ndarray):
                return column if column is None else column[rows]
            return Mapped(column.__getitem__, rows)

        taken = {name: take(column) for name, column in self.columns().items()}
        return Records(**taken, shapes=self.shapes)


COLUMNS = tuple(f.name for f in fields(Records) if f.name != "shapes")


def concatenate(parts: Sequence[Records]) -> Records:
    """One Records with the rows of all parts, in order.

    A mask that only some parts have is None for the rows of the others.
    """
    places = [(part, row) for part in parts for row in range(len(part))]

    def join(name):
        columns = [getattr(part, name) for part in parts]
        if all(isinstance(column, np.ndarray) for column in columns):
            return np.concatenate(columns)
        if all(column is None for column in columns):
            return None

        def read(place):
            part, row = place
            column = getattr(part, name)
            return None if column is None else column[row]

        return Mapped(read, places)

    known = [part.shapes for part in parts if part.shapes is not None]
    shapes = frozenset().union(*known) if len(known) == len(parts) else None
    return Records(**{name: join(name) for name in COLUMNS}, shapes=shapes)


@dataclass(frozen=True)
class Dataset:
    """A named data set.

    Args:
      name: key of `DATASETS`.
      splits: Records of some of "train", "val", "test".
      class_names: K names, in the order of the labels.
      site_names: one name per site index.
      positive: class index counted as positive by precision, recall and F1.
      split_scheme: "official", "blocked", "patient-disjoint", "random (image-level)".
      fingerprint: sha256 hex digest over names, labels and pixels.
      leakage: what `leakage.examine` found; `leakage["verdict"]` is one line.
    """

    name: str
    splits: Mapping[str, Records]
    class_names: tuple[str, ...]
    site_names: tuple[str, ...]
    positive: int
    split_scheme: str
    fingerprint: str
    leakage: dict = field(default_factory=dict)

    def __post_init__(self):
        for split, records in self.splits.items():
            if records.sites.size and records.sites.max() >= len(self.site_names):
                raise ValueError(
                    f"{self.name}: an image of {split} is of site "
                    f"{records.sites.max()}, but site_names has {len(self.site_names)}"
                )


def fingerprint(splits: Sequence[str], names, labels, pixel_digests) -> str:
    """sha256 hex digest over split, name, label and pixel digest of every image."""
    rows = zip(splits, names, labels, pixel_digests, strict=True)
    text = "\n".join(f"{s}\t{n}\t{int(y)}\t{p}" for s, n, y, p in rows)
    return hashlib.sha256(text.encode()).hexdigest()


class DatasetSpec(NamedTuple):
    """A data set: how it is opened, and how its files become what is opened.

    Args:
      load: function of `config.data` that returns a Dataset.
      plan: function of the source folder, and of those options of cxai-prepare
        that its parameters name (split, split_files, name, positive, keep_ids), that
        returns a plan.Plan; None where nothing has to be prepared.
      channels: of the stored images: 1 gray, 3 colour.
      side: pixels, short side of the stored images; None stores them as they are.
    """

    load: Callable[[Any], Dataset]
    plan: Callable[..., Any] | None = None
    channels: int = 1
    side: int | None = STORED_SIDE
