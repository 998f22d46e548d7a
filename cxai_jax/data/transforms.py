"""Host image operations: open any medical or web image as gray uint8, and resize it.

All resizing is Pillow's antialiased bilinear filter. Nothing here knows a data set. One
file, longer than others, holds every step from bytes to the stored pixels.
"""

import io
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cxai_jax.data import reading

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".dcm")
# Pillow hands some other formats, such as EPS, to external programs.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")
Image.MAX_IMAGE_PIXELS = reading.MAX_PIXELS
STORED_SIDE = 256  # Pixels; the published random crop of 224 needs the margin.
MAX_ASPECT = 2.0  # Longer images are squashed, so that canvases stay bounded.
PNG_LEVEL = 3  # Half the time of Pillow's 6 for 10 % more bytes.
# Peak while a large image is opened, as tests/faults/test_bad_input.py measures it.
BYTES_PER_PIXEL = 9
HEAVY = 18  # WebP and progressive JPEG: the decoder keeps the whole picture as well.
STRIP = 1 << 20  # Pixels that are computed with at a time.
LUNG_WINDOW = (-600.0, 1500.0)  # Hounsfield units: centre, width.


def open_gray(path: str | Path) -> np.ndarray:
    """Opens one image file of any kind as gray uint8 [H, W, 1].

    The content decides the format, never the suffix. Colour goes to luma (ITU-R 601),
    transparency is laid over black, camera rotation is undone. Integers of more than 8
    bits are divided by the full scale (8, 12 or 16 bits) that holds their maximum;
    floats and signed integers go from their minimum to their maximum. DICOM: modality
    LUT, then the file's own VOI LUT or window (without one: the lung window for CT,
    otherwise minimum to maximum); MONOCHROME1 is inverted.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is empty, truncated, no image, or holds several frames.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    with reading.opened(path, memory) as data:
        return decode_gray(data, reading.printable(path))


def memory(data: bytes) -> int:
    """Bytes that opening an image file takes at its peak, by what its header declares.

    Raises:
      ValueError: for more than 100 megapixels, or a side beyond 65,535 pixels.
    """
    try:
        if data[128:132] == b"DICM":
            return _dicom_memory(data)
        image = _open(data)
    except (ModuleNotFoundError, Image.UnidentifiedImageError):
        return len(data)  # `decode_frames` says what is missing or wrong.
    _check_pixels(*image.size)
    progressive = "progressive" in image.info or "progression" in image.info
    heavy = image.format == "WEBP" or progressive
    return len(data) + (HEAVY if heavy else BYTES_PER_PIXEL) * math.prod(image.size)


def is_animated(data: bytes) -> bool:
    """Whether a file is a GIF of several pictures, of which the first alone is read."""
    return data[:3] == b"GIF" and _open(data).is_animated


def decode_gray(data: bytes, name: str) -> np.ndarray:
    """`open_gray` for the bytes of a file; `name` is used in error messages."""
    return to_gray(_single_frame(data, name))


def decode_colour(data: bytes, name: str) -> np.ndarray:
    """As `decode_gray`, uint8 [H, W, 3]; a gray file has three equal channels."""
    frame = _single_frame(data, name)
    return frame if frame.ndim == 3 else np.repeat(frame[..., None], 3, axis=-1)


def decode_frames(
    data: bytes, name: str, window: tuple[float, float] | None = None
) -> list[np.ndarray]:
    """The frames of a file as gray uint8 [H, W] or, if it has colour, RGB [H, W, 3].

    Only a DICOM file may hold more than one; see `open_gray`.

    Args:
      data: the file's bytes.
      name: used in error messages.
      window: centre and width, in the units of the modality LUT (Hounsfield for CT),
        instead of the DICOM file's own.

    Raises:
      ValueError: if the data are empty, truncated or no image.
    """
    if not data:
        raise ValueError(f"{name}: the file is empty (0 bytes); restore or remove it")
    try:
        is_dicom = data[128:132] == b"DICM"
        return _decode_dicom(data, window) if is_dicom else [_decode_pillow(data)]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name}: DICOM needs {error.name}; install the extra: "
            "pip install -e '.[dicom]'"
        ) from None
    except Image.UnidentifiedImageError:
        raise ValueError(
            f"{name}: not an image in a known format; remove it or convert it to PNG"
        ) from None
    # Codecs raise OSError, SyntaxError, struct.error, zlib.error and more.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: cannot be read as an image ({reason})") from None


def _single_frame(data: bytes, name: str) -> np.ndarray:
    frames = decode_frames(data, name)
    if len(frames) > 1:
        raise ValueError(
            f"{name}: it holds {len(frames)} frames; save one file per slice"
        )
    return frames[0]


def to_gray(frame: np.ndarray) -> np.ndarray:
    """Luma (ITU-R 601) of uint8 [H, W, 3], or [H, W] as it is: uint8 [H, W, 1]."""
    return np.asarray(Image.fromarray(frame).convert("L"))[..., None]


def as_stored(image: np.ndarray, side: int | None = STORED_SIDE) -> np.ndarray:
    """An opened image as prepared data hold it, and as prediction therefore sees it.

    Every image goes from its file to a network through here (A18), so that it scores
    the same in a data set and alone.

    Args:
      image: uint8 [H, W] or [H, W, C].
      side: pixels, of the `DatasetSpec`; None stores images as they are.

    Returns:
      `short_side` at that side, whatever the network's input.
    """
    return short_side(image, side) if side else image


def short_side(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes so that the short side is `size` pixels and the aspect is kept.

    An aspect beyond 2:1 is squashed to 2:1. Small images are enlarged.

    Args:
      image: uint8 [H, W] or [H, W, C], C = 1 or 3.
      size: pixels.

    Returns:
      uint8 of the same rank, sides between `size` and 2 `size`.
    """
    height, width = image.shape[:2]
    scale = size / min(height, width)
    limit = int(MAX_ASPECT * size)
    sides = (min(max(round(side * scale), size), limit) for side in (height, width))
    return _resize(image, *sides)


def squash(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes uint8 [H, W] or [H, W, C] to `size` x `size`, aspect ignored."""
    return _resize(image, size, size)


def encode_png(image: np.ndarray) -> bytes:
    """The PNG file of a uint8 [H, W, 1] or [H, W, 3]."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """uint8 [H, W, 1] or [H, W, 3] of a file that `encode_png` wrote.

    Raises:
      ValueError: if it is neither an 8-bit gray nor an 8-bit colour image.
    """
    image = Image.open(io.BytesIO(data), formats=("PNG",))
    if image.mode not in ("L", "RGB"):
        raise ValueError(
            f"the stored image has mode {image.mode}, expected L (gray) or RGB"
        )
    pixels = np.asarray(image)
    return pixels[..., None] if image.mode == "L" else pixels


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    gray = image.ndim == 3 and image.shape[2] == 1
    source = Image.fromarray(image[..., 0] if gray else image)
    resized = np.asarray(source.resize((width, height), Image.Resampling.BILINEAR))
    return resized[..., None] if gray else resized


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _check_pixels(width: int, height: int, count: int = 1) -> None:
    total = width * height * count
    if total > reading.MAX_PIXELS or max(width, height) > reading.MAX_SIDE:
        raise ValueError(
            f"{width} x {height} pixels{f' x {count}' if count > 1 else ''}, at most "
            f"{reading.MAX_PIXELS // 10**6} megapixels and {reading.MAX_SIDE} a side "
            "are opened; scale it down"
        )


def _strips(height: int, width: int) -> list[slice]:
    """Rows of an image, some at a time: a float64 copy of a large one is too large."""
    rows = max(1, STRIP // max(width, 1))
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def _decode_pillow(data: bytes) -> np.ndarray:
    image = _open(data)
    _check_pixels(*image.size)
    # A JPEG with an embedded preview (MPO) counts as two frames; of a GIF the first
    # frame is taken (`is_animated`).
    if image.format not in ("MPO", "GIF") and getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"it holds {image.n_frames} frames; save one file per slice")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    width, height = image.size
    rows = _strips(height, width)

    def strip(part: slice) -> Image.Image:
        return image.crop((0, part.start, width, part.stop))

    if image.mode.startswith(("I", "F")):
        return _to_uint8(lambda part: np.asarray(strip(part)), rows, (height, width))
    transparent = "A" in image.getbands() or "transparency" in image.info
    gray = image.mode in ("1", "L") and not transparent
    pixels = np.empty((height, width) if gray else (height, width, 3), np.uint8)
    for part in rows:
        piece = strip(part)
        if transparent:
            piece = piece.convert("RGBA")
            black = Image.new("RGBA", piece.size, (0, 0, 0, 255))
            piece = Image.alpha_composite(black, piece)
        pixels[part] = piece.convert("L" if gray else "RGB")
    return pixels


def _to_uint8(
    values: Callable[[slice], np.ndarray], rows: list[slice], shape: tuple[int, int]
) -> np.ndarray:
    """Numbers of any kind to the full scale of 8 bits, see `open_gray`."""
    low, high = _extent(values, rows)
    if values(rows[0]).dtype.kind in "iu" and low >= 0:
        full = next((b for b in (8, 12, 16) if high < 2**b), 32)
        low, high = 0, 2**full - 1
    return _stretched(values, rows, shape, low, high)


def _extent(values, rows: list[slice]) -> tuple[float, float]:
    """Smallest and largest of the values, which must be finite."""
    low, high, bad = np.inf, -np.inf, 0
    for part in rows:
        piece = values(part)
        bad += piece.size - np.count_nonzero(np.isfinite(piece))
        low, high = min(low, piece.min()), max(high, piece.max())
    if bad:
        raise ValueError(f"{bad} pixels are not finite (NaN or infinite)")
    if not np.isfinite(float(high) - float(low)):
        raise ValueError(f"its pixels reach from {low:g} to {high:g}: too far apart")
    return low, high


def _stretched(values, rows, shape, low: float, high: float) -> np.ndarray:
    """[low, high] -> [0, 255], clipped, strip by strip; a constant image is black."""
    pixels = np.empty(shape, np.uint8)
    for part in rows:
        scaled = (values(part).astype(np.float64) - low) / max(high - low, 1e-12)
        pixels[part] = np.round(255 * np.clip(scaled, 0, 1))
    return pixels


def _dicom_memory(data: bytes) -> int:
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
    _check_pixels(width, height, samples * frames)
    depth = max(1, int(header.get("BitsAllocated") or 16) // 8)
    # The pixels of the file, all frames decoded, one of them in float32, all in uint8.
    several = width * height * samples * frames * (depth + 1)
    palette = header.get("PhotometricInterpretation") == "PALETTE COLOR"
    colour = 8 if samples > 1 or palette else 2
    return 2 * size + several + width * height * samples * colour * depth


def _inflated_size(data: bytes) -> int:
    inflate, size, rest = zlib.decompressobj(-zlib.MAX_WBITS), 0, data
    while rest and not inflate.eof:
        size += len(inflate.decompress(rest, STRIP))
        rest = inflate.unconsumed_tail
        if size > reading.MAX_BYTES:
            raise ValueError(
                f"it inflates to more than {reading.MAX_BYTES / 1e9:g} GB; refused"
            )
    return size


def _decode_dicom(data: bytes, window: tuple[float, float] | None) -> list[np.ndarray]:
    import pydicom  # The optional extra `dicom`.
    from pydicom.pixels import apply_color_lut, apply_modality_lut, iter_pixels

    header = pydicom.dcmread(io.BytesIO(data))
    if not any(f"{kind}PixelData" in header for kind in ("", "Float", "DoubleFloat")):
        raise ValueError("a DICOM file without pixels, such as a report or a plan")
    _check_codestreams(header)
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
    rows = _strips(*shape)

    def values_of(i):
        lut = _of_frame(header, i, "PixelValueTransformation")
        return lambda part: np.asarray(
            apply_modality_lut(frames[i][part], lut), np.float64
        )

    extents = [_extent(values_of(i), rows) for i in range(len(frames))]
    low, high = min(e[0] for e in extents), max(e[1] for e in extents)
    grays = []
    for i in range(len(frames)):
        voi = _of_frame(header, i, "FrameVOILUT")
        if not window and _is_curved(voi):
            shown, *ends = _through_voi_lut(header, voi, values_of(i)(slice(None)))
            grays.append(_stretched(shown.__getitem__, rows, shape, *ends))
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
        grays.append(_stretched(values_of(i), rows, shape, *ends))
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
