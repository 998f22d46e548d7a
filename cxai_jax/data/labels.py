"""A folder of images with `labels.csv` as a data set, whatever its folders are called.

Columns file,label and, if wanted, patient, split and site, in any order; file is
relative to the folder, other columns are not read. UTF-8, with or without a byte order
mark, lines ended as on any system.
"""

from pathlib import Path, PurePosixPath

import numpy as np

from cxai_jax.data import dicom, reading, splits, tables
from cxai_jax.data.plan import Plan, Source, by_frame, is_image
from cxai_jax.data.positive import positive_class
from cxai_jax.data.records import SPLITS

TABLE = "labels.csv"
NEEDED, OPTIONAL = ("file", "label"), ("patient", "split", "site")


def plan_labels(
    source: Path,
    name: str,
    positive: str = "",
    split: str = "",
    keep_ids: bool = False,
) -> Plan:
    """Reads `source/labels.csv`; classes and sites are sorted by name.

    Args: as `folder.plan_folder`.

    Raises:
      FileNotFoundError: if the table names a file that is not there.
      ValueError: for a missing column or cell, a file listed twice or outside the
        folder, an unknown split, one class alone, or no clear positive class.
    """
    table = source / TABLE
    rows = read_rows(table)
    class_names = sorted({row["label"] for row in rows})
    if len(class_names) < 2:
        raise ValueError(
            f"{table} has the label {class_names[0]!r} alone; at least 2 classes are "
            "needed"
        )
    site_names = sorted({row["site"] for row in rows}) if "site" in rows[0] else [name]
    labels = np.array([class_names.index(row["label"]) for row in rows])
    patients = [row.get("patient", "") for row in rows]
    headers = dicom.headers([source / row["file"] for row in rows], keep_ids)
    if "patient" not in rows[0]:
        patients = [header.patient for header in headers]
    if split == "test":
        scheme, chosen = "all for testing", ["test"] * len(rows)
    elif "split" in rows[0]:
        scheme, chosen = f"given ({TABLE})", [row["split"] for row in rows]
    else:
        scheme, chosen = splits.drawn(patients, labels)
    listed = {row["file"] for row in rows}
    return Plan(
        name=name,
        split="default",
        split_scheme=scheme,
        class_names=tuple(class_names),
        site_names=tuple(site_names),
        positive=positive_class(class_names, positive),
        sources=by_frame(
            [
                Source(
                    source / row["file"],
                    row["file"],
                    int(label),
                    str(part),
                    patient,
                    site_names.index(row.get("site", name)),
                )
                for row, label, part, patient in zip(
                    rows, labels, chosen, patients, strict=True
                )
            ],
            [header.frames for header in headers],
        ),
        left_out=[
            (reading.printable(file.relative_to(source)), f"not in {TABLE}")
            for file in sorted(source.rglob("*"))
            if is_image(file) and file.relative_to(source).as_posix() not in listed
        ],
    )


def read_rows(table: Path) -> list[dict[str, str]]:
    """The rows, each cell stripped and checked; errors as in `plan_labels`."""
    header, lines = tables.read_numbered(table)
    named = {column.strip(): column for column in header}
    if missing := [c for c in NEEDED if c not in named]:
        raise ValueError(
            f"{table} has no column {missing[0]!r}; expected the header "
            f"{','.join(NEEDED)}[,{','.join(OPTIONAL)}]"
        )
    kept = [c for c in (*NEEDED, *OPTIONAL) if c in named]
    if not lines:
        raise ValueError(f"{table} lists no image")
    rows, seen = [], set()
    for number, line in lines:
        row = {c: (line[named[c]] or "").strip() for c in kept}
        if row["file"]:
            row["file"] = PurePosixPath(row["file"]).as_posix()  # ./a.png is a.png.
        rows.append(row)
        place = f"{table}, line {number}: {row['file']!r}"
        for column in kept:
            if not row[column] and column != "patient":
                raise ValueError(f"{place} has no {column}; fill the cell in")
        if row["file"] in seen:
            raise ValueError(f"{place} is listed twice; keep one line")
        seen.add(row["file"])
        if ".." in PurePosixPath(row["file"]).parts or Path(row["file"]).is_absolute():
            raise ValueError(f"{place} lies outside the folder; move it in")
        if not (table.parent / row["file"]).is_file():
            raise FileNotFoundError(
                f"{place} is not there; restore it or remove the line"
            )
        if row.get("split", SPLITS[0]) not in SPLITS:
            raise ValueError(
                f"{place} has the split {row['split']!r}, expected one of "
                f"{', '.join(SPLITS)}"
            )
    return rows
