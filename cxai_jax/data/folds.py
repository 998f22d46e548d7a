"""Folds for cross-validation over all images of a data set, whatever its own split.

Fold k of n is `test`. Of the rest an eighth is `val`, cut out in the same way, so that
validation shares neither patient nor block with test or train and nothing need ever be
selected on test; what remains is `train`.
"""

import dataclasses
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cxai_jax.data import leakage, sites, splits
from cxai_jax.data.records import SPLITS, Dataset, Records, concatenate, fingerprint

VALIDATION = 8  # One in so many of the images outside the test fold: 10 % of 5 folds.
# Sites without patient numbers, and how a file name gives the order of acquisition.
ORDERED = {"site_a": sites.file_number}


def refold(dataset: Dataset, fold: str, seed: int = 0) -> Dataset:
    """The data set with fold `fold` as test; each site is folded by its own rule.

    Patients are kept whole where they are known, file numbers in blocks for the sites
    of `ORDERED`; anything else is split by image, and labelled so.

    Args:
      dataset: its splits are pooled.
      fold: "2of5".
      seed: `config.data.split_seed`.

    Raises:
      ValueError: for a malformed or impossible fold, more folds than patients, or a
        part that lacks a class.
    """
    number, count = parse(fold)
    pooled = concatenate([dataset.splits[s] for s in SPLITS if s in dataset.splits])
    pooled = pooled.subset(np.argsort(pooled.names, kind="stable"))
    part, schemes = np.empty(len(pooled), "<U5"), []
    for site, name in enumerate(dataset.site_names):
        rows = np.flatnonzero(pooled.sites == site)
        try:
            part[rows], scheme = assign(pooled.subset(rows), name, number, count, seed)
        except ValueError as error:
            raise ValueError(f"config.data.fold={fold!r} of {name}: {error}") from None
        schemes.append(scheme)
    several = len(schemes) > 1
    named = [f"{n}: {s}" for n, s in zip(dataset.site_names, schemes, strict=True)]
    return dataclasses.replace(
        dataset,
        splits={key: pooled.subset(part == key) for key in SPLITS},
        split_scheme=f"fold {number} of {count}, "
        + (", ".join(named) if several else schemes[0])
        + (f", seed {seed}" if seed else ""),
        **checked(pooled, part),
    )


def parse(fold: str) -> tuple[int, int]:
    """(2, 5) of "2of5".

    Raises:
      ValueError: if it is no such word, or the number is out of range.
    """
    match = re.fullmatch(r"(\d+)of(\d+)", fold)
    number, count = map(int, match.groups()) if match else (0, 0)
    if count < 2 or not 1 <= number <= count:
        raise ValueError(
            f"config.data.fold={fold!r}; expected KofN with N >= 2 and K from 1 to N, "
            "such as 2of5, or nothing for the split as prepared"
        )
    return number, count


def assign(
    records: Records, site: str, number: int, count: int, seed: int
) -> tuple[np.ndarray, str]:
    """ "train", "val" or "test" of every image of one site [N], and the scheme's name.

    Raises:
      ValueError: for too many folds, or a part that lacks a class.
    """
    labels, part = records.labels, np.full(len(records), "train", "<U5")
    if site in ORDERED and (records.patients == "").all():
        scheme = "blocked"
        numbers = np.array([ORDERED[site](name) for name in records.names])
        order = splits.turned(numbers, labels, seed)
        fold = splits.blocked_folds(order, labels, count)
        # Validation follows the test block, round the end, so that both together have
        # but two borders with train.
        turn = (fold - number) % count
        rest = np.flatnonzero(turn != count - 1)
        place = np.argsort(np.lexsort((order, turn)))[rest]
        held = splits.blocked_folds(place, labels[rest], parts_of(rest, labels[rest]))
    else:
        known = (records.patients != "").any()
        scheme = "patient-disjoint" if known else "random (image-level)"
        fold = splits.grouped_folds(records.patients, labels, count, seed)
        rest = np.flatnonzero(fold != number - 1)
        persons = np.array(splits.named(records.patients))[rest]
        parts = parts_of(persons, labels[rest])
        held = splits.grouped_folds(persons, labels[rest], parts, seed)
    part[rest[held == 0]] = "val"
    part[fold == number - 1] = "test"
    for name in SPLITS:
        if len(np.unique(labels[part == name])) < len(np.unique(labels)):
            raise ValueError(
                f"its {name} part of {np.sum(part == name)} images lacks a class; ask "
                "for fewer folds or another config.data.split_seed"
            )
    return part, scheme


def parts_of(persons: np.ndarray, labels: np.ndarray) -> int:
    """VALIDATION, or less where a class has fewer persons: one in so many is val."""
    return min(VALIDATION, *(len(set(persons[labels == k])) for k in set(labels)))


def checked(records: Records, part: np.ndarray) -> dict:
    """Fingerprint and leakage verdict of the new parts, from the stored pixels."""

    def look(row):
        image = records.images[row]
        return leakage.pixel_digest(image), leakage.thumbnail(image)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pixels, thumbnails = zip(*pool.map(look, range(len(records))), strict=True)
    return {
        "fingerprint": fingerprint(part, records.names, records.labels, pixels),
        "leakage": leakage.examine(
            part,
            records.names,
            records.labels,
            records.patients,
            [""] * len(part),  # Equal files have equal pixels, which are compared.
            pixels,
            np.stack(thumbnails),
        ),
    }
