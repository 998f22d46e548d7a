"""Any `class_name/*.png|jpg|jpeg|tif|tiff|bmp|dcm` tree as a data set.

A folder of DICOM slices in a class folder is a series, the frames of a DICOM file are
slices, `a.dcm#3`; all of them are of one patient.

Beside the class folders may lie `splits.csv` (columns file,split) and `patients.csv`
(columns file,patient); file is `class_name/name.png`, or `name.png` if that is unique.
Without patients.csv, DICOM files say whose they are (PatientID, stored as a pseudonym;
without it the series, where it has several slices).
Without splits.csv the split is drawn here: patient-disjoint where patients are given,
else image-level, and labelled so.

Where `labels.csv` lies in the folder it says everything instead, see labels.py. Two
other layouts of public collections (Normal, Pneumonia, COVID) are read as they
are: `train|val|test/class_name/*`, which gives the split, and `class_name/images/*`
with lung masks of the same names in `class_name/masks/`; images in other folders of
such a class are listed as left out.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from ml_collections import ConfigDict

from cxai_jax.data import dicom, splits, store, tables
from cxai_jax.data import labels as labelled
from cxai_jax.data.plan import (
    Plan,
    Source,
    by_frame,
    class_files,
    is_image,
    is_series,
)
from cxai_jax.data.positive import positive_class
from cxai_jax.data.reading import printable
from cxai_jax.data.records import SPLITS, Dataset, DatasetSpec

# Names of split folders, in lower case.
SPLIT_FOLDERS = {name: name for name in SPLITS} | {"valid": "val", "validation": "val"}


def load(data_config: ConfigDict) -> Dataset:
    """A prepared folder: name "folder" reads data_dir/folder, "folder:x" data_dir/x."""
    name = data_config.name.partition(":")[2] or "folder"
    split = data_config.split or "default"
    return store.load(name, split, data_config.data_dir, f"folder --name={name}")


def plan_folder(
    source: str | Path,
    name: str = "folder",
    positive: str = "",
    split: str = "",
    keep_ids: bool = False,
) -> Plan:
    """Reads a tree of class folders, or one with labels.csv; classes sorted by name.

    Args:
      source: folder that holds one folder per class.
      name: directory name of the prepared data.
      positive: name of the positive class, see `positive_class`.
      split: "test" for data that nothing is trained on, such as another hospital's:
        every image is tested; "" splits as above.
      keep_ids: where DICOM files name the patients, write PatientID as it is instead
        of a pseudonym.

    Raises:
      FileNotFoundError: if `source` is missing, or a table names an absent image.
      ValueError: for a wrong folder level, fewer than two classes, no clear positive
        class, a malformed table, or an image that splits.csv does not list.
    """
    if split not in ("", "test"):
        raise ValueError(
            f"--split={split!r} of a folder: give test, to keep every image for testing"
        )
    source = Path(source)
    if (source / labelled.TABLE).exists():
        return labelled.plan_labels(source, name, positive, split, keep_ids)
    roots = _split_folders(source) or {"": source}
    class_names = sorted({c for root in roots.values() for c in _class_folders(root)})
    found = [
        (file, label, split)
        for split, root in roots.items()
        for label, c in enumerate(class_names)
        for file in class_files(*_images_of(root / c), series=True)
    ]
    files, labels, folder_splits = zip(*found, strict=True)
    labels = np.array(labels)
    names = [printable(file.relative_to(source)) for file in files]
    headers = dicom.headers(files, keep_ids)
    patients = _column(source / "patients.csv", "patient", names)
    if patients is None:
        patients = {n: h.patient for n, h in zip(names, headers, strict=True)}
    given = _column(source / "splits.csv", "split", names)
    ids = [patients.get(n, "") for n in names]
    if split == "test":
        scheme, chosen = "all for testing", ["test"] * len(names)
    elif given is not None:
        scheme, chosen = "given (splits.csv)", _listed(source, given, names)
    elif "" not in roots:
        scheme, chosen = "given (folders)", folder_splits
    else:
        scheme, chosen = splits.drawn(ids, labels)
    rows = zip(files, names, labels, chosen, ids, strict=True)
    return Plan(
        name=name,
        split="default",
        split_scheme=scheme,
        class_names=tuple(class_names),
        site_names=(name,),
        positive=positive_class(class_names, positive),
        sources=by_frame(
            [
                Source(f, n, int(y), str(s), p, lung_mask=_mask_of(f))
                for f, n, y, s, p in rows
            ],
            [header.frames for header in headers],
        ),
        left_out=[
            (printable(file.relative_to(source)), "not an image by its suffix")
            for folder in dict.fromkeys(file.parent for file in files)
            for file in sorted(folder.iterdir())
            if not is_image(file)
        ]
        + [
            (printable(file.relative_to(source)), "beside the folder images")
            for root in roots.values()
            for c in class_names
            for file in _beside_images(root / c)
        ],
    )


def _split_folders(source: Path) -> dict[str, Path]:
    """Split -> folder of a `train|val|test/class_name` tree; {} for any other."""
    if not source.is_dir():
        return {}
    folders = _folders(source)
    splits_ = {SPLIT_FOLDERS.get(f.name.lower(), ""): f for f in folders}
    holds_folders = all(any(g.is_dir() for g in f.iterdir()) for f in folders)
    if "train" not in splits_ or "" in splits_ or not holds_folders:
        return {}
    if len(splits_) < len(folders):
        names = ", ".join(f.name for f in folders)
        raise ValueError(f"{source} holds the folders {names}: two are one split")
    if loose := _loose(source):
        raise ValueError(
            f"{source} holds images ({loose[0]}) beside its split folders; expected "
            f"{source}/train/CLASS_NAME/*.png: sort them in or move them out"
        )
    return splits_


def _folders(source: Path) -> list[Path]:
    """The folders inside, sorted, without those that archives and systems add."""
    return [
        f
        for f in sorted(source.iterdir())
        if f.is_dir() and not f.name.startswith((".", "__MACOSX"))
    ]


def _loose(folder: Path) -> list[str]:
    """The names of the images directly inside."""
    return [printable(f.name) for f in sorted(folder.iterdir()) if is_image(f)]


def _images_of(folder: Path) -> tuple[Path, str]:
    """Where a class keeps its images: the folder itself, or `images` in it."""
    if not (folder / "images").is_dir():
        return folder.parent, folder.name
    if loose := _loose(folder):
        raise ValueError(
            f"{folder} holds images ({loose[0]}) beside its folder images; expected "
            f"{folder}/images/*.png: move them in or out"
        )
    return folder, "images"


def _beside_images(folder: Path) -> list[Path]:
    """Images that lie neither in `images` nor in `masks` of a class with `images`."""
    if not (folder / "images").is_dir():
        return []
    others = [f for f in _folders(folder) if f.name not in ("images", "masks")]
    return [f for other in others for f in sorted(other.rglob("*")) if is_image(f)]


def _mask_of(file: Path) -> Path | None:
    mask = file.parents[1] / "masks" / file.name
    return mask if file.parent.name == "images" and mask.is_file() else None


def _class_folders(source: Path) -> list[str]:
    layout = f"expected {source}/CLASS_NAME/*.png, one folder per class"
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; {layout}")
    if loose := _loose(source):
        raise ValueError(
            f"{source} holds images directly ({loose[0]}); {layout}: point --source to "
            "the parent folder or sort them into class folders"
        )
    folders = [f.name for f in _folders(source)]
    for name in folders:
        if printable(name) != name:
            raise ValueError(
                f"{source}: the class folder {printable(name)} has a name that is not "
                "UTF-8; rename it"
            )
    deeper = [
        name
        for name in folders
        if any(f.is_dir() and not is_series(f) for f in (source / name).iterdir())
        and not any(is_image(file) for file in (source / name).iterdir())
        and not (source / name / "images").is_dir()
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
    for file, cell in tables.read_table(table, "file", column).items():
        path = PurePosixPath(file).as_posix()  # ./a.png is a.png.
        full = [path] if path in names else short.get(path, [])
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


SPEC = DatasetSpec(load, plan_folder)
