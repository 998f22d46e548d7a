"""Pictures of what a network is fed and what it looks at, for a glance while it trains.

Made from a few images on the host's request, never inside the step.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cxai_jax.data import pipeline
from cxai_jax.data.augment import augment, options
from cxai_jax.data.records import Records
from cxai_jax.objectives.mixing import MIXES
from cxai_jax.report import pictures

COLUMNS = 8
SIDE = 112  # Pixels of each tile at most.
TITLE = 20  # Pixels, height of a row's title.


def training_sheet(config, records: Records) -> np.ndarray:
    """Augmented and mixed images as the step sees them: uint8 [H, W, 3].

    Where the mix weighs labels by class maps, flat maps stand in: they change the
    weights and no pixel.
    """
    rows = np.linspace(0, len(records) - 1, COLUMNS).astype(int)
    images, sizes = sources(config, records, rows)
    key_augment, key_mix = jax.random.split(jax.random.key(config.seed))
    images = augment(
        key_augment,
        jnp.asarray(images),
        jnp.asarray(sizes),
        **options(config),
    )
    mixed = MIXES[config.mix.name](
        key_mix,
        images,
        jnp.asarray(records.labels[rows]),
        jnp.zeros((COLUMNS, 1, 1)),
        prob=float(config.mix.prob > 0),  # A picture of what happens at times, too.
        beta=config.mix.beta,
        same_class=config.mix.same_class,
        boxes=config.mix.boxes,
        groups=1,
    )
    return sheet(np.asarray(mixed.images).round().astype(np.uint8))


def sources(config, records: Records, rows) -> tuple[np.ndarray, np.ndarray]:
    """Rows before augmentation, on one canvas: uint8 [B, Hc, Wc, C], int [B, 2]."""
    fit = pipeline.fit_for_training(config)
    images = [fit(records.images[int(row)]) for row in rows]
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    canvas = (*sizes.max(0), images[0].shape[-1])
    return pipeline.to_canvas(images, canvas), sizes


def class_map_sheet(predictions: dict, records: Records) -> np.ndarray:
    """Some scored images over the class maps of their predicted class.

    Args:
      predictions: as `evaluate.Evaluator.predict` returns.
      records: the scored split.
    """
    rows = np.linspace(0, len(records) - 1, COLUMNS).astype(int)
    gray = [pictures.shrink(records.images[int(row)][..., 0], SIDE) for row in rows]
    labels = predictions["probs"][rows, 0].argmax(1)
    maps = pictures.evidence(predictions["class_maps"][rows], labels)
    scale = pictures.common_scale(maps)
    overlaid = [pictures.overlay(*pair, scale) for pair in zip(gray, maps, strict=True)]
    return sheet([*gray, *overlaid])


def titled(page: np.ndarray, title: str) -> np.ndarray:
    """A strip with a title above uint8 [H, W, 3], wider where the title is."""
    import matplotlib  # Slow to import, for no more than its fonts.

    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")  # Of most scripts.
    font = ImageFont.truetype(fonts / "DejaVuSans.ttf", 13)
    width = max(page.shape[1], int(font.getlength(title)) + 4)
    strip = Image.new("RGB", (width, TITLE))
    ImageDraw.Draw(strip).text((2, 1), title, font=font, fill="white")
    below = np.pad(page, [(0, 0), (0, width - page.shape[1]), (0, 0)])
    return np.concatenate([np.asarray(strip), below])


def sheet(images: Sequence[np.ndarray]) -> np.ndarray:
    """Tiles in rows of `COLUMNS`, top left aligned on black: uint8 [H, W, 3].

    Args:
      images: uint8 [h, w], [h, w, 1] or [h, w, 3] each.
    """
    tiles = []
    for image in images:
        image = image.reshape(*image.shape[:2], -1)
        image = np.broadcast_to(image, (*image.shape[:2], 3))
        tiles.append(pictures.shrink(image, SIDE))
    height, width = (max(tile.shape[axis] for tile in tiles) + 2 for axis in (0, 1))
    page = np.zeros((-(-len(tiles) // COLUMNS) * height, COLUMNS * width, 3), np.uint8)
    for place, tile in enumerate(tiles):
        row, column = divmod(place, COLUMNS)
        top, left = row * height, column * width
        page[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return page
