"""New images for prediction: paths and globs -> files -> gray slices.

A DICOM file may hold many frames, which become slices; each file that cannot be used
is an error with a reason, never an exception that stops the others.
"""

import glob
import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxai_jax.data import transforms
from cxai_jax.data.store import read_table

COLOURED = 40  # Grey levels between the channels of a pixel that has a colour.
AHEAD = 32  # Files opened before they are asked for.
VOLUMES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".npy", ".npz")
PHOTOGRAPH = 0.2  # Share of such pixels; drawn marks on a scan stay below 0.02.


class Found(NamedTuple):
    """What a list of paths leads to."""

    files: list[Path]
    errors: list[tuple[str, str]]  # (path, reason)
    ignored: list[str]  # Files in folders that are no images by name and content.
    patients: dict[Path, str]  # From the patients.csv of a folder.


class Slice(NamedTuple):
    """One image to predict."""

    name: str  # `printable` file, with "#3" appended for the third frame.
    gray: np.ndarray  # uint8 [H, W, 1]
    patient: str  # "" where unknown.


def find(paths: Sequence[str]) -> Found:
    """Expands files, folders (searched to any depth) and globs, in order, once each.

    A folder's patients.csv (columns file,patient; file relative to that folder) names
    patients.
    """
    files, errors, ignored, patients = {}, [], [], {}
    for given in paths:
        matches = [given] if Path(given).exists() else sorted(glob.glob(given))
        if not matches:
            reason = "no such file or folder; check the path"
            errors.append((printable(given), reason))
        for match in map(Path, matches):
            if not match.is_dir():
                files[match] = None
                continue
            inside = sorted(match.rglob("*"))
            # A link that leads nowhere shall become an error, not be passed over.
            inside = [p for p in inside if p.is_file() or not p.exists()]
            images = dict.fromkeys(p for p in inside if _looks_like_image(p))
            ignored += [printable(p) for p in inside if p not in images]
            files |= images
            if not images:
                errors.append((printable(given), "the folder holds no image files"))
            table = match / "patients.csv"
            if table.exists():
                try:
                    rows = read_table(table, "file", "patient")
                except ValueError as error:
                    errors.append((printable(table), str(error)))
                    continue
                patients |= {match / name: patient for name, patient in rows.items()}
    return Found(list(files), errors, ignored, patients)


def printable(path: str | Path) -> str:
    """The path as text that any file can hold: bytes that are not UTF-8 as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def open_slices(
    path: Path, *, window: tuple[float, float] | None = None, patient: str = ""
) -> list[Slice]:
    """The slices of one file.

    Args:
      path: an image or DICOM file.
      window: centre and width for DICOM instead of the file's own.
      patient: id to use instead of the DICOM file's.

    Raises:
      ValueError: if it cannot be read, or is a volume or a colour photograph.
    """
    name = printable(path)
    if name.lower().endswith(VOLUMES):
        raise ValueError(f"{name}: a volume; save its slices as PNG or DICOM files")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: cannot be opened ({error.strerror})") from None
    frames = transforms.decode_frames(data, name, window)
    if any(coloured_share(frame) > PHOTOGRAPH for frame in frames):
        raise ValueError(
            f"{name}: a colour picture, not a scan; convert it to gray if it is one"
        )
    patient = patient or _dicom_patient(data)
    single = len(frames) == 1
    return [
        Slice(name if single else f"{name}#{i}", transforms.to_gray(frame), patient)
        for i, frame in enumerate(frames, 1)
    ]


def read_ahead(
    paths: Sequence[Path], read: Callable[[Path], list]
) -> Iterator[tuple[Path, list | ValueError]]:
    """Reads files with threads, a few ahead of the reader, in order.

    Yields:
      (path, what `read` returned or the ValueError that it raised).
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        queue = deque()
        remaining = iter(paths)
        while True:
            for path in islice(remaining, AHEAD - len(queue)):
                queue.append((path, pool.submit(read, path)))
            if not queue:
                return
            path, future = queue.popleft()
            try:
                yield path, future.result()
            except ValueError as error:
                yield path, error


def coloured_share(frame: np.ndarray) -> float:
    """Share of pixels with a colour: uint8 [H, W] or [H, W, 3] -> 0..1."""
    if frame.ndim == 2:
        return 0.0
    spread = frame.max(2).astype(int) - frame.min(2)
    return float((spread > COLOURED).mean())


def _looks_like_image(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith(".") or name == "dicomdir":  # The index of a DICOM medium.
        return False
    if name.endswith(transforms.SUFFIXES + VOLUMES):  # Volumes become errors.
        return True
    try:  # Scanners name DICOM files by number, without a suffix.
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _dicom_patient(data: bytes) -> str:
    """Patient id, else the series' number, of a DICOM file; "" of any other."""
    if data[128:132] != b"DICM":
        return ""
    import pydicom  # The frames were read, so the extra is there.

    tags = ["PatientID", "SeriesInstanceUID"]
    header = pydicom.dcmread(
        io.BytesIO(data), stop_before_pixels=True, specific_tags=tags
    )
    return next((str(header[t].value) for t in tags if header.get(t)), "")
