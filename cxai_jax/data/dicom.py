"""DICOM files: that one is, whose it is, and its pixels in 8 bits."""

import io
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cxai_jax.data import levels, reading, splits
from cxai_jax.data.privacy import pseudonym

LUNG_WINDOW = (-600.0, 1500.0)  # Hounsfield units: centre, width.


def is_dicom(file: Path) -> bool:
    """Whether a regular file says that it is DICOM, whatever its name."""
    if not os.path.isfile(file):  # A FIFO would never end.
        return False
    try:
        with file.open("rb", buffering=0) as stream:  # No more than these bytes.
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


class Header(NamedTuple):
    """Whose a file is and how many slices it holds."""

    patient: str  # PatientID, else the series where that has several slices, else "".
    frames: int  # 1 for any other file than DICOM.


def headers(files: Sequence[Path], keep_ids: bool = False) -> list[Header]:
    """What DICOM says of each file; no date or name is read, so no split follows them.

    Args:
      files: images of any kind; others than DICOM have no patient here.
      keep_ids: True writes PatientID as it is. Otherwise a pseudonym without a
        salt: the same patient in every data set, but no name. Who knows the form of
        the numbers can try them all: it is a pseudonym, not anonymity.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(_read_header, files))
    slices = Counter()
    for _, series, frames in found:
        slices[series] += frames
    told = []
    for patient, series, frames in found:
        if not patient and series and slices[series] > 1:
            patient, prefix = series, splits.SERIES
        else:
            prefix = ""
        name = patient if keep_ids else pseudonym(patient, "")
        told.append(Header(prefix + name, frames))
    return told


def _read_header(file: Path) -> tuple[str, str, int]:
    """PatientID, the series (of a file without one the file itself), and frames."""
    if not is_dicom(file):
        return "", "", 1
    tags = ["PatientID", "SeriesInstanceUID", "NumberOfFrames"]
    try:
        import pydicom  # The optional extra `dicom`.

        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        patient, series = (str(header.get(t) or "").strip() for t in tags[:2])
        return patient, series or str(file), max(1, int(header.get(tags[2]) or 1))
    except Exception:  # Reading the pixels names what is wrong with the file.
        return "", "", 1


def oddities(data: bytes) -> list[str]:
    """What was done to the values of a DICOM file beyond a window, in words."""
    import pydicom

    tags = ["PhotometricInterpretation", "Modality", "WindowWidth", "VOILUTSequence"]
    tags += ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]
    header = pydicom.dcmread(
        io.BytesIO(data), stop_before_pixels=True, specific_tags=tags
    )
    kind = str(header.get("PhotometricInterpretation") or "").strip()
    told = []
    if kind == "MONOCHROME1":
        told.append("MONOCHROME1, inverted so that air is dark")
    elif kind != "MONOCHROME2":
        told.append(f"{kind or 'no photometric interpretation'}, not MONOCHROME")
    elif header.get("Modality") != "CT" and not any(t in header for t in tags[2:]):
        told.append("no window, shown from its lowest to its highest value")
    return told


def memory(data: bytes) -> int:
    """Bytes to open a DICOM file, after its deflated part was measured."""
    import pydicom
    from pydicom.filereader import read_dataset

    file = io.BytesIO(data)
    file.seek(132)
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    size = len(data)
    if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
        size += 2 * _inflated_size(data[file.tell() :])
    header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
    width, height = (int(header.get(k) or 0) for k in ("Columns", "Rows"))
    samples, frames = (
        int(header.get(k) or 1) for k in ("SamplesPerPixel", "NumberOfFrames")
    )
    levels.check_pixels(width, height, samples * frames)
    depth = max(1, int(header.get("BitsAllocated") or 16) // 8)
    # The pixels of the file, all frames decoded, one of them in float32, all in uint8.
    several = width * height * samples * frames * (depth + 1)
    palette = header.get("PhotometricInterpretation") == "PALETTE COLOR"
    colour = 8 if samples > 1 or palette else 2
    return 2 * size + several + width * height * samples * colour * depth


def _inflated_size(data: bytes) -> int:
    inflate, size, rest = zlib.decompressobj(-zlib.MAX_WBITS), 0, data
    while rest and not inflate.eof:
        size += len(inflate.decompress(rest, levels.STRIP))
        rest = inflate.unconsumed_tail
        if size > reading.MAX_BYTES:
            raise ValueError(
                f"it inflates to more than {reading.MAX_BYTES / 1e9:g} GB; refused"
            )
    return size


def decode(data: bytes, window: tuple[float, float] | None) -> list[np.ndarray]:
    """The frames of a file: uint8 [H, W], or [H, W, 3] where it has colour.

    Args:
      data: the file's bytes.
      window: centre and width instead of the file's own.

    Raises:
      ValueError: for a file without pixels, or frames that do not fit its header.
      ModuleNotFoundError: without pydicom.
    """
    import pydicom  # The optional extra `dicom`.
    from pydicom.pixels import apply_color_lut, apply_modality_lut, iter_pixels

    header = pydicom.dcmread(io.BytesIO(data))
    if not any(f"{kind}PixelData" in header for kind in ("", "Float", "DoubleFloat")):
        raise ValueError("a DICOM file without pixels, such as a report or a plan")
    _check_codestreams(header)
    if "PixelData" not in header:  # Floats have neither; VOI functions ask for both.
        header.BitsStored = header.BitsAllocated
        header.PixelRepresentation = 1
    try:
        frames = list(iter_pixels(header, allow_excess_frames=False))
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        raise ValueError(
            f"no decoder is installed for {header.file_meta.TransferSyntaxUID.name}; "
            "pip install pylibjpeg pylibjpeg-libjpeg, or decompress the file"
        ) from None
    bits = int(header.BitsStored)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        frames = [apply_color_lut(frame, header) for frame in frames]
        bits = 8 * frames[0].itemsize
    if frames[0].ndim == 3:
        return [(frame >> max(0, bits - 8)).astype(np.uint8) for frame in frames]
    shape = frames[0].shape
    rows = levels.strips(*shape)

    def values_of(i):
        lut = _of_frame(header, i, "PixelValueTransformation")
        return lambda part: np.asarray(
            apply_modality_lut(frames[i][part], lut), np.float64
        )

    extents = [levels.extent(values_of(i), rows) for i in range(len(frames))]
    low, high = min(e[0] for e in extents), max(e[1] for e in extents)
    grays = []
    for i in range(len(frames)):
        voi = _of_frame(header, i, "FrameVOILUT")
        if not window and _is_curved(voi):
            shown, *ends = _through_voi_lut(header, voi, values_of(i)(slice(None)))
            grays.append(levels.stretched(shown.__getitem__, rows, shape, *ends))
            continue
        if window:
            centre, width = window
        elif voi.get("WindowCenter") is not None and voi.get("WindowWidth"):
            centre, width = (
                float(np.ravel(voi[key].value)[0])
                for key in ("WindowCenter", "WindowWidth")
            )
        elif header.get("Modality") == "CT":
            centre, width = LUNG_WINDOW
        else:
            centre, width = (low + high) / 2, high - low
        if not (np.isfinite(centre) and 0 <= width < np.inf):
            raise ValueError(f"its window, centre {centre:g}, width {width:g}, is none")
        ends = centre - width / 2, centre + width / 2
        grays.append(levels.stretched(values_of(i), rows, shape, *ends))
    inverted = header.PhotometricInterpretation == "MONOCHROME1"
    return [255 - gray for gray in grays] if inverted else grays


def _is_curved(voi) -> bool:
    """Whether a header asks for more than a straight window: a table or a function."""
    function = str(voi.get("VOILUTFunction") or "LINEAR")
    return bool(voi.get("VOILUTSequence")) or (
        function != "LINEAR" and bool(voi.get("WindowWidth"))
    )


def _through_voi_lut(header, voi, values: np.ndarray):
    """`values` [H, W] through the VOI LUT or function, and the ends of its range."""
    from pydicom.pixels import apply_voi_lut

    if voi is not header:  # Of one frame: pydicom looks for the rest beside it.
        for key in ("BitsStored", "PixelRepresentation", "PhotometricInterpretation"):
            setattr(voi, key, header[key].value)
    if table := voi.get("VOILUTSequence"):
        whole = np.round(values).astype(np.int32)
        return apply_voi_lut(whole, voi), 0, 2 ** int(table[0].LUTDescriptor[2]) - 1
    with np.errstate(over="ignore"):  # A sigmoid far outside its window.
        low, high = apply_voi_lut(np.array([-1e9, 1e9]), voi)
        return apply_voi_lut(values, voi), float(low), float(high)


def _check_codestreams(header) -> None:
    """Compressed frames must be of the size that the header declares and was checked.

    Only Pillow's codecs unfold a frame to the size that the frame itself claims.
    """
    from pydicom import uid
    from pydicom.encaps import generate_frames

    by_pillow = {uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit}
    by_pillow |= {uid.JPEG2000Lossless, uid.JPEG2000}
    if header.file_meta.TransferSyntaxUID not in by_pillow or "PixelData" not in header:
        return
    count = int(header.get("NumberOfFrames") or 1)
    declared = int(header.Columns), int(header.Rows)
    for frame in generate_frames(header.PixelData, number_of_frames=count):
        try:
            own = Image.open(io.BytesIO(frame), formats=("JPEG", "JPEG2000")).size
        except Image.UnidentifiedImageError:
            continue
        if own != declared:
            raise ValueError(
                f"a frame of {own[0]} x {own[1]} pixels where its header says "
                f"{declared[0]} x {declared[1]}"
            )


def _of_frame(header, index: int, macro: str):
    """Where the header keeps a frame's values: enhanced DICOM in functional groups."""
    for groups, place in (("PerFrame", index), ("Shared", 0)):
        rows = header.get(f"{groups}FunctionalGroupsSequence") or []
        found = rows[place].get(f"{macro}Sequence") if place < len(rows) else None
        if found:
            return found[0]
    return header
