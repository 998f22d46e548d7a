"""Ten digits in three styles: mnist, usps and mnist_m, at the size they come in.

mnist: 28 px, gray (LeCun et al. 1998). usps: 16 px, gray, no margin (Hull 1994).
mnist_m: 32 px, colour, MNIST digits over photographs (Ganin et al. 2016). Read from
`data_dir/digits/NAME.npz` with the arrays x_train, y_train, x_test, y_test. All have
three channels (A26), so that each can be the target of the others.

Where MNIST-M is not at hand it is made from MNIST by the published recipe. Measured on
3,000 published test images: every pixel above 0 of the digit, laid on 32 px, inverts
the photograph, so that the absolute difference is one to white, not to gray.
"""

import importlib.util
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from cxai_jax.data import leakage
from cxai_jax.data.records import Dataset, DatasetSpec, Records, fingerprint

CLASS_NAMES = tuple("0123456789")
SEED = 2016  # Of the generated MNIST-M, which is the same on every machine.
MNIST_M_SIDE = 32  # Pixels.
# The photographs, not the test patterns, that scikit-image carries.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "rocket.jpg",
)


def load_mnist(data_config: ConfigDict) -> Dataset:
    """MNIST: 60,000 training and 10,000 test digits."""
    file = _folder(data_config) / "mnist.npz"
    return as_dataset("mnist", read_npz(file, channels=1), data_config)


def load_usps(data_config: ConfigDict) -> Dataset:
    """USPS: 7,291 training and 2,007 test digits, 9,298 in all."""
    file = _folder(data_config) / "usps.npz"
    return as_dataset("usps", read_npz(file, channels=1), data_config)


def load_mnist_m(data_config: ConfigDict) -> Dataset:
    """MNIST-M: published where its file is at hand, else made from MNIST.

    `mnist_m.npz` has all of it; `mnist_m_test3000.npz` the first 3,000 test images.
    What is missing is drawn over the photographs of `config.data.photographs`, or of
    scikit-image; `split_scheme` says what was.
    """
    folder = _folder(data_config)
    if (folder / "mnist_m.npz").is_file():
        parts = read_npz(folder / "mnist_m.npz", channels=3)
        return as_dataset("mnist_m", parts, data_config)
    mnist = read_npz(folder / "mnist.npz", channels=1)
    photographs, origin = find_photographs(data_config.photographs)
    published = folder / "mnist_m_test3000.npz"
    parts = read_npz(published, channels=3) if published.is_file() else {}
    made = [split for split in mnist if split not in parts]
    for number, split in enumerate(made):
        images, labels = mnist[split]
        if split == "train":  # Before, so that nothing is drawn in vain.
            images, labels = _first(data_config, images, labels)
        rng = np.random.default_rng((SEED, number))
        parts[split] = over_photographs(rng, images, photographs), labels
    kept = "" if len(made) == len(mnist) else "published test images, "
    scheme = f"{kept}{' and '.join(made)} made from mnist over {origin}"
    return as_dataset("mnist_m", parts, data_config, scheme)


def as_dataset(
    name: str,
    parts: dict[str, tuple[np.ndarray, np.ndarray]],
    data_config: ConfigDict,
    split_scheme: str = "official",
) -> Dataset:
    """A Dataset of `parts`: split -> (uint8 [N, h, w, C], int [N]).

    Of the training split the first `config.data.digits_images` count; 0: all.
    """
    parts = dict(parts)
    if "train" in parts:
        parts["train"] = _first(data_config, *parts["train"])
    splits = {key: _records(name, key, *parts[key]) for key in sorted(parts)[::-1]}
    digests = {
        key: [leakage.pixel_digest(image) for image in records.images]
        for key, records in splits.items()
    }
    known = set(digests.get("train", ()))
    equal = sum(digest in known for digest in digests["test"])
    return Dataset(
        name=name,
        splits=splits,
        class_names=CLASS_NAMES,
        site_names=(name,),
        positive=1,
        split_scheme=split_scheme,
        fingerprint=fingerprint(
            [key for key, records in splits.items() for _ in range(len(records))],
            np.concatenate([records.names for records in splits.values()]),
            np.concatenate([records.labels for records in splits.values()]),
            sum(digests.values(), []),
        ),
        leakage={
            "verdict": f"{equal} of {len(digests['test'])} test images are pixel "
            "identical to a training image; near duplicates not searched, since any "
            "two plain ones are alike; writers unknown"
        },
    )


def read_npz(file: Path, *, channels: int) -> dict[str, tuple]:
    """Splits of an npz file: name -> (uint8 [N, h, w, channels], int32 [N]).

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for a split without images or labels, arrays of another shape or
        type, or a label that is no digit.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; config.data.data_dir must hold digits/{file.name} "
            "with the arrays x_train, y_train, x_test, y_test"
        )
    with np.load(file) as arrays:
        held = dict(arrays)
    return {
        split: check_digits(
            held[f"x_{split}"], held.get(f"y_{split}"), f"{file} x_{split}", channels
        )
        for split in ("train", "test")
        if f"x_{split}" in held
    }


def check_digits(images, labels, where: str, channels: int) -> tuple:
    """(uint8 [N, h, w, channels], int32 [N]) of one split.

    Raises:
      ValueError: as `read_npz`; it starts with `where`.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"{where} is {images.dtype} {images.shape}; expected uint8 [N, h, w] or "
            "[N, h, w, 3]"
        )
    if images.shape[-1] != channels:
        kinds = {1: "gray (1 channel)", 3: "colour (3 channels)"}
        raise ValueError(
            f"{where} has {images.shape[-1]} channels; this data set is "
            f"{kinds[channels]}"
        )
    if not len(images):
        raise ValueError(f"{where} holds no images; the split needs at least one")
    if labels is None or labels.shape != images.shape[:1]:
        found = "none" if labels is None else str(labels.shape[0])
        raise ValueError(
            f"{where} has {len(images)} images but {found} labels; give one per image"
        )
    if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
        raise ValueError(
            f"{where} has labels from {labels.min()} to {labels.max()}; digits are "
            f"0 to {len(CLASS_NAMES) - 1}"
        )
    return images, labels.astype(np.int32)


def find_photographs(folder: str) -> tuple[list[np.ndarray], str]:
    """RGB photographs, uint8 [h, w, 3], and where they come from, in words.

    Args:
      folder: with .jpg or .png files, such as the training images of BSDS500; "" takes
        those of scikit-image (extra `photographs`), which is not imported for it.

    Raises:
      FileNotFoundError: if the folder has none, or scikit-image is not installed.
    """
    if folder:
        files = sorted(
            file
            for file in Path(folder).glob("*")
            if file.suffix.lower() in (".jpg", ".jpeg", ".png")
        )
        origin = f"{len(files)} photographs of {Path(folder).name}"
    else:
        found = importlib.util.find_spec("skimage")
        if not found:
            raise FileNotFoundError(
                "MNIST-M is made over photographs: set config.data.photographs to a "
                "folder of them, or pip install 'cxai-jax[photographs]'"
            )
        data = Path(found.submodule_search_locations[0]) / "data"
        files = [data / name for name in PHOTOGRAPHS if (data / name).is_file()]
        origin = f"{len(files)} photographs of scikit-image"
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    pictures = [p for p in pictures if min(p.shape[:2]) >= MNIST_M_SIDE]
    if not pictures:
        raise FileNotFoundError(
            f"{folder or data}: no .jpg or .png of {MNIST_M_SIDE} px or more; "
            "config.data.photographs must be a folder of photographs"
        )
    return pictures, origin


def over_photographs(
    rng: np.random.Generator, digits: np.ndarray, photographs: list[np.ndarray]
) -> np.ndarray:
    """|255 [digit > 0] - crop|, each digit over a random crop: uint8 [N, 32, 32, 3].

    Ganin et al. (2016), section 5.2.4; see the head of this file for [digit > 0].

    Args:
      rng: draws photograph and crop.
      digits: uint8 [N, h, w, 1], h and w at most 32; centred.
      photographs: uint8 [h, w, 3], each at least 32 px.

    Raises:
      ValueError: for digits of more than 32 px.
    """
    if max(digits.shape[1:3]) > MNIST_M_SIDE:
        height, width = digits.shape[1:3]
        raise ValueError(
            f"MNIST-M is made of digits of at most {MNIST_M_SIDE}x{MNIST_M_SIDE} px; "
            f"those of mnist.npz have {height}x{width}"
        )
    margins = [(MNIST_M_SIDE - n) // 2 for n in digits.shape[1:3]]
    rest = [
        (m, MNIST_M_SIDE - n - m)
        for m, n in zip(margins, digits.shape[1:3], strict=True)
    ]
    ink = np.pad(digits > 0, [(0, 0), *rest, (0, 0)])
    picture = rng.integers(len(photographs), size=len(digits))
    rooms = np.array([p.shape[:2] for p in photographs]) - MNIST_M_SIDE + 1
    corners = rng.integers(rooms[picture])
    made = np.empty((len(digits), MNIST_M_SIDE, MNIST_M_SIDE, 3), np.uint8)
    for i, (which, (row, column)) in enumerate(zip(picture, corners, strict=True)):
        rows, columns = (slice(at, at + MNIST_M_SIDE) for at in (row, column))
        made[i] = photographs[which][rows, columns]
    return np.where(ink, 255 - made, made)


def _folder(data_config: ConfigDict) -> Path:
    return Path(data_config.data_dir) / "digits"


def _first(data_config: ConfigDict, images, labels) -> tuple:
    count = data_config.digits_images or len(images)
    if count < 0:
        raise ValueError(
            f"config.data.digits_images={count} must be a number of training images, "
            "or 0 for all"
        )
    return images[:count], labels[:count]


def _records(name: str, split: str, images, labels) -> Records:
    count = len(images)
    return Records(
        images=np.broadcast_to(images, (*images.shape[:3], 3)),  # A view of gray ones.
        labels=labels,
        sites=np.zeros(count, np.int32),
        patients=np.full(count, ""),
        names=np.array([f"{name}/{split}/{row:05d}" for row in range(count)]),
    )


MNIST = DatasetSpec(load_mnist, channels=3, side=None)
USPS = DatasetSpec(load_usps, channels=3, side=None)
MNIST_M = DatasetSpec(load_mnist_m, channels=3, side=None)
