"""Chest X-rays of the covid-chestxray collection, COVID-19 against every other finding.

Cohen, Morrison & Dao (2020). Hospitals, views and findings are confounded there, so a
score says what a network can tell apart in this collection, not what COVID-19 looks
like. An image is counted by its own finding: a patient may have images of both classes.
"""

import os.path
from pathlib import Path

from ml_collections import ConfigDict

from cxai_jax.data import splits, store, tables
from cxai_jax.data.plan import Plan, Source
from cxai_jax.data.records import Dataset, DatasetSpec

CLASS_NAMES = ("other finding", "COVID-19")
POSITIVE = 1
COLUMNS = ("filename", "patientid", "finding", "lung_mask")
DEFAULT_SPLIT = "seed0"
# One picture under two names and two patient numbers.
REPEATED = {"353889E0-A1E8-4F9E-A0B8-F24F36BCFBFB.jpg": "case_72_RX-TORACE1.jpg"}


def load(data_config: ConfigDict) -> Dataset:
    """Prepared chest X-rays; `split`: seed0 (default), seed1, ..."""
    return store.load("cxr", data_config.split or DEFAULT_SPLIT, data_config.data_dir)


def plan_cxr(source: str | Path, split: str = "") -> Plan:
    """Reads metadata.csv, the images and the lung masks.

    COVID-19 is positive alone and among others ("COVID-19, ARDS"). Rows whose finding
    is "todo" have no diagnosis and are left out, repeated rows of one image as well.

    Args:
      source: folder that holds metadata.csv, images/ and lung_masks/.
      split: "seed0", "seed1", ...: the seed of the patient-disjoint split.

    Raises:
      FileNotFoundError: for a missing folder or table, or an absent image or mask.
      ValueError: for an unknown split, a missing column, or rows of one image that
        disagree.
    """
    split = split or DEFAULT_SPLIT
    if not split.removeprefix("seed").isdecimal():
        raise ValueError(f"unknown split {split!r} of cxr; known: seed0, seed1, ...")
    source = Path(source)
    rows, left_out = _rows(source)
    labels = ["COVID-19" in _findings(row) for row in rows]
    chosen = splits.patient_disjoint(
        [row["patientid"] for row in rows], labels, int(split.removeprefix("seed"))
    )
    return Plan(
        name="cxr",
        split=split,
        split_scheme=f"patient-disjoint, {split}",
        class_names=CLASS_NAMES,
        site_names=("cxr",),
        positive=POSITIVE,
        sources=[
            Source(
                file=_existing(source / "images" / row["filename"], source),
                name=row["filename"],
                label=int(label),
                split=str(part),
                patient=row["patientid"],
                lung_mask=_existing(source / "lung_masks" / row["lung_mask"], source)
                if row["lung_mask"]
                else None,
            )
            for row, label, part in zip(rows, labels, chosen, strict=True)
        ],
        left_out=left_out,
    )


def _rows(source: Path) -> tuple[list[dict], list[tuple[str, str]]]:
    """The rows to use, one per image, and (image, reason) of the others."""
    table = source / "metadata.csv"
    first: dict[str, dict] = {}
    left_out = []
    found = tables.read_rows(table)
    if not found:
        raise ValueError(f"{table} is empty")
    for row in found:
        for column in COLUMNS:
            if row.get(column) is None:
                raise ValueError(
                    f"{table} has a row without {column!r}; expected the columns "
                    f"{', '.join(COLUMNS)}"
                )
        row = {column: row[column].strip() for column in COLUMNS}
        name = row["filename"]
        if "todo" in _findings(row):
            left_out.append((name, "its finding is 'todo': no diagnosis"))
        elif name in REPEATED:
            left_out.append((name, f"the same picture as {REPEATED[name]}"))
        elif name not in first:
            first[name] = row
        elif row["finding"] != first[name]["finding"]:
            raise ValueError(
                f"{table} gives {name!r} two findings, {first[name]['finding']!r} and "
                f"{row['finding']!r}; keep one row"
            )
        else:
            patients = f"{first[name]['patientid']!r} and {row['patientid']!r}"
            left_out.append((name, f"a second row, of patients {patients}"))
    return list(first.values()), left_out


def _findings(row: dict) -> list[str]:
    return [part.strip() for part in row["finding"].split(",")]


def _existing(file: Path, source: Path) -> Path:
    inside = os.path.normpath(source.absolute()) + os.sep
    if not os.path.normpath(file.absolute()).startswith(inside):
        table = source / "metadata.csv"
        raise ValueError(f"{table} names {file}, outside of its folder; remove the row")
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"{source / 'metadata.csv'} names {file}, but there is no such file; "
            "restore it or remove the row"
        )
    return file


SPEC = DatasetSpec(load, plan_cxr)
