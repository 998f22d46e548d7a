"""Any `class_name/*.png|jpg|jpeg|tif|tiff|bmp|dcm` tree as a data set.

Beside the class folders may lie `splits.csv` (columns file,split) and `patients.csv`
(columns file,patient); file is `class_name/name.png`, or `name.png` if that is unique.
Without splits.csv the split is drawn here: patient-disjoint where patients are given,
else image-level, and labelled so.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cxai_jax.data import splits, store
from cxai_jax.data.records import SPLITS, Dataset
from cxai_jax.data.store import Plan, Source


def load(data_config: ConfigDict) -> Dataset:
    """A prepared folder: name "folder" reads data_dir/folder, "folder:x" data_dir/x."""
    name = data_config.name.partition(":")[2] or "folder"
    return store.load(name, data_config.split or "default", data_config.data_dir)


def plan_folder(source: str | Path, name: str = "folder") -> Plan:
    """Reads a tree of class folders.

    Classes are sorted by name. The positive class is the one whose name has "covid" or
    "positive" but not "non" in it, else the last.

    Args:
      source: folder that holds one folder per class.
      name: directory name of the prepared data.

    Raises:
      FileNotFoundError: if `source` is missing, or a table names an absent image.
      ValueError: for a wrong folder level, fewer than two classes, a malformed table,
        or an image that splits.csv does not list.
    """
    source = Path(source)
    class_names = _class_folders(source)
    files = [file for c in class_names for file in store.class_files(source, c)]
    names = [file.relative_to(source).as_posix() for file in files]
    labels = np.array([class_names.index(file.parent.name) for file in files])
    patients = _column(source / "patients.csv", "patient", names) or {}
    given = _column(source / "splits.csv", "split", names)
    ids = [patients.get(n, "") for n in names]
    if given is not None:
        scheme, chosen = "given (splits.csv)", _listed(source, given, names)
    elif any(ids):
        scheme, chosen = "patient-disjoint", splits.patient_disjoint(ids, labels)
    else:
        scheme, chosen = "random (image-level)", splits.random_stratified(labels)
    rows = zip(files, names, labels, chosen, ids, strict=True)
    return Plan(
        name=name,
        split="default",
        split_scheme=scheme,
        class_names=tuple(class_names),
        site_names=(name,),
        positive=positive_class(class_names),
        sources=[Source(f, n, int(y), str(s), p) for f, n, y, s, p in rows],
        left_out=[
            (file.relative_to(source).as_posix(), "not an image by its suffix")
            for c in class_names
            for file in sorted((source / c).iterdir())
            if not store.is_image(file)
        ],
    )


def positive_class(class_names: Sequence[str]) -> int:
    """Index of the class called covid or positive (and not "non..."), else the last."""
    for i, name in enumerate(class_names):
        if re.search("covid|positive", name.lower()) and "non" not in name.lower():
            return i
    return len(class_names) - 1


def _class_folders(source: Path) -> list[str]:
    layout = f"expected {source}/CLASS_NAME/*.png, one folder per class"
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; {layout}")
    loose = [file.name for file in sorted(source.iterdir()) if store.is_image(file)]
    if loose:
        raise ValueError(
            f"{source} holds images directly ({loose[0]}); {layout}: point --source to "
            "the parent folder or sort them into class folders"
        )
    folders = sorted(
        f.name
        for f in source.iterdir()
        if f.is_dir() and not f.name.startswith((".", "__MACOSX"))  # No classes.
    )
    deeper = [
        name
        for name in folders
        if any(inner.is_dir() for inner in (source / name).iterdir())
        and not any(store.is_image(file) for file in (source / name).iterdir())
    ]
    if deeper:
        raise ValueError(
            f"{source / deeper[0]} holds folders instead of images; {layout}: did you "
            f"mean --source={source / deeper[0]}?"
        )
    if len(folders) < 2:
        raise ValueError(
            f"{source} holds {len(folders)} class folders, at least 2 are needed; "
            + layout
        )
    return folders


def _column(table: Path, column: str, names: Sequence[str]) -> dict[str, str] | None:
    """Image name -> cell, or None if there is no such table."""
    if not table.exists():
        return None
    short: dict[str, list[str]] = {}
    for name in names:
        short.setdefault(Path(name).name, []).append(name)
    cells = {}
    for file, cell in store.read_table(table, "file", column).items():
        full = [file] if file in names else short.get(file, [])
        if len(full) > 1:
            raise ValueError(
                f"{table} names {file!r}, which is in several classes; write {full[0]}"
            )
        if not full:
            raise FileNotFoundError(
                f"{table} names {file!r}, but there is no such image; restore it "
                "or remove the line"
            )
        if full[0] in cells:
            raise ValueError(f"{table} lists {full[0]!r} twice; keep one line")
        cells[full[0]] = cell
    return cells


def _listed(source: Path, given: dict[str, str], names: Sequence[str]) -> list[str]:
    table = source / "splits.csv"
    for name in names:
        if name not in given:
            raise ValueError(
                f"{source / name} is not listed in {table}; list it or remove it"
            )
        if given[name] not in SPLITS:
            raise ValueError(
                f"{table}: {name!r} has the split {given[name]!r}, expected one of "
                f"{', '.join(SPLITS)}"
            )
    return [given[name] for name in names]
