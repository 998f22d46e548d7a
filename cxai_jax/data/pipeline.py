"""From records to batches on the devices: one index stream, two places for the bytes.

The order of a run is a function of (seed, step) alone: grain's random-access
`MapDataset` shuffles row numbers, so resuming at step s is indexing at s and no
iterator state is ever saved. What differs is where the rows are looked up:

  device  the whole split lies in accelerator memory as uint8; only row numbers travel
          and the gather is part of the step's graph;
  host    grain threads decode the rows and each process ships its own slice.

Both give the same batches for the same seed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh

from cxai_jax import mesh as meshes
from cxai_jax import progress
from cxai_jax.data import transforms
from cxai_jax.data.records import Records
from cxai_jax.types import Batch

RESIDENCIES = ("auto", "device", "host")
SAME_SHAPE = 64  # Rows: folds that differ by a few images share a compiled step.
THREADS = 2  # That decode batches of a training, each with a thread for every core.


def fit_for_training(config) -> Callable[[np.ndarray], np.ndarray]:
    """Host transform before the crop: short side or square of `resize`, or no crop."""
    resize = config.data.resize
    return {
        "random": lambda image: transforms.short_side(image, resize),
        "square": lambda image: transforms.squash(image, resize),
        "none": fit_for_scoring(config),
    }[config.augment.crop]


def fit_for_scoring(config) -> Callable[[np.ndarray], np.ndarray]:
    """Host transform of a scored image: squash to the network's input (A18)."""
    return lambda image: transforms.squash(image, config.data.image_size)


def read(records: Records, row: int, fit, with_mask: bool) -> tuple:
    """One fitted image [h, w, C] and its lung mask [h, w, 1], 255 inside, or None.

    Where the source has no mask the whole image counts as inside, which the mask term
    neither rewards nor punishes.
    """
    image = fit(records.images[row])
    if not with_mask:
        return image, None
    mask = None if records.lung_masks is None else records.lung_masks[row]
    if mask is None:
        return image, np.full((*image.shape[:2], 1), 255, np.uint8)
    return image, fit((np.asarray(mask) > 0).astype(np.uint8)[..., None] * 255)


def to_canvas(images: list, canvas: tuple[int, int, int]) -> np.ndarray:
    """Lays images at the top left of equal canvases: uint8 [N, Hc, Wc, C]."""
    stack = np.zeros((len(images), *canvas), np.uint8)
    for place, image in zip(stack, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return stack


def assemble(records: Records, rows, pairs: list, canvas) -> Batch:
    """A host Batch, all rows valid, of images and masks that were read."""
    images, masks = zip(*pairs, strict=True)
    return Batch(
        to_canvas(images, canvas),
        np.array([image.shape[:2] for image in images], np.int32),
        records.labels[rows].astype(np.int32),
        records.sites[rows].astype(np.int32),
        np.ones(len(rows), bool),
        None if masks[0] is None else to_canvas(masks, (*canvas[:2], 1)),
    )


def decode(records: Records, rows, fit, canvas, with_masks: bool = False) -> Batch:
    """Decodes rows into one host batch.

    Args:
      records: the split.
      rows: row numbers [B].
      fit: image -> image, as returned by `fit_for_training` or `fit_for_scoring`.
      canvas: (Hc, Wc, C).
      with_masks: whether lung masks come along.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = list(
            pool.map(lambda row: read(records, int(row), fit, with_masks), rows)
        )
    return assemble(records, np.asarray(rows), pairs, canvas)


def decode_all(
    records: Records, fit, max_bytes: float, with_masks: bool = False
) -> tuple[tuple[int, int, int], Batch | None]:
    """Decodes a whole split onto a canvas that holds all of its images.

    Returns:
      (canvas (Hc, Wc, C), the split as one host Batch [N, ...], filled up with copies
      of its first row to a multiple of SAME_SHAPE); None in place of the Batch if its
      images would take more than `max_bytes`.
    """
    pairs, canvas, rows = [], (0, 0, 0), np.arange(len(records))
    if records.shapes is not None:  # Then a split that does not fit need not be read.
        fitted = [fit(np.zeros(shape, np.uint8)).shape for shape in records.shapes]
        canvas = tuple(int(n) for n in np.max(fitted, axis=0))
        if len(rows) * np.prod(canvas) > max_bytes:
            return canvas, None
    reading = progress.stage("reading images", len(rows))
    with reading as show, ThreadPoolExecutor(os.cpu_count()) as pool:
        for pair in pool.map(
            lambda row: read(records, int(row), fit, with_masks), rows
        ):
            show(len(pairs) + 1)
            canvas = tuple(int(n) for n in np.maximum(canvas, pair[0].shape))
            too_big = len(rows) * np.prod(canvas) > max_bytes
            pairs.append(None if too_big else pair)
    if too_big:
        return canvas, None
    filler = -len(rows) % SAME_SHAPE
    rows, pairs = np.pad(rows, (0, filler)), pairs + pairs[:1] * filler
    return canvas, assemble(records, rows, pairs, canvas)


def training_rows(records: Records, site_repeats: tuple, batch_size: int) -> np.ndarray:
    """Row numbers of one epoch, each site entering `site_repeats[site]` times (A21).

    Raises:
      ValueError: if the repeats name fewer sites than the data have (one number
        serves all sites), or an epoch holds less than one batch.
    """
    repeats = np.asarray(site_repeats, int)
    if repeats.size == 1:
        repeats = np.repeat(repeats, records.sites.max() + 1)
    if repeats.size <= records.sites.max() or repeats.min() < 1:
        raise ValueError(
            f"config.data.site_repeats={tuple(site_repeats)} must give a positive "
            f"number for each of the {records.sites.max() + 1} sites"
        )
    rows = np.repeat(np.arange(len(records)), repeats[records.sites])
    if len(rows) < batch_size:
        raise ValueError(
            f"config.train.batch_size={batch_size} is larger than the {len(rows)} "
            "training images of an epoch; lower it"
        )
    return rows


def row_stream(rows: np.ndarray, batch_size: int, seed: int) -> Sequence[np.ndarray]:
    """`stream[step]` is the row numbers [B] of that step; reshuffled each epoch.

    The last len(rows) % batch_size rows of each epoch's order are dropped (A29). It is
    a grain.MapDataset.
    """
    import grain  # Slow to import, and who only predicts does not train.

    return (
        grain.MapDataset.source(rows)
        .seed(seed)
        .shuffle()
        .batch(batch_size, drop_remainder=True)
        .repeat()
    )


def device_budget(residency: str) -> float:
    """Bytes that a split may take on the device: all, none, or 40 % of its memory.

    Raises:
      ValueError: for an unknown `config.data.residency`.
    """
    if residency not in RESIDENCIES:
        raise ValueError(
            f"config.data.residency is {residency!r}; known: {', '.join(RESIDENCIES)}"
        )
    stats = jax.local_devices()[0].memory_stats() or {}
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    automatic = 0.4 * stats.get("bytes_limit", physical)
    return {"device": float("inf"), "host": 0.0, "auto": automatic}[residency]


def row_blocks(
    stream: Sequence[np.ndarray], start: int, per_call: int, batch_size: int, mesh: Mesh
) -> Iterator[jax.Array]:
    """Row numbers of `per_call` steps at a time, int32 [per_call, B], B sharded."""
    mine = meshes.local_rows(batch_size, mesh)
    while True:
        block = np.stack([stream[start + i][mine] for i in range(per_call)])
        yield meshes.put_rows(block.astype(np.int32), mesh, axis=1)
        start += per_call


def host_batches(
    records: Records,
    stream: Sequence[np.ndarray],
    start: int,
    fit,
    canvas,
    with_masks: bool,
    mesh: Mesh,
    threads: int = THREADS,
) -> Iterator[Batch]:
    """Global batches from `start` on, decoded by grain threads one step ahead.

    With 0 threads a batch is decoded when it is asked for.
    """
    import grain

    def load(rows):
        mine = rows[meshes.local_rows(len(rows), mesh)]
        return decode(records, mine, fit, canvas, with_masks)

    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=4 if threads else 0
    )
    batches = iter(stream[start:].map(load).to_iter_dataset(options))
    ahead = meshes.put_rows(next(batches), mesh)
    while True:
        # The transfer of the next batch overlaps with the step on this one.
        current, ahead = ahead, meshes.put_rows(next(batches), mesh)
        yield current


def scoring_batches(
    records: Records, fit, canvas, batch_size: int, mesh: Mesh
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches of a split in order, the last one padded with copies of its first row.

    The next one is decoded while the devices are busy with this one.

    Yields:
      (global Batch with `valid`, row numbers of the valid rows).
    """
    mine = meshes.local_rows(batch_size, mesh)

    def load(start):
        rows = np.arange(start, min(start + batch_size, len(records)))
        padded = np.concatenate([rows, np.full(batch_size - len(rows), rows[0])])
        batch = decode(records, padded[mine], fit, canvas)
        valid = (np.arange(batch_size) < len(rows))[mine]
        return batch._replace(valid=valid), rows

    starts = range(0, len(records), batch_size)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, 0)
        for start in starts:
            batch, rows = ahead.result()
            if start != starts[-1]:
                ahead = pool.submit(load, start + batch_size)
            yield meshes.put_rows(batch, mesh), rows
