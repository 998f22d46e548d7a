"""How TFDS writes prepared images; imported where they are, for it takes seconds."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from cxai_jax.data.plan import VERSION


class ImageRecords(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder behind every prepared data set.

    Args:
      examples: split name -> iterator of (key, example), keys ascending.
      class_names: of the label feature.
      channels: of the images, 1 or 3.
      lung_masks: whether the examples have the field `lung_mask`.
      data_dir: where TFDS writes.
    """

    VERSION = tfds.core.Version(VERSION)
    # TFDS 4.9.10 looks for download checksums beside the code, and to find the code
    # inside a package it imports importlib_resources, which nothing installs.
    code_path = None

    def __init__(
        self,
        *,
        examples: dict[str, Iterator],
        class_names: Sequence[str],
        channels: int,
        lung_masks: bool,
        data_dir: str | Path,
    ):
        self._examples = examples
        self._class_names = list(class_names)
        self._shape = (None, None, channels)
        self._lung_masks = lung_masks
        # tfrecord, the default format, would import TensorFlow.
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=self._shape, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=self._class_names),
            "site": np.int32,
            "patient": tfds.features.Text(),
            "name": tfds.features.Text(),
        }
        if self._lung_masks:  # The bytes of a PNG, empty where there is no mask.
            features["lung_mask"] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # Rows stay in the order of index.csv.
        )

    def _split_generators(self, _) -> dict[str, Iterator]:
        return self._examples

    def _generate_examples(self, split: str) -> Iterator:
        return self._examples[split]
