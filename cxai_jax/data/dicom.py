"""What preparation takes from DICOM headers: that a file is one, and whose it is."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LETTERS = 16  # Of the hexadecimal hash: 64 bits.


def is_dicom(file: Path) -> bool:
    """Whether a regular file says that it is DICOM, whatever its name."""
    if not os.path.isfile(file):  # A FIFO would never end.
        return False
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def patients(files: Sequence[Path], keep_ids: bool = False) -> list[str]:
    """The patient of each file from its PatientID, "" where there is none.

    Dates and names are not read, so no split can follow them.

    Args:
      files: images of any kind; others than DICOM have no patient here.
      keep_ids: True writes PatientID as it is. Otherwise the first letters of its
        SHA-256: the same patient in every data set, but no name. Who knows the form of
        the numbers can try them all: it is a pseudonym, not anonymity.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(_patient_id, files))
    return found if keep_ids else [pseudonym(one) for one in found]


def pseudonym(patient: str) -> str:
    """ "" stays ""; anything else becomes the beginning of its SHA-256."""
    if not patient:
        return ""
    return f"id-{hashlib.sha256(patient.encode()).hexdigest()[:LETTERS]}"


def _patient_id(file: Path) -> str:
    if not is_dicom(file):
        return ""
    try:
        import pydicom  # The optional extra `dicom`.

        header = pydicom.dcmread(
            file, stop_before_pixels=True, specific_tags=["PatientID"]
        )
        return str(header.get("PatientID") or "").strip()
    except Exception:  # Reading the pixels names what is wrong with the file.
        return ""
