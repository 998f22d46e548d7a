"""Prepared data on disk: array_record files written and read through TFDS.

`data_dir/NAME/SPLIT/1.0.0/` holds PNG bytes, gray at short side 256 unless the
`DatasetSpec` says otherwise, with label, site, patient and source name, beside
`index.csv` (the same columns without the pictures, so that loading never parses images)
and `summary.json` (counts, fingerprint, leakage verdict, skipped files). TensorFlow is
never imported: images go in as encoded bytes and come out with decoding skipped.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from cxai_jax import progress
from cxai_jax.data import leakage, reading, tables, transforms
from cxai_jax.data.plan import VERSION, Plan, Source
from cxai_jax.data.records import SPLITS, Dataset, Mapped, Records, fingerprint
from cxai_jax.writer import read_json

COLUMNS = ("split", "name", "label", "site", "patient")
SUMMARY = ("name", "counts", "class_names", "site_names", "positive", "split_scheme")
SUMMARY += ("fingerprint", "leakage")


def build(
    plan: Plan,
    data_dir: str | Path,
    skip_bad: bool = False,
    *,
    channels: int = 1,
    side: int | None = transforms.STORED_SIDE,
) -> dict:
    """Stores the images of a plan and examines them for leakage.

    The data are written to a temporary folder and moved into place at the end, so a
    failed or killed build leaves an earlier one untouched.

    Args:
      plan: what to store.
      data_dir: root of all prepared data sets.
      skip_bad: True lists unreadable and unlisted images under "skipped" instead of
        failing.
      channels: 1 stores gray images, 3 colour.
      side: pixels, short side of the stored images; None stores them as they are.

    Returns:
      The summary, as written to summary.json.

    Raises:
      ValueError: for an unreadable or unlisted image, a name given twice, a label or
        split out of range, or a split of which no image can be read.
    """
    _check(plan, skip_bad)
    skipped = [list(item) for item in (*plan.left_out, *plan.unlisted)]
    with_masks = any(source.lung_mask for source in plan.sources)
    encode = functools.partial(
        _encode, channels=channels, side=side, with_mask=with_masks, crop=plan.crop
    )
    oddities = Counter()
    rows = []  # (source, file digest, pixel digest, shape) of every stored image.
    thumbnails = np.empty((len(plan.sources), leakage.SIDE, leakage.SIDE), np.uint8)

    def examples(split):
        sources = [s for s in plan.sources if s.split == split]
        before = len(rows)
        for source, result in _each(sources, encode):
            seen[0] += 1
            show(seen[0])
            if isinstance(result, ValueError):
                name = reading.printable(source.file)
                result = f"{name}: {str(result).removeprefix(f'{name}: ')}"
                if not skip_bad:
                    raise ValueError(f"{result}; or pass --skip_bad")
                skipped.append([source.name, result])
                continue
            example, animated, odd, *described, thumbnail = result
            if animated:
                skipped.append([source.name, "all frames but the first"])
            oddities.update(odd)
            thumbnails[len(rows)] = thumbnail
            rows.append((source, *described))
            yield len(rows), example
        if len(rows) == before:
            raise ValueError(f"no image of the split {split!r} can be read: {result}")

    seen = [0]
    used = [split for split in SPLITS if any(s.split == split for s in plan.sources)]
    target = place(data_dir, plan.name, plan.split)
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    scratched = tempfile.TemporaryDirectory(dir=data_dir, prefix=".building-")
    preparing = progress.stage("preparing", len(plan.sources))
    with scratched as scratch, preparing as show:
        import tensorflow_datasets as tfds  # Takes seconds; predictions do without.

        from cxai_jax.data.builder import ImageRecords

        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS talks of downloads.
            builder = ImageRecords(
                examples={split: examples(split) for split in used},
                class_names=plan.class_names,
                channels=channels,
                lung_masks=with_masks,
                data_dir=scratch,
            )
            builder.download_and_prepare()
        summary = _summary(plan, rows, thumbnails[: len(rows)], skipped)
        summary["oddities"] = dict(oddities)
        _check_kept(plan, summary["counts"])
        written = Path(builder.data_dir)
        _write_index(written / "index.csv", [row[0] for row in rows])
        (written / "summary.json").write_text(
            json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(Path(scratch) / "replaced")
        written.rename(target)
    return summary


def place(data_dir: str | Path, name: str, split: str) -> Path:
    """Where a prepared data set lies."""
    return Path(data_dir) / name / split / VERSION


def load(
    name: str, split: str, data_dir: str | Path, dataset: str | None = None
) -> Dataset:
    """Opens a prepared data set; images are decoded on access.

    Args:
      name: directory under data_dir.
      split: directory under that.
      data_dir: root of all prepared data sets.
      dataset: how cxai-prepare calls it; None is `name`.

    Raises:
      FileNotFoundError: if it has not been prepared.
      ValueError: if its files do not fit together.
    """
    directory = place(data_dir, name, split)
    if not (directory / "summary.json").is_file():
        others = sorted(p.parts[-3] for p in directory.parents[1].glob("*/*/*.json"))
        others = ", ".join(dict.fromkeys(others)) or "none"
        raise FileNotFoundError(
            f"{directory} is not prepared (prepared splits of {name}: {others}); run "
            f"cxai-prepare --dataset={dataset or name} --source=DIR "
            f"--data_dir={data_dir}, or set config.data.data_dir and config.data.split "
            "to what it wrote"
        )
    import tensorflow_datasets as tfds

    summary = read_json(directory / "summary.json", *SUMMARY)
    index = _read_index(directory / "index.csv")
    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS and protobuf raise what they like.
        raise ValueError(
            f"{directory} is damaged ({error}); prepare the data set again"
        ) from None
    with_masks = "lung_mask" in builder.info.features
    shapes = summary.get("shapes", {})  # Earlier versions did not write them.
    splits = {}
    for key in summary["counts"]:
        rows = [row for row in index if row["split"] == key]
        source = builder.as_data_source(
            key, decoders={"image": tfds.decode.SkipDecoding()}
        )
        if len(source) != len(rows):
            raise ValueError(
                f"{directory}: {len(source)} records but {len(rows)} rows of index.csv "
                f"in {key}; prepare the data set again"
            )
        splits[key] = Records(
            images=Mapped(_decode, source),
            labels=np.array([row["label"] for row in rows]).astype(np.int32),
            sites=np.array([row["site"] for row in rows]).astype(np.int32),
            patients=np.array([row["patient"] for row in rows], str),
            names=np.array([row["name"] for row in rows], str),
            lung_masks=Mapped(_decode_mask, source) if with_masks else None,
            shapes=frozenset(map(tuple, shapes[key])) if key in shapes else None,
        )
    return Dataset(
        name=summary["name"],
        splits=splits,
        class_names=tuple(summary["class_names"]),
        site_names=tuple(summary["site_names"]),
        positive=summary["positive"],
        split_scheme=summary["split_scheme"],
        fingerprint=summary["fingerprint"],
        leakage=summary["leakage"],
    )


def _check(plan: Plan, skip_bad: bool) -> None:
    if plan.unlisted and not skip_bad:
        name, reason = plan.unlisted[0]
        raise ValueError(
            f"{name!r} is {reason} ({len(plan.unlisted)} such images); list it, or "
            "pass --skip_bad to leave them out"
        )
    if not plan.sources:
        raise ValueError(f"the data set {plan.name} has no images")
    names = Counter(source.name for source in plan.sources)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} occurs {names[twice[0]]} times; rename one")
    for source in plan.sources:
        if source.split not in SPLITS:
            raise ValueError(
                f"{source.name}: split {source.split!r}, expected one of "
                f"{', '.join(SPLITS)}"
            )
        if source.label not in range(len(plan.class_names)):
            raise ValueError(
                f"{source.name}: label {source.label}, expected 0 to "
                f"{len(plan.class_names) - 1} ({', '.join(plan.class_names)})"
            )


def _check_kept(plan: Plan, counts: dict[str, dict[str, int]]) -> None:
    """Raises ValueError if all images of a class of a split were left out."""
    for source in plan.sources:
        name = plan.class_names[source.label]
        if not counts[source.split][name]:
            raise ValueError(
                f"no image of the class {name!r} of the split {source.split!r} can be "
                "read; mend some of them"
            )


def _each(sources: Sequence[Source], encode: Callable) -> Iterator[tuple]:
    """(source, what `encode` made of it or a ValueError); a file is opened once."""
    files = [list(of) for _, of in itertools.groupby(sources, lambda one: one.file)]
    for group, found in reading.read_ahead(files, encode):
        failed = isinstance(found, ValueError)
        yield from zip(group, [found] * len(group) if failed else found, strict=True)


def _encode(group: Sequence[Source], *, channels: int, **options) -> list[tuple]:
    """What is stored of each source; all are of one file, which may hold frames."""
    to_channels = transforms.to_gray if channels == 1 else transforms.to_colour
    name = reading.printable(group[0].file)
    with reading.opened(group[0].file, transforms.memory) as data:
        if group[0].frame is None:
            frames = [transforms.single_frame(data, name)]
        else:
            frames = transforms.decode_frames(data, name)
            if len(frames) != len(group):
                raise ValueError(
                    f"{name}: {len(frames)} frames where its header says {len(group)}"
                )
        about = transforms.is_animated(data), transforms.oddities(data)
        digest = leakage.digest(data)
        return [
            _stored(source, to_channels(frame), (*about, digest), **options)
            for source, frame in zip(group, frames, strict=True)
        ]


def _stored(
    source: Source,
    image: np.ndarray,
    of_file: tuple,
    *,
    side: int | None,
    with_mask: bool,
    crop: bool,
) -> tuple:
    """(example, is animated, oddities, file digest, pixel digest, shape, thumbnail)."""
    shape = image.shape
    if source.box:
        body = source.box.part(image)
        image = body if crop else image
    stored = transforms.as_stored(image, side)
    png = transforms.encode_png(stored)
    mask = _encode_mask(source, shape, stored, side) if with_mask else None
    example = {
        "image": io.BytesIO(png),
        "label": source.label,
        "site": source.site,
        "patient": source.patient,
        "name": source.name,
    }
    if with_mask:
        example["lung_mask"] = mask
    return (
        example,
        *of_file,
        leakage.pixel_digest(stored),
        stored.shape,
        leakage.thumbnail(stored),
    )


def _encode_mask(
    source: Source, shape: tuple[int, ...], stored: np.ndarray, side: int | None
) -> bytes:
    if source.lung_mask is None:
        return b""
    mask = transforms.open_gray(source.lung_mask)
    inside = np.where(mask > 0, 255, 0).astype(np.uint8)
    scaled = transforms.as_stored(inside, side)
    if scaled.shape[:2] != stored.shape[:2]:
        raise ValueError(
            f"{source.lung_mask} has {mask.shape[0]} x {mask.shape[1]} pixels but its "
            f"image {source.file} has {shape[0]} x {shape[1]}: another "
            "aspect; draw the mask on the image"
        )
    return transforms.encode_png(scaled)


def _decode(record: dict) -> np.ndarray:
    return transforms.decode_png(record["image"])


def _decode_mask(record: dict) -> np.ndarray | None:
    if not record["lung_mask"]:
        return None
    return (transforms.decode_png(record["lung_mask"])[..., 0] > 127).astype(np.uint8)


def _summary(plan: Plan, rows: list, thumbnails: np.ndarray, skipped: list) -> dict:
    sources, files, pixels, _ = zip(*rows, strict=True)
    splits = [s.split for s in sources]
    present = [split for split in SPLITS if split in splits]
    names, labels = [s.name for s in sources], [s.label for s in sources]
    patients = [s.patient for s in sources]
    found = Counter(zip(splits, labels, strict=True))
    return {
        "name": plan.name,
        "split": plan.split,
        "split_scheme": plan.split_scheme,
        "class_names": list(plan.class_names),
        "site_names": list(plan.site_names),
        "positive": plan.positive,
        "counts": {
            s: {c: found[s, k] for k, c in enumerate(plan.class_names)} for s in present
        },
        "shapes": {
            s: sorted({row[3] for row in rows if row[0].split == s}) for s in present
        },
        "fingerprint": fingerprint(splits, names, labels, pixels),
        "leakage": leakage.examine(
            splits, names, labels, patients, files, pixels, thumbnails
        ),
        "skipped": skipped,
    }


def _write_index(file: Path, sources: list[Source]) -> None:
    with open(file, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for source in sources:
            cells = (str(getattr(source, column)) for column in COLUMNS)
            writer.writerow(map(tables.guarded, cells))


def _read_index(file: Path) -> list[dict[str, str]]:
    index = []
    for row in tables.read_rows(file):
        cells = [row.get(column) for column in COLUMNS]
        numbers = (row.get("label"), row.get("site"))
        if None in cells or not all(map(str.isdecimal, numbers)):
            raise ValueError(
                f"{file} is damaged in row {len(index) + 1}; prepare the data set again"
            )
        index.append(dict(zip(COLUMNS, map(tables.unguarded, cells), strict=True)))
    return index
