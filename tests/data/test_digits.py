"""Digits from npz files, MNIST-M over photographs."""

import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cxai_jax.data import digits

SIDES = {"mnist": (28, 1), "usps": (16, 1), "mnist_m": (32, 3)}


def write(folder, name, train=12, test=10, **changes):
    """An npz file of noise with every digit in the test split."""
    side, channels = SIDES[name]
    rng = np.random.default_rng(len(name))
    shape = (side, side) if channels == 1 else (side, side, channels)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, *shape), np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 10
    arrays |= changes
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "digits" / f"{name}.npz", **arrays)
    return arrays


def config(folder, name="mnist", **changes):
    fields = {
        "name": name,
        "data_dir": str(folder),
        "digits_images": 0,
        "photographs": "",
    }
    return ConfigDict(fields | changes)


@pytest.mark.parametrize(
    "load,name",
    [
        (digits.load_mnist, "mnist"),
        (digits.load_usps, "usps"),
        (digits.load_mnist_m, "mnist_m"),
    ],
)
def test_digits_are_kept_as_they_are(tmp_path, load, name):
    arrays = write(tmp_path, name)
    dataset = load(config(tmp_path))
    side, channels = SIDES[name]
    train = dataset.splits["train"]
    assert train.images.shape == (12, side, side, 3)
    for channel in range(3):
        given = arrays["x_train"].reshape(12, side, side, channels)
        expected = given[..., channel % channels]
        np.testing.assert_array_equal(train.images[..., channel], expected)
    np.testing.assert_array_equal(dataset.splits["test"].labels, arrays["y_test"])
    assert dataset.class_names == tuple("0123456789")
    assert train.names[3] == f"{name}/train/00003"
    first = load(config(tmp_path, digits_images=5)).splits["train"]
    np.testing.assert_array_equal(first.images, train.images[:5])


def test_equal_pixels_in_both_splits_are_counted(tmp_path):
    arrays = write(tmp_path, "usps")
    write(tmp_path, "usps", x_test=arrays["x_train"][[0, 1, 1]], y_test=np.arange(3))
    verdict = digits.load_usps(config(tmp_path)).leakage["verdict"]
    assert verdict.startswith("3 of 3 test images are pixel identical")


EMPTY = np.zeros((0, 16, 16), np.uint8)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"x_train": EMPTY}, "x_train holds no images; the split needs at least one"),
        ({"y_train": np.arange(3)}, "x_train has 12 images but 3 labels; give one"),
        ({"y_test": np.full(10, 11)}, "has labels from 11 to 11; digits are 0 to 9"),
        (
            {"x_test": np.zeros((10, 16, 16, 3), np.uint8)},
            r"has 3 channels; this data set is gray \(1 channel\)",
        ),
        (
            {"x_test": np.zeros((10, 16, 16), np.float32)},
            r"is float32 \(10, 16, 16, 1\); expected uint8 \[N, h, w\]",
        ),
    ],
)
def test_files_that_are_no_digits_are_refused(tmp_path, changes, message):
    write(tmp_path, "usps", **changes)
    with pytest.raises(ValueError, match=message):
        digits.load_usps(config(tmp_path))


def test_a_gray_file_is_not_mnist_m(tmp_path):
    write(tmp_path, "mnist_m", x_train=np.zeros((12, 32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"1 channels; .* colour \(3 channels\)"):
        digits.load_mnist_m(config(tmp_path))


def test_a_missing_file_and_a_negative_count_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"digits/usps.npz with the arrays"):
        digits.load_usps(config(tmp_path))
    write(tmp_path, "usps")
    with pytest.raises(ValueError, match="config.data.digits_images=-1 must be"):
        digits.load_usps(config(tmp_path, digits_images=-1))


def photograph(folder, seed=0, size=(40, 50)):
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{seed}.png")
    return pixels


def test_mnist_m_inverts_a_crop_where_the_digit_is(tmp_path):
    """Published recipe: |digit - crop| with a binary digit on 32 px."""
    arrays = write(tmp_path, "mnist")
    photo = photograph(tmp_path / "photos")
    loaded = digits.load_mnist_m(
        config(tmp_path, photographs=str(tmp_path / "photos"), digits_images=4)
    )
    assert loaded.split_scheme == (
        "train and test made from mnist over 1 photographs of photos"
    )
    images = loaded.splits["train"].images
    assert images.shape == (4, 32, 32, 3)
    windows = np.lib.stride_tricks.sliding_window_view(photo, (32, 32), (0, 1))
    windows = windows.transpose(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3).astype(int)
    for image, digit in zip(images, arrays["x_train"], strict=False):
        ink = np.pad(255 * (digit > 0).astype(int), 2)[..., None]
        made = np.abs(ink - windows)
        assert (made == image).all((1, 2, 3)).any()
    again = digits.load_mnist_m(
        config(tmp_path, photographs=str(tmp_path / "photos"), digits_images=4)
    )
    assert again.fingerprint == loaded.fingerprint


def test_published_test_images_take_precedence(tmp_path):
    write(tmp_path, "mnist")
    given = write(tmp_path, "mnist_m")
    (tmp_path / "digits" / "mnist_m.npz").unlink()
    np.savez(
        tmp_path / "digits" / "mnist_m_test3000.npz",
        x_test=given["x_test"],
        y_test=given["y_test"],
    )
    photograph(tmp_path / "photos")
    loaded = digits.load_mnist_m(config(tmp_path, photographs=str(tmp_path / "photos")))
    assert loaded.split_scheme.startswith("published test images, train made from")
    np.testing.assert_array_equal(loaded.splits["test"].images, given["x_test"])


def test_mnist_m_needs_photographs(tmp_path, monkeypatch):
    write(tmp_path, "mnist")
    photograph(tmp_path / "small", size=(20, 50))
    with pytest.raises(FileNotFoundError, match="no .jpg or .png of 32 px or more"):
        digits.load_mnist_m(config(tmp_path, photographs=str(tmp_path / "small")))
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="set config.data.photographs to a"):
        digits.load_mnist_m(config(tmp_path))


def test_digits_too_large_for_mnist_m_are_refused(tmp_path):
    big = np.zeros((12, 40, 36), np.uint8)
    write(tmp_path, "mnist", x_train=big)
    photograph(tmp_path / "photos")
    with pytest.raises(ValueError, match="at most 32x32 px; those of mnist.npz have 4"):
        digits.load_mnist_m(config(tmp_path, photographs=str(tmp_path / "photos")))


def test_scikit_image_photographs_are_not_imported():
    if not digits.importlib.util.find_spec("skimage"):
        pytest.skip("scikit-image is not installed")
    pictures, origin = digits.find_photographs("")
    assert origin == f"{len(digits.PHOTOGRAPHS)} photographs of scikit-image"
    assert all(picture.ndim == 3 for picture in pictures)
    assert "skimage" not in sys.modules


def test_recipe_on_the_published_images(shared):
    """In flat surroundings the published digit is 255 minus the photograph."""
    folder = shared / "data" / "digits"
    images = digits.read_npz(folder / "mnist_m_test3000.npz", channels=3)["test"][0]
    mnist = digits.read_npz(folder / "mnist.npz", channels=1)["test"][0][:3000]
    ink = np.pad(mnist[..., 0] > 0, ((0, 0), (2, 2), (2, 2)))
    spread = np.array([x[~i].std(0).mean() for x, i in zip(images, ink, strict=True)])
    for row in np.argsort(spread)[:20]:
        ground = np.median(images[row][~ink[row]], axis=0)
        error = np.abs(images[row][ink[row]].astype(float) - (255 - ground)).mean()
        assert error < 4, row
