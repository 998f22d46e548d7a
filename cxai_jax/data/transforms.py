"""Host image operations: open any medical or web image as gray uint8, and resize it.

All resizing is Pillow's antialiased bilinear filter. Nothing here knows a data set.
DICOM is in dicom.py.
"""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cxai_jax.data import dicom, levels, reading

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
            return dicom.memory(data)
        image = _open(data)
    except (ModuleNotFoundError, Image.UnidentifiedImageError):
        return len(data)  # `decode_frames` says what is missing or wrong.
    levels.check_pixels(*image.size)
    progressive = "progressive" in image.info or "progression" in image.info
    heavy = image.format == "WEBP" or progressive
    return len(data) + (HEAVY if heavy else BYTES_PER_PIXEL) * math.prod(image.size)


def is_animated(data: bytes) -> bool:
    """Whether a file is a GIF of several pictures, of which the first alone is read."""
    return data[:3] == b"GIF" and _open(data).is_animated


def decode_gray(data: bytes, name: str) -> np.ndarray:
    """`open_gray` for the bytes of a file; `name` is used in error messages."""
    return to_gray(single_frame(data, name))


def decode_colour(data: bytes, name: str) -> np.ndarray:
    """As `decode_gray`, uint8 [H, W, 3]; a gray file has three equal channels."""
    return to_colour(single_frame(data, name))


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
        return dicom.decode(data, window) if is_dicom else [_decode_pillow(data)]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name}: DICOM needs {error.name}: pip install pydicom"
        ) from None
    except Image.UnidentifiedImageError:
        raise ValueError(
            f"{name}: not an image in a known format; remove it or convert it to PNG"
        ) from None
    # Codecs raise OSError, SyntaxError, struct.error, zlib.error and more.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: cannot be read as an image ({reason})") from None


def oddities(data: bytes) -> list[str]:
    """What a reader should know of how a DICOM file was opened; [] of any other."""
    return dicom.oddities(data) if data[128:132] == b"DICM" else []


def single_frame(data: bytes, name: str) -> np.ndarray:
    """The only frame of a file; a ValueError where it holds several."""
    frames = decode_frames(data, name)
    if len(frames) > 1:
        raise ValueError(
            f"{name}: it holds {len(frames)} frames; save one file per slice"
        )
    return frames[0]


def to_gray(frame: np.ndarray) -> np.ndarray:
    """Luma (ITU-R 601) of uint8 [H, W, 3], or [H, W] as it is: uint8 [H, W, 1]."""
    if frame.ndim == 3:
        frame = np.asarray(Image.fromarray(frame).convert("L"))
    return frame[..., None]


def to_colour(frame: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] as it is, [H, W] as three equal channels: uint8 [H, W, 3]."""
    return frame if frame.ndim == 3 else np.repeat(frame[..., None], 3, axis=-1)


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


def _decode_pillow(data: bytes) -> np.ndarray:
    image = _open(data)
    levels.check_pixels(*image.size)
    # A JPEG with an embedded preview (MPO) counts as two frames; of a GIF the first
    # frame is taken (`is_animated`).
    if image.format not in ("MPO", "GIF") and getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"it holds {image.n_frames} frames; save one file per slice")
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    width, height = image.size
    rows = levels.strips(height, width)

    def strip(part: slice) -> Image.Image:
        return image.crop((0, part.start, width, part.stop))

    if image.mode.startswith(("I", "F")):
        return levels.to_uint8(
            lambda part: np.asarray(strip(part)), rows, (height, width)
        )
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
