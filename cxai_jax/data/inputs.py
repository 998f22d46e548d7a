"""New images for prediction: paths and globs -> files -> gray slices.

A DICOM file may hold many frames, which become slices; each file that cannot be used
is an error with a reason, never an exception that stops the others.
"""

import glob
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxai_jax.data import dicom, reading, transforms
from cxai_jax.data.reading import printable
from cxai_jax.data.tables import read_table

COLOURED = 40  # Grey levels between the channels of a pixel that has a colour.
VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".npy", ".npz")
PHOTOGRAPH = 0.2  # Share of such pixels; drawn marks on a scan stay below 0.02.


MODALITIES = ("CT", "CR", "DX", "DR", "RG")  # Of DICOM: computed tomography, X-ray.
CHEST = ("CHEST", "THORAX", "LUNG", "RIB", "HEART")


class Found(NamedTuple):
    """What a list of paths leads to."""

    files: list[Path]
    errors: list[tuple[str, str]]  # (path, reason)
    ignored: list[str]  # Files in folders that are no images by name and content.
    patients: dict[Path, str]  # From the patients.csv of a folder.
    unmatched: list[tuple[str, str]]  # (row of a patients.csv, reason)


class Slice(NamedTuple):
    """One image to predict."""

    name: str  # `printable` file, with "#3" appended for the third frame.
    gray: np.ndarray  # uint8 [H, W, 1]
    pixels: np.ndarray  # The same, or uint8 [H, W, 3] where colour was asked for.
    patient: str  # "" where unknown.
    notes: list[str]  # What a reader should know of how it was opened.


def find(paths: Sequence[str]) -> Found:
    """Expands files, folders (searched to any depth) and globs, in order, once each.

    A folder's patients.csv (columns file,patient; file relative to that folder, or the
    bare name if that is unique) names patients.
    """
    found = Found([], [], [], {}, [])  # Filled by `_search`.
    for given in paths:
        matches = [given] if os.path.exists(given) else sorted(glob.glob(given))
        if not matches:
            reason = "no such file or folder; check the path"
            found.errors.append((printable(given), reason))
        for match in map(Path, matches):
            if os.path.isdir(match):
                _search(match, found)
            else:
                found.files.append(match)
    once = [list(dict.fromkeys(part)) for part in found[:3]]
    named = set(map(printable, once[0]))
    once[2] = [name for name in once[2] if name not in named]
    return Found(*once, found.patients, list(dict.fromkeys(found.unmatched)))


def _search(folder: Path, found: Found) -> None:
    """Adds what lies in a folder to `found`."""
    inside, refused = _files_in(folder)
    images = [path for path in inside if _looks_like_image(path)]
    table = folder / "patients.csv"
    ignored = set(inside) - {*images, table}
    found.files.extend(images)
    found.errors.extend(refused)
    found.ignored.extend(printable(path) for path in inside if path in ignored)
    if not images:
        found.errors.append((printable(folder), "the folder holds no image files"))
    if table not in inside:
        return
    try:
        rows = read_table(table, "file", "patient")
    except (ValueError, FileNotFoundError) as error:
        found.errors.append((printable(table), str(error)))
        return
    exact, short = {}, {}
    for path in images:
        exact[printable(path.relative_to(folder).as_posix())] = path
        short.setdefault(printable(path.name), []).append(path)
    for name, patient in rows.items():
        full = exact.get(Path(name).as_posix())
        same = [full] if full else short.get(name, [])
        if len(same) == 1:
            found.patients[same[0]] = patient
            continue
        reason = "no such image"
        if same:
            other = printable(same[0].relative_to(folder))
            reason = f"{len(same)} images have this name; write {other}"
        found.unmatched.append((f"{printable(table)}: {name}", reason))


def _files_in(folder: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """The files below a folder, sorted, and the folders that were not looked into."""
    files, refused, waiting = [], [], [folder]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError as error:
            reason = f"cannot be listed ({error.strerror})"
            refused.append((printable(error.filename), reason))
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
            elif os.path.isdir(entry.path):
                reason = "a link to a folder, not followed; name the folder itself"
                refused.append((printable(entry.path), reason))
            else:  # A link that leads nowhere becomes an error when it is opened.
                files.append(Path(entry.path))
    return sorted(files), sorted(refused)


def open_slices(
    path: Path,
    *,
    window: tuple[float, float] | None = None,
    patient: str = "",
    channels: int = 1,
) -> list[Slice]:
    """The slices of one file.

    Args:
      path: an image or DICOM file.
      window: centre and width for DICOM instead of the file's own.
      patient: id to use instead of the DICOM file's.
      channels: of the data that were trained on: 1 gray, 3 colour.

    Raises:
      ValueError: if it cannot be read, or is a volume or, for gray data, a colour
        photograph.
    """
    name = printable(path)
    if name.lower().endswith(VOLUMES):
        raise ValueError(f"{name}: a volume; save its slices as PNG or DICOM files")
    with reading.opened(path, transforms.memory) as data:
        frames = transforms.decode_frames(data, name, window)
        coloured = any(coloured_share(frame) > PHOTOGRAPH for frame in frames)
        if coloured and channels == 1:
            raise ValueError(
                f"{name}: a colour picture, not a scan; convert it to gray if it is one"
            )
        own, odd = _dicom_header(data)
        patient = patient or own
        single = len(frames) == 1
        notes = ["first frame of several"] if transforms.is_animated(data) else []
        notes += odd
        slices = []
        for i, frame in enumerate(frames, 1):
            gray = transforms.to_gray(frame)
            pixels = transforms.to_colour(frame) if channels == 3 else gray
            shown = name if single else f"{name}#{i}"
            slices.append(Slice(shown, gray, pixels, patient, notes))
        return slices


def coloured_share(frame: np.ndarray) -> float:
    """Share of pixels with a colour: uint8 [H, W] or [H, W, 3] -> 0..1."""
    if frame.ndim == 2:
        return 0.0
    return float((frame.max(2) - frame.min(2) > COLOURED).mean())


def _looks_like_image(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith(".") or name == "dicomdir":  # The index of a DICOM medium.
        return False
    if name.endswith(transforms.SUFFIXES + VOLUMES):  # Volumes become errors.
        return True
    return dicom.is_dicom(path)  # Scanners name files by number, without a suffix.


def _dicom_header(data: bytes) -> tuple[str, list[str]]:
    """Patient id, else the series' number, of a DICOM file, and what is odd about it.

    "" and [] of any other file.
    """
    if data[128:132] != b"DICM":
        return "", []
    import pydicom  # The frames were read, so the extra is there.

    tags = ["PatientID", "SeriesInstanceUID", "Modality", "BodyPartExamined"]
    header = pydicom.dcmread(
        io.BytesIO(data), stop_before_pixels=True, specific_tags=tags
    )
    told = {tag: str(header[tag].value).strip() for tag in tags if header.get(tag)}
    notes = []
    modality, part = told.get("Modality", ""), told.get("BodyPartExamined", "")
    if modality and modality not in MODALITIES:
        notes.append(f"DICOM modality {modality}: no chest X-ray or CT")
    if part and not any(word in part.upper() for word in CHEST):
        notes.append(f"DICOM body part {part}: no chest")
    return told.get(tags[0]) or told.get(tags[1], ""), notes
