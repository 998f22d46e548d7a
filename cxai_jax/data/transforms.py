"""Host image operations: open any medical or web image as gray uint8, and resize it.

All resizing is Pillow's antialiased bilinear filter. Nothing here knows a data set.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm")
STORED_SIDE = 256  # Pixels; the published random crop of 224 needs the margin.
MAX_ASPECT = 2.0  # Longer images are squashed, so that canvases stay bounded.
PNG_LEVEL = 3  # Half the time of Pillow's 6 for 10 % more bytes.
LUNG_WINDOW = (-600.0, 1500.0)  # Hounsfield units: centre, width.


def open_gray(path: str | Path) -> np.ndarray:
    """Opens one image file of any kind as gray uint8 [H, W, 1].

    The content decides the format, never the suffix. Colour goes to luma (ITU-R 601),
    transparency is laid over black, camera rotation is undone. Integers of more than 8
    bits are divided by the full scale (8, 12 or 16 bits) that holds their maximum;
    floats and signed integers go from their minimum to their maximum. DICOM: modality
    LUT, then the file's own window (without one: the lung window for CT, otherwise
    minimum to maximum); MONOCHROME1 is inverted.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is empty, truncated, no image, or holds several frames.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return decode_gray(path.read_bytes(), str(path))


def decode_gray(data: bytes, name: str) -> np.ndarray:
    """`open_gray` for the bytes of a file; `name` is used in error messages."""
    return to_gray(_single_frame(data, name))


def decode_colour(data: bytes, name: str) -> np.ndarray:
    """As `decode_gray`, uint8 [H, W, 3]; a gray file has three equal channels."""
    return np.asarray(Image.fromarray(_single_frame(data, name)).convert("RGB"))


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
    image = Image.open(io.BytesIO(data))
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


def _decode_pillow(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    # A JPEG with an embedded preview (MPO) counts as two frames.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ValueError(f"it holds {image.n_frames} frames; save one file per slice")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return _to_uint8(np.asarray(image))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image)
    return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind in "iu" and values.min() >= 0:
        full = next((b for b in (8, 12, 16) if values.max() < 2**b), 32)
        return _stretch(values, 0, 2**full - 1)
    return _stretch(values, np.nanmin(values), np.nanmax(values))


def _stretch(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """[low, high] -> [0, 255], clipped; a constant image is black, NaN too."""
    scaled = (values.astype(np.float64) - low) / max(high - low, 1e-12)
    return np.round(255 * np.clip(np.nan_to_num(scaled), 0, 1)).astype(np.uint8)


def _decode_dicom(data: bytes, window: tuple[float, float] | None) -> list[np.ndarray]:
    import pydicom  # The optional extra `dicom`.
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    header = pydicom.dcmread(io.BytesIO(data))
    if not any(f"{kind}PixelData" in header for kind in ("", "Float", "DoubleFloat")):
        raise ValueError("a DICOM file without pixels, such as a report or a plan")
    try:
        pixels, bits = pixel_array(header), int(header.BitsStored)
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        raise ValueError(
            f"no decoder is installed for {header.file_meta.TransferSyntaxUID.name}; "
            "pip install pylibjpeg pylibjpeg-libjpeg, or decompress the file"
        ) from None
    if header.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
        bits = 8 * pixels.itemsize
    several = int(header.get("NumberOfFrames") or 1) > 1
    frames = list(pixels) if several else [pixels]
    if frames[0].ndim == 3:
        return [(frame >> max(0, bits - 8)).astype(np.uint8) for frame in frames]
    values = [
        np.asarray(
            apply_modality_lut(frame, _of_frame(header, i, "PixelValueTransformation")),
            np.float64,
        )
        for i, frame in enumerate(frames)
    ]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    grays = []
    for i, frame in enumerate(values):
        voi = _of_frame(header, i, "FrameVOILUT")
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
        grays.append(_stretch(frame, centre - width / 2, centre + width / 2))
    inverted = header.PhotometricInterpretation == "MONOCHROME1"
    return [255 - gray for gray in grays] if inverted else grays


def _of_frame(header, index: int, macro: str):
    """Where the header keeps a frame's values: enhanced DICOM in functional groups."""
    for groups, place in (("PerFrame", index), ("Shared", 0)):
        rows = header.get(f"{groups}FunctionalGroupsSequence") or []
        found = rows[place].get(f"{macro}Sequence") if place < len(rows) else None
        if found:
            return found[0]
    return header
