"""What preparation is asked to store, and how folders of images are listed."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cxai_jax.data import dicom, transforms


class Box(NamedTuple):
    """A part of an image, half open, in its pixels; `place`: the line that names it."""

    left: int
    top: int
    right: int
    bottom: int
    place: str

    def __str__(self) -> str:
        return f"{self.left} {self.top} {self.right} {self.bottom}"

    def part(self, image: np.ndarray) -> np.ndarray:
        """The pixels inside, of an image [H, W, C]; ValueError if it is smaller."""
        height, width = image.shape[:2]
        if self.right > width or self.bottom > height:
            raise ValueError(
                f"{self.place}: the box {self} exceeds its {width} x {height} pixels; "
                "mend the line"
            )
        return image[self.top : self.bottom, self.left : self.right]


@dataclass(frozen=True)
class Source:
    """One image file to be stored; `name` is unique, `split` one of SPLITS."""

    file: Path
    name: str
    label: int
    split: str
    patient: str = ""
    site: int = 0
    lung_mask: Path | None = None  # Image of the same aspect, not 0 inside.
    box: Box | None = None  # The body, see Plan.crop.
    frame: int | None = None  # Of a DICOM file of several, from 0.


@dataclass(frozen=True)
class Plan:
    """What a data source wants stored.

    Args:
      name: directory under data_dir.
      split: directory under that, the key that `config.data.split` selects.
      split_scheme: how the split was made, in words.
      class_names: K names in the order of the labels.
      site_names: one name per site index.
      positive: class index counted as positive.
      sources: the files.
      left_out: (file, reason) of files that will not be stored.
      unlisted: likewise, of images that a list should have named; storing the others
        has to be asked for.
      crop: whether to store the boxes of the sources alone; there are no masks then.
    """

    name: str
    split: str
    split_scheme: str
    class_names: tuple[str, ...]
    site_names: tuple[str, ...]
    positive: int
    sources: Sequence[Source]
    left_out: Sequence[tuple[str, str]] = field(default_factory=tuple)
    unlisted: Sequence[tuple[str, str]] = field(default_factory=tuple)
    crop: bool = False


VERSION = "1.0.0"  # Of the layout of prepared data.


def by_frame(sources: Sequence[Source], frames: Sequence[int]) -> list[Source]:
    """A source for each frame, named like `a.dcm#3` where a file holds several."""
    return [
        one
        if count == 1
        else dataclasses.replace(one, name=f"{one.name}#{frame + 1}", frame=frame)
        for one, count in zip(sources, frames, strict=True)
        for frame in range(count)
    ]


def is_series(folder: Path) -> bool:
    """Whether a folder holds DICOM files, and neither other images nor folders."""
    files = list(folder.iterdir())
    images = [file for file in files if is_image(file)]
    whole = not any(file.is_dir() for file in files)
    return whole and bool(images) and all(map(dicom.is_dicom, images))


def class_files(source: Path, folder: str, series: bool = False) -> list[Path]:
    """The image files (see `is_image`, sorted) directly inside `source/folder`.

    Args:
      source: the folder of the class folders.
      folder: of one class.
      series: True takes the files of a folder of DICOM slices inside it as well.

    Raises:
      FileNotFoundError: if the folder is missing.
      ValueError: if it holds no image or a folder, which would be dropped silently.
    """
    directory = source / folder
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: no such folder; --source must be the folder that holds it"
        )
    files = sorted(directory.iterdir())
    inside = [f for f in files if series and f.is_dir() and is_series(f)]
    inner = [f.name for f in files if f.is_dir() and f not in inside]
    if inner:
        raise ValueError(
            f"{directory} holds the folder {inner[0]!r}; images must lie directly in "
            "it: point --source one level deeper or move them up"
        )
    files += [file for one in inside for file in sorted(one.iterdir())]
    images = [f for f in files if is_image(f)]
    if not images:
        raise ValueError(
            f"{directory} holds no image ({' '.join(transforms.SUFFIXES)}); add some "
            "or remove the folder"
        )
    return images


def is_image(file: Path) -> bool:
    """True for a file whose suffix promises an image, or DICOM of any name."""
    if file.is_dir() or file.name.startswith(".") or file.name.upper() == "DICOMDIR":
        return False
    # Scanners write "1.2.840.113", "IM-0001", "00000001", "a.IMA", "a.dicom".
    return file.suffix.lower() in transforms.SUFFIXES or dicom.is_dicom(file)
