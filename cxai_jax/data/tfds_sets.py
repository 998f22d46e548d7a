"""Image classification as TensorFlow Datasets prepared it, where that is on disk.

TensorFlow is not imported and nothing is downloaded: array_record files are read
through TFDS, the older tfrecord files by their framing (length, checksum, bytes,
checksum), and both hold the same serialised examples. Any data set with one image and
one class label will do; images are decoded on access, as colour.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cxai_jax import progress
from cxai_jax.data import digits, splits, transforms
from cxai_jax.data.positive import positive_class
from cxai_jax.data.records import (
    Dataset,
    DatasetSpec,
    Mapped,
    Records,
    concatenate,
    fingerprint,
)

FRAME = struct.Struct("<QI")  # Length of the record and its checksum.
SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val"}
SPLITS |= {"test": "test"}
# Features that name an image or a patient, where there are any.
NAMES = ("name", "file_name", "filename", "image/filename", "image_id", "id")
PATIENTS = ("patient", "patient_id", "subject_id")


def load(data_config: ConfigDict) -> Dataset:
    """`tfds:NAME`, or `tfds:NAME/CONFIG`, from `data_dir` or ~/tensorflow_datasets.

    The newest version there counts. Where it has no split to test, that is `validation`
    where it has one, else the images are split anew, those of all splits where none
    has a known name; `split_scheme` says so.

    Raises:
      FileNotFoundError: if it was not prepared there.
      ValueError: if it has not one image and one label, no image of use, is damaged, or
        its class names leave open which is positive.
    """
    name = data_config.name.partition(":")[2]
    folder = find(
        name, (Path(data_config.data_dir), Path.home() / "tensorflow_datasets")
    )
    builder, image, label = open_builder(folder, name)
    class_names = tuple(builder.info.features[label].names)
    if class_names == digits.CLASS_NAMES and name == "mnist":
        return as_digits(builder, data_config, f"{folder}", image, label)
    positive = positive_class(
        class_names, data_config.positive, option="config.data.positive"
    )
    known = {SPLITS[own]: own for own in builder.info.splits if own in SPLITS}
    parts, digests = {}, {}
    for split, own in (known or {own: own for own in builder.info.splits}).items():
        examples = read_split(builder, own, image)
        parts[split], digests[split] = to_records(
            examples, f"{name}/{own}", image, label
        )
    if not known:
        parts = {"train": concatenate(list(parts.values()))}
        digests = {"train": sum(digests.values(), [])}
    scheme = "official, from TFDS"
    if "test" not in parts and "val" in parts:
        parts["test"], digests["test"] = parts.pop("val"), digests.pop("val")
        scheme += "; its validation split is tested"
    if "test" not in parts:
        parts, digests, scheme = redrawn(parts["train"], digests["train"])
        own = ", ".join(builder.info.splits)
        if len(builder.info.splits) == 1:
            scheme += ", drawn here: TFDS has one split"
        else:
            scheme += f", drawn here from {'train' if known else 'all'}: TFDS has {own}"
    return as_dataset(name, parts, digests, class_names, positive, scheme)


def find(name: str, homes: Sequence[Path]) -> Path:
    """The folder of the newest version that TFDS has prepared.

    Raises:
      FileNotFoundError: if there is none.
    """
    found = [
        file.parent
        for home in homes
        for file in (home / name).glob("*/dataset_info.json")
        if name
    ]
    if not found:
        there = sorted(
            str(file.parent.parent.relative_to(home))
            for home in homes
            for file in home.glob("**/dataset_info.json")
        )
        raise FileNotFoundError(
            f"tfds:{name} is in neither {homes[0]} nor {homes[1]} (prepared there: "
            f"{', '.join(dict.fromkeys(there)) or 'nothing'}) and is not downloaded "
            "here; prepare it with TFDS, as array_record"
        )

    def version(folder: Path) -> list[int]:
        return [int(n) for n in folder.name.split(".") if n.isdecimal()]

    home = next(h for h in homes if any(f.is_relative_to(h) for f in found))
    return max((f for f in found if f.is_relative_to(home)), key=version)


def open_builder(folder: Path, name: str) -> tuple:
    """What TFDS knows of a folder, and the features of the image and the label.

    Raises:
      ValueError: as `load`.
    """
    import tensorflow_datasets as tfds  # Takes seconds.

    try:
        builder = tfds.builder_from_directory(folder)
        features = dict(builder.info.features)
    except Exception as error:  # TFDS and protobuf raise what they like.
        raise ValueError(f"{folder} is damaged ({error}); prepare it again") from None
    kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    found = {
        kind: [n for n, one in features.items() if type(one) is wanted]
        for kind, wanted in kinds.items()
    }
    if any(len(names) != 1 for names in found.values()):
        listed = ", ".join(
            f"{n} ({type(f).__name__})" for n, f in sorted(features.items())
        )
        raise ValueError(
            f"tfds:{name} has the features {listed}; image classification needs one "
            "Image and one ClassLabel among them"
        )
    return builder, found["image"][0], found["label"][0]


def read_split(builder, split: str, image: str) -> Sequence[Mapping]:
    """The examples of a split, their images as the bytes of a file."""
    import tensorflow_datasets as tfds

    raw = {image: tfds.decode.SkipDecoding()}
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        return builder.as_data_source(split, decoders=raw)
    features = builder.info.features
    return [
        features.deserialize_example_np(record, decoders=raw)
        for file in builder.info.splits[split].filepaths
        for record in tfrecords(Path(file))
    ]


def to_records(
    examples: Sequence[Mapping], where: str, image: str, label: str
) -> tuple[Records, list[str]]:
    """A split as Records, and the digest of every image's file.

    Raises:
      ValueError: if it is empty, or an image has no label.
    """
    labels, names, patients, digests = [], [], [], []
    with progress.stage(f"reading {where}", len(examples)) as show:
        for row, example in enumerate(examples):
            labels.append(int(example[label]))
            names.append(_text(example, NAMES) or f"{row:06d}")
            patients.append(_text(example, PATIENTS))
            digests.append(hashlib.sha256(example[image]).hexdigest())
            show(row + 1)
    if not labels:
        raise ValueError(f"{where} of TFDS holds no images")
    if min(labels) < 0:
        raise ValueError(
            f"{where} of TFDS: {labels.count(-1)} of {len(labels)} images have no label"
        )
    twice = Counter(names)
    named = [n if twice[n] == 1 else f"{n}#{row}" for row, n in enumerate(names)]

    def decode(example: Mapping) -> np.ndarray:
        return transforms.decode_colour(example[image], where)

    records = Records(
        images=Mapped(decode, examples),
        labels=np.array(labels, np.int32),
        sites=np.zeros(len(labels), np.int32),
        patients=np.array(patients, str),
        names=np.array([f"{where}/{one}" for one in named], str),
    )
    return records, digests


def _text(example: Mapping, names: Sequence[str]) -> str:
    for name in names:
        value = example.get(name)
        if isinstance(value, bytes) and value:
            return value.decode("utf-8", "replace")
    return ""


def redrawn(records: Records, digests: Sequence[str]) -> tuple:
    """The images split anew: patients kept whole where they are known."""
    scheme, chosen = splits.drawn(list(records.patients), records.labels)
    rows = {
        split: np.flatnonzero(np.asarray(chosen) == split)
        for split in ("train", "val", "test")
    }
    parts = {split: records.subset(mine) for split, mine in rows.items()}
    of = {split: [digests[i] for i in mine] for split, mine in rows.items()}
    return parts, of, scheme


def as_dataset(
    name: str,
    parts: Mapping[str, Records],
    digests: Mapping[str, Sequence[str]],
    class_names: tuple[str, ...],
    positive: int,
    scheme: str,
) -> Dataset:
    """The data set, with what equal files say of leakage."""
    known = set(digests.get("train", ()))
    equal = sum(digest in known for digest in digests["test"])
    total = len(digests["test"])
    patients = any(records.patients.any() for records in parts.values())
    return Dataset(
        name=name.replace("/", "-"),
        splits=dict(parts),
        class_names=class_names,
        site_names=(name.replace("/", "-"),),
        positive=positive,
        split_scheme=scheme,
        fingerprint=fingerprint(
            [split for split, records in parts.items() for _ in range(len(records))],
            np.concatenate([records.names for records in parts.values()]),
            np.concatenate([records.labels for records in parts.values()]),
            sum((list(digests[split]) for split in parts), []),
        ),
        leakage={
            "verdict": f"{equal} of {total} test images are the same file as a "
            "training image; near duplicates not searched"
            + ("" if patients else "; no patient ids: shared patients not ruled out")
        },
    )


def as_digits(builder, data_config, where: str, image: str, label: str) -> Dataset:
    """MNIST as digits.py has it, so that it stands beside the other digits."""
    parts = {}
    for split in ("train", "test"):
        examples = read_split(builder, split, image)
        pairs = [(transforms.decode_png(e[image]), e[label]) for e in examples]
        images, labels = zip(*pairs, strict=True)
        parts[split] = digits.check_digits(
            np.stack(images), np.array(labels), f"{where} {split}", channels=1
        )
    return digits.as_dataset("mnist", parts, data_config, "official, from TFDS")


def tfrecords(file: Path) -> Iterator[bytes]:
    """The records of a tfrecord file; checksums are not compared.

    Raises:
      ValueError: if the file ends inside a record.
    """
    data = file.read_bytes()
    at = 0
    while at < len(data):
        if at + FRAME.size > len(data):
            raise ValueError(f"{file} ends inside a record; prepare it again")
        length, _ = FRAME.unpack_from(data, at)
        start = at + FRAME.size
        at = start + length + 4
        if at > len(data):
            raise ValueError(f"{file} ends inside a record; prepare it again")
        yield data[start : start + length]


SPEC = DatasetSpec(load, channels=3, side=None)
