"""COVIDx-CT: chest CT slices, normal, pneumonia and COVID-19, on the published split.

Gunraj, Wang & Wong (2020), versions CT-1, CT-2A and CT-3A. The source folder holds
`train|val|test_COVIDx_CT-2A.txt` with lines `file class xmin ymin xmax ymax`, the
images beside them or in a folder of any name, and `metadata.csv`, whose column
`patient id` names the patients; without it (CT-1 has none) they are unknown.

covidx_ct_binary is the same prepared data without pneumonia, which is what the counts
of the CT paper's Table 3 are of (A25).
"""

import hashlib
import os
import re
from collections.abc import Iterator, Set
from dataclasses import replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cxai_jax.data import reading, store, tables
from cxai_jax.data.plan import Box, Plan, Source, is_image
from cxai_jax.data.records import SPLITS, Dataset, DatasetSpec

CLASS_NAMES = ("Normal", "Pneumonia", "COVID-19")  # As the lists number them.
BINARY_NAMES = ("Normal", "COVID-19")
POSITIVE = 2
VERSIONS = ("CT-2A", "CT-1", "CT-3A")
CROPPED = "-body"
SPLIT_SCHEMES = {
    version + end: f"official ({version}){words}"
    for version in VERSIONS
    for end, words in (("", ""), (CROPPED, ", cropped to the body"))
}
PATIENT = "patient id"  # Column of metadata.csv.


def load(data_config: ConfigDict) -> Dataset:
    """Prepared COVIDx-CT, three classes; `split`: CT-2A (default), CT-2A-body, ..."""
    split = data_config.split or VERSIONS[0]
    _check(split)
    return store.load("covidx_ct", split, data_config.data_dir)


def load_binary(data_config: ConfigDict) -> Dataset:
    """The same images without pneumonia: COVID-19 against normal slices."""
    whole = load(data_config)
    new = np.array([0, -1, 1], np.int32)  # Label -> label, -1: left out.
    kept = {
        split: records.subset(new[records.labels] >= 0)
        for split, records in whole.splits.items()
    }
    text = f"{whole.fingerprint} {BINARY_NAMES}"
    verdict = f"of all three classes: {whole.leakage['verdict']}"
    return replace(
        whole,
        name="covidx_ct_binary",
        splits={s: replace(r, labels=new[r.labels]) for s, r in kept.items()},
        class_names=BINARY_NAMES,
        positive=BINARY_NAMES.index("COVID-19"),
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        leakage=whole.leakage | {"verdict": verdict},
    )


def plan_covidx_ct(source: str | Path, split: str = "") -> Plan:
    """Reads the three lists, metadata.csv and the names of the images.

    Args:
      source: folder that holds lists and metadata.csv, and images or their folder.
      split: a version, "CT-2A" (default), "CT-1" or "CT-3A", of which the whole images
        are stored; with "-body" behind it the boxes of the lists alone.

    Raises:
      FileNotFoundError: for a missing folder, list or listed image.
      ValueError: for an unknown split, a malformed line, a class that is none, a box
        of no area, an image listed twice, or a row of metadata.csv without a patient.
    """
    split, source = split or VERSIONS[0], Path(source)
    _check(split)
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: no such folder; give --source the folder that holds the lists"
        )
    listed = _listed(source, split.removesuffix(CROPPED))
    folder = _folder_of(source, listed.keys())
    there = _files(folder)
    absent = [name for name in listed if name not in there]
    if absent:
        raise FileNotFoundError(
            f"{listed[absent[0]][2].place}: {absent[0]!r} is not in {folder} "
            f"({len(absent)} such lines); restore it or remove the line"
        )
    table = source / "metadata.csv"
    known = _patients(table) if table.exists() else None
    sources, unlisted = [], []
    for name, (part, label, box) in listed.items():
        patient = "" if known is None else patient_of(name, known)
        if patient or known is None:
            sources.append(Source(folder / name, name, label, part, patient, box=box))
        else:
            unlisted.append((name, f"of no patient that {table} has ({box.place})"))
    return Plan(
        name="covidx_ct",
        split=split,
        split_scheme=SPLIT_SCHEMES[split],
        class_names=CLASS_NAMES,
        site_names=("covidx_ct",),
        positive=POSITIVE,
        sources=sources,
        left_out=[
            (reading.printable(name), "in none of the three lists")
            for name in sorted(there - listed.keys())
            if is_image(folder / name)
        ],
        unlisted=unlisted,
        crop=split.endswith(CROPPED),
    )


def patient_of(name: str, patients: Set[str]) -> str:
    """The patient whose id is part of an image's name; "" if it is none of `patients`.

    Most names begin with it, `NCP_96_1328_0032.png` with NCP_96; those of COVID-CTset
    have it inside, as `137covid_patient76_SR_2_IM00014.png`.
    """
    stem = name.rpartition(".")[0]
    ends = [found.start() for found in re.finditer("[_-]", stem)]
    for end in (len(stem), *reversed(ends)):
        if stem[:end] in patients:
            return stem[:end]
    return next((word for word in stem.split("_") if word in patients), "")


def _check(split: str) -> None:
    if split not in SPLIT_SCHEMES:
        raise ValueError(
            f"unknown split {split!r} of covidx_ct; known: {', '.join(SPLIT_SCHEMES)}"
        )


def _listed(source: Path, version: str) -> dict[str, tuple[str, int, Box]]:
    """Image -> (split, class, box), from the three lists."""
    listed: dict[str, tuple[str, int, Box]] = {}
    for part in SPLITS:
        for name, label, box in _lines(source / f"{part}_COVIDx_{version}.txt"):
            if name in listed:
                raise ValueError(
                    f"{box.place}: {name!r} is listed already ({listed[name][2].place})"
                    "; keep one line"
                )
            listed[name] = part, label, box
    return listed


def _lines(listing: Path) -> Iterator[tuple[str, int, Box]]:
    """(file, class, box) of the lines of a list."""
    empty = True
    for number, line in enumerate(reading.read_text(listing).splitlines(), 1):
        if not line.strip():
            continue
        empty, place = False, f"{listing}, line {number}"
        name, *numbers = line.strip().rsplit(maxsplit=5)
        try:
            label, *corners = map(int, numbers)
            box = Box(*corners, place)
        except (ValueError, TypeError):
            raise ValueError(
                f"{place}: {line.strip()!r} is not `file class xmin ymin xmax ymax`"
            ) from None
        if label not in range(len(CLASS_NAMES)):
            numbered = ", ".join(f"{i} {c}" for i, c in enumerate(CLASS_NAMES))
            raise ValueError(f"{place}: class {label}, expected one of {numbered}")
        if not (0 <= box.left < box.right and 0 <= box.top < box.bottom):
            raise ValueError(
                f"{place}: the box {box} of {name!r} has no area or begins outside the "
                "image; expected 0 <= xmin < xmax and 0 <= ymin < ymax"
            )
        yield name, label, box
    if empty:
        raise ValueError(f"{listing} is empty")


def _folder_of(source: Path, names: Set[str]) -> Path:
    """The source folder or the one in it that holds most of the images."""
    folders = [source, *sorted(f for f in source.iterdir() if f.is_dir())]
    return max(folders, key=lambda folder: len(_files(folder) & names))


def _files(folder: Path) -> set[str]:
    """The names in a folder that are no folders."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if not entry.is_dir()}


def _patients(table: Path) -> set[str]:
    """The patients of metadata.csv."""
    rows = tables.read_rows(table)
    if not rows or PATIENT not in rows[0]:
        raise ValueError(f"{table} has no rows with a column {PATIENT!r}")
    patients = set()
    for number, row in enumerate(rows, 2):
        patient = (row[PATIENT] or "").strip()
        if not patient:
            raise ValueError(
                f"{table}, line {number}: no {PATIENT}; fill the cell in or remove the "
                "row"
            )
        patients.add(patient)
    return patients


SPEC = DatasetSpec(load, plan_covidx_ct)
BINARY = DatasetSpec(load_binary)
