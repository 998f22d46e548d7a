"""MNIST as TensorFlow Datasets prepared it, where that is on disk already.

TensorFlow is not imported and nothing is downloaded: array_record files are read
through TFDS, the older tfrecord files by their framing (length, checksum, bytes,
checksum), and both hold the same serialised examples.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cxai_jax.data import digits, transforms
from cxai_jax.data.records import Dataset, DatasetSpec

FRAME = struct.Struct("<QI")  # Length of the record and its checksum.


def load(data_config: ConfigDict) -> Dataset:
    """`tfds:mnist` from `config.data.data_dir` or ~/tensorflow_datasets.

    Raises:
      FileNotFoundError: if it was not prepared there.
      ValueError: for another name than mnist.
    """
    name = data_config.name.partition(":")[2]
    if name != "mnist":
        raise ValueError(
            f"config.data.name={data_config.name!r}: of TFDS only tfds:mnist is read"
        )
    homes = (Path(data_config.data_dir), Path.home() / "tensorflow_datasets")
    found = [
        file.parent
        for home in homes
        for file in sorted((home / name).glob("*/dataset_info.json"))
    ]
    if not found:
        raise FileNotFoundError(
            f"tfds:{name} is in neither {homes[0]} nor {homes[1]} and is not "
            f"downloaded here; prepare it with TFDS, or use config.data.name={name}"
        )
    parts = {
        split: digits.check_digits(
            *_read(found[-1], split), f"{found[-1]} {split}", channels=1
        )
        for split in ("train", "test")
    }
    return digits.as_dataset(name, parts, data_config, "official, from TFDS")


def _read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    raw = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
        examples = builder.as_data_source(split, decoders=raw)
    else:
        features = builder.info.features
        examples = (
            features.deserialize_example_np(record, decoders=raw)
            for file in builder.info.splits[split].filepaths
            for record in tfrecords(Path(file))
        )
    pairs = [(transforms.decode_png(e["image"]), e["label"]) for e in examples]
    images, labels = zip(*pairs, strict=True)
    return np.stack(images), np.array(labels)


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
