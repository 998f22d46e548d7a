"""Streams of a run: targets that are missing, too few, or do not fit the source."""

from types import SimpleNamespace

import numpy as np
import pytest
from small import small

from configs import digits
from cxai_jax import data
from cxai_jax.training import run as runs


@pytest.fixture
def data_dir(tmp_path):
    """MNIST and USPS of noise, 20 training and 10 test images each."""
    (tmp_path / "digits").mkdir()
    for name, side in (("mnist", 28), ("usps", 16)):
        arrays = {}
        for split, count in (("train", 20), ("test", 10)):
            arrays[f"x_{split}"] = np.zeros((count, side, side), np.uint8)
            arrays[f"y_{split}"] = np.arange(count) % 10
        np.savez(tmp_path / "digits" / f"{name}.npz", **arrays)
    return str(tmp_path)


def dann(data_dir, **changes):
    config = digits.get_config("dann,usps,tiny")
    config.data.data_dir = data_dir
    config.train.batch_size = 16
    config.update_from_flattened_dict(changes)
    return config


def refused(config) -> str:
    """What is said of the streams of a config's method."""
    run = SimpleNamespace(config=config, sources=runs.load_sources(config))
    method = SimpleNamespace(streams=("source", "target"))
    fit = runs.fit_records(run.sources, config.data.fit)
    with pytest.raises(ValueError) as error:
        runs.make_streams(run, method, fit)
    return str(error.value)


def test_a_target_that_is_not_named(data_dir):
    assert refused(dann(data_dir, **{"data.target": ""})) == (
        "config.method=dann takes unlabelled images, and config.data.target names no "
        "splits; set it, for example to usps:train"
    )


def test_a_target_that_has_no_such_split(data_dir):
    message = refused(dann(data_dir, **{"data.target": "usps:val"}))
    assert message == ("config.data.target names the split 'val'; usps has train, test")


def test_a_target_of_fewer_images_than_a_batch(data_dir):
    assert refused(dann(data_dir, **{"data.target": "usps:test"})) == (
        "config.data.target has 10 images, fewer than config.train.batch_size=16; "
        "lower it"
    )


def test_a_target_of_other_classes(data_dir):
    config = small(**{"data.target": "usps:train", "data.data_dir": data_dir})
    with pytest.raises(ValueError) as error:
        runs.load_sources(config)
    assert str(error.value).startswith(
        "config.data.target=usps:train: usps has the classes 0, 1, 2, 3, 4, 5, 6, 7, "
        "8, 9 and phantom has "
    )
    assert str(error.value).endswith("; they must be the same")


def test_a_target_of_another_number_of_channels():
    given = "config.data.target=usps:train"
    with pytest.raises(ValueError) as error:
        data.check_channels("phantom", "usps", given)
    assert str(error.value) == (
        f"{given}: images of usps have 3 channels, those of phantom 1; prepare both "
        "alike"
    )
