"""Pictures as pixel arrays: maps over their images, on one scale, and image files.

A map is drawn as positive evidence on a scale that all maps of a page share, so that
one without evidence looks empty. Where the image is bright a haze would hide what it
lies on: there only its contours are drawn. The colours are those of viridis, whose
lightness rises steadily for every kind of colour vision.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
from PIL import Image, ImageDraw

# Nine equidistant colours of viridis (van der Walt & Smith 2015).
VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 45, 123),
        (59, 82, 139),
        (44, 114, 142),
        (33, 145, 140),
        (40, 174, 128),
        (94, 201, 98),
        (173, 220, 48),
        (253, 231, 37),
    ],
    float,
)
LEVELS = (0.25, 0.5, 0.75)  # Of the scale: where contours run.
HAZE = 0.6  # Opacity of the highest value on a dark image.
FAINT = 5  # Of 255: a haze below is not drawn.
GAP = 4  # Pixels between an image and its overlay.
STRIP = 16  # Rows of the colour bar below them.
AIR = 20  # Grey levels at most of what surrounds a body.
SIDE = 64  # Pixels on which the body is told from its surroundings.
SHARE = 0.995  # Of all values lie within the common scale: no outlier sets it.


def common_scale(maps: Sequence[np.ndarray]) -> float:
    """The value drawn as the highest colour in all of these maps; 0 without evidence.

    The 99.5 % quantile of their positive values, so that no single cell sets it.
    """
    values = np.concatenate([np.ravel(one) for one in maps]).astype(np.float64)
    values = values[values > 0]
    return float(np.quantile(values, SHARE)) if len(values) else 0.0


def evidence(class_maps: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What every place of an image says for its label against the mean of all classes.

    m_c - mean_k m_k: its mean over the cells is the label's logit above the mean logit,
    without the bias.

    Args:
      class_maps: [N, h, w, K].
      labels: int [N].

    Returns:
      Signed maps [N, h, w], logits.
    """
    chosen = np.take_along_axis(class_maps, labels.reshape(-1, 1, 1, 1), axis=3)
    return chosen[..., 0] - class_maps.mean(3)


def scale_of(predictions: dict) -> float:
    """The common scale of scored images' maps, each of the predicted class."""
    labels = predictions["probs"][:, 0].argmax(1)
    return common_scale(evidence(predictions["class_maps"], labels))


def colours(values: np.ndarray) -> np.ndarray:
    """0..1 [...] -> the colour of the map, float [..., 3] in 0..255."""
    places = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(values, places, VIRIDIS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1)


def overlay(gray: np.ndarray, class_map: np.ndarray, scale: float) -> np.ndarray:
    """The positive evidence of a map over its image.

    Args:
      gray: uint8 [H, W] or [H, W, 1].
      class_map: [h, w], interpolated as the method does.
      scale: value of the highest colour, > 0; what is above it looks the same. 0 or a
        map without positive values leave the image as it is.

    Returns:
      uint8 [H, W, 3].
    """
    gray = gray.reshape(gray.shape[:2])
    heat = enlarged(class_map * (256 / max(scale, 1e-12)), gray.shape)
    heat = np.clip(heat, 0, 255).astype(np.uint8)
    passed = sum((heat >= int(256 * level)).view(np.uint8) for level in LEVELS)
    width = max(1, round(min(gray.shape) / 200))
    lowest = _spread(np.minimum, passed, width)
    highest = _spread(np.maximum, passed, width)
    # A line inside each level, a dark rim outside: it is seen on bone as well.
    inks, haze = _inks(), gray * np.uint32(256) + heat
    ink = np.where(passed > lowest, np.uint32(1 << 16) + passed, haze)
    rims = np.uint32(inks.shape[1]) * (highest - passed)
    return inks.reshape(-1, 3).take(ink + rims, axis=0)


@functools.cache
def _inks() -> np.ndarray:
    """All colours of an overlay, so that drawing is looking up: uint8 [rims, inks, 3].

    Ink 256 gray + heat, both 0..255, is a haze; those from 65,536 on are the lines of
    no level, the first level, and so on. A rim of r levels halves an ink r times.
    """
    gray, heat = np.divmod(np.arange(256 * 256), 256)
    alpha = HAZE * np.sqrt(heat / 255) * (heat > FAINT) * (1 - np.square(gray / 255))
    gray, alpha = gray[:, None], alpha[:, None]
    drawn = gray + alpha * (colours(heat / 255) - gray)
    lines = colours(np.array((0, *LEVELS)))
    inks = np.round(np.concatenate([drawn, lines])).astype(np.uint8)
    return np.stack([inks >> rims for rims in range(len(lines))])


def _spread(extreme: Callable, values: np.ndarray, times: int) -> np.ndarray:
    """Each pixel becomes the extreme of itself and its four neighbours, `times` over.

    What lies outside the image is 0.
    """
    for _ in range(times):
        around = np.pad(values, 1)
        vertical = extreme(around[:-2, 1:-1], around[2:, 1:-1])
        horizontal = extreme(around[1:-1, :-2], around[1:-1, 2:])
        values = extreme(extreme(vertical, horizontal), values)
    return values


def enlarged(class_map: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map [h, w] interpolated to float32 [H, W].

    Enlarging, Pillow's filter is maps.grid.interpolation_matrix on both axes.
    """
    cells = Image.fromarray(np.asarray(class_map, np.float32))
    return np.asarray(cells.resize(shape[::-1], Image.Resampling.BILINEAR))


def body(gray: np.ndarray) -> np.ndarray:
    """Where a body is: all but the dark regions that reach a corner, bool [64, 64]."""
    small = Image.fromarray(gray.reshape(gray.shape[:2])).resize(
        (SIDE, SIDE), Image.Resampling.BOX
    )
    return ~reached_from_corners(np.asarray(small) <= AIR)


def reached_from_corners(free: np.ndarray) -> np.ndarray:
    """What a flood from the four corners reaches, 4-connected: bool [H, W] -> bool.

    The image is one integer with a bit for each pixel, so that a step in a direction is
    a shift of all of it; a column that is never free keeps rows apart.
    """
    height, width = free.shape
    walled = np.pad(free, ((0, 0), (0, 1)))
    corners = np.zeros_like(walled)
    corners[np.ix_([0, -1], [0, width - 1])] = True
    free, reached = (
        int.from_bytes(np.packbits(x, bitorder="little").tobytes(), "little")
        for x in (walled, corners & walled)
    )
    before = 0
    while reached != before:
        before, row = reached, width + 1
        moved = reached << 1 | reached >> 1 | reached << row | reached >> row
        reached |= moved & free
    bits = np.frombuffer(reached.to_bytes(-(-walled.size // 8), "little"), np.uint8)
    bits = np.unpackbits(bits, count=walled.size, bitorder="little").astype(bool)
    return bits.reshape(walled.shape)[:, :width]


def share_outside(class_map: np.ndarray, inside: np.ndarray, scale: float) -> float:
    """Share of a map's positive evidence that lies outside, 0..1.

    0 for a map so faint that it has no contour: where nothing is lies nowhere.

    Args:
      class_map: [h, w].
      inside: bool [H, W].
      scale: value of the highest colour.
    """
    if class_map.max() < LEVELS[0] * scale:
        return 0.0
    drawn = enlarged(np.maximum(class_map, 0), inside.shape)
    total = drawn.sum()
    return float(drawn[~inside].sum() / total) if total > 0 else 0.0


def panel(gray: np.ndarray, overlaid: np.ndarray, legend: str) -> Image.Image:
    """Image, overlay and below them the colour bar: RGB, H + 16 rows of 2 W + 4.

    Args:
      gray: uint8 [H, W] or [H, W, 1].
      overlaid: uint8 [H, W, 3].
      legend: what the bar's right end stands for.
    """
    height, width = gray.shape[:2]
    drawn = Image.new("RGB", (2 * width + GAP, height + STRIP))
    drawn.paste(Image.fromarray(gray.reshape(height, width)).convert("RGB"), (0, 0))
    drawn.paste(Image.fromarray(overlaid), (width + GAP, 0))
    drawn.paste(_strip(min(80, drawn.width // 3), legend), (0, height))
    return drawn


@functools.lru_cache
def _strip(width: int, legend: str) -> Image.Image:
    """The colour bar of `width` pixels from 0 to its legend, 16 rows."""
    text = round(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(legend))
    strip = Image.new("RGB", (width + 16 + text, STRIP))
    bar = np.broadcast_to(colours(np.linspace(0, 1, width)), (STRIP - 6, width, 3))
    strip.paste(Image.fromarray(bar.astype(np.uint8)), (12, 3))
    draw = ImageDraw.Draw(strip)
    draw.text((3, 2), "0", fill="white")
    draw.text((width + 16, 2), legend, fill="white")
    return strip


def halves(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image and overlay of a `panel`, uint8 [H, W, 3] each."""
    width = (picture.shape[1] - GAP) // 2
    pair = picture[:-STRIP]
    return pair[:, :width], pair[:, width + GAP :]


def side_by_side(gray: np.ndarray, *overlaid: np.ndarray) -> np.ndarray:
    """The plain image left of its overlays, as uint8 [H, W + n (W + gap), 3]."""
    plain = np.repeat(gray.reshape(*gray.shape[:2], 1), 3, axis=2)
    gap = np.zeros((len(plain), GAP, 3), np.uint8)
    return np.concatenate([plain, *(p for o in overlaid for p in (gap, o))], axis=1)


def without_cells(gray: np.ndarray, cells: np.ndarray, *, patch: int) -> np.ndarray:
    """The image with cells blacked out: gray [H, W] or [H, W, 1] -> uint8 [H, W].

    Args:
      cells: flat cell index row * grid + column, grid = W / patch.
    """
    gray = gray.reshape(gray.shape[:2]).copy()
    for row, column in zip(
        *np.divmod(np.asarray(cells), gray.shape[1] // patch), strict=True
    ):
        gray[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = 0
    return gray


def shrink(image: np.ndarray, height: int) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] made at most `height` pixels high, aspect kept."""
    if len(image) <= height:
        return image
    width = max(1, round(image.shape[1] * height / len(image)))
    picture = Image.fromarray(image).resize((width, height), Image.Resampling.BOX)
    return np.asarray(picture)


def encode(image: np.ndarray | Image.Image, kind: str, *, quality: int = 80) -> bytes:
    """The "PNG" or "JPEG" file of a picture, or of uint8 [H, W] or [H, W, 3]."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    options = {"quality": quality} if kind == "JPEG" else {"compress_level": 1}
    with _scratch() as file:
        image.save(file, kind, **options)
        file.seek(0)
        return file.read()


def _scratch() -> IO[bytes]:
    """A file of no name: into one Pillow encodes while other threads run.

    Into a BytesIO it encodes under Python's lock.
    """
    if hasattr(os, "memfd_create"):  # Linux
        return os.fdopen(os.memfd_create("picture"), "w+b")
    return tempfile.TemporaryFile()


def row(
    gray: np.ndarray, maps: Sequence[np.ndarray], scales: Sequence[float]
) -> np.ndarray:
    """The image, and beside it each map drawn over it on its own scale.

    Args:
      gray: uint8 [H, W] or [H, W, 1].
      maps: signed maps [*, *].
      scales: value of the highest colour of each.

    Returns:
      uint8 [H, (m + 1) W + gaps, 3].
    """
    drawn = (overlay(gray, *pair) for pair in zip(maps, scales, strict=True))
    return side_by_side(gray, *drawn)
