"""A walk: a colour data set of three classes is one file and one line in `DATASETS`."""

import numpy as np
import pytest
from PIL import Image

from configs import demo
from cxai_jax import data
from cxai_jax.data import prepare, store
from cxai_jax.data.plan import Plan, Source
from cxai_jax.data.records import DatasetSpec
from cxai_jax.training import loop

NAMES = ("red", "green", "blue")
COUNT = {"train": 8, "val": 2, "test": 4}  # Images of each class.


# What cxai_jax/data/tints.py would hold.


def load(data_config):
    return store.load("tints", "given", data_config.data_dir)


def plan(source):
    """Reads `source/SPLIT-CLASS-NUMBER.png`."""
    files = sorted(source.glob("*.png"))
    words = [file.stem.split("-") for file in files]
    return Plan(
        name="tints",
        split="given",
        split_scheme="given",
        class_names=NAMES,
        site_names=("tints",),
        positive=0,
        sources=[
            Source(file, file.name, NAMES.index(name), split)
            for file, (split, name, _) in zip(files, words, strict=True)
        ],
    )


SPEC = DatasetSpec(load, plan, channels=3, side=None)


@pytest.fixture(scope="module")
def tints(tmp_path_factory):
    """The folder of the prepared data, with the one line in `DATASETS`."""
    root = tmp_path_factory.mktemp("tints")
    random = np.random.default_rng(0)
    for split, count in COUNT.items():
        for channel, name in enumerate(NAMES):
            for i in range(count):
                pixels = random.integers(0, 120, (28, 30, 3), np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(root / f"{split}-{name}-{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "tints", SPEC)
        command = ["--dataset=tints", f"--data_dir={root / 'data'}"]
        assert prepare.main([*command, f"--source={root}"]) == 0
        yield root


def config_of(root):
    config = demo.get_config("full")
    config.data.name = "tints"
    config.data.data_dir = str(root / "data")
    config.data.image_size = 28
    config.data.resize = 32
    config.train.batch_size = 8
    config.train.epochs = 1.0
    config.eval.batch_size = 4
    config.eval.bootstrap = 20
    config.tta.k = 2
    return config


def test_colour_is_stored_as_it_is(tints):
    dataset = data.load(config_of(tints).data)
    assert dataset.class_names == NAMES
    for split, records in dataset.splits.items():
        assert len(records) == 3 * COUNT[split]
        for image, name, label in zip(
            records.images, records.names, records.labels, strict=True
        ):
            source = np.asarray(Image.open(tints / name))
            np.testing.assert_array_equal(image, source)
            assert image.shape == (28, 30, 3) and name.split("-")[1] == NAMES[label]


def test_three_colours_train_and_are_scored(tints, tmp_path):
    results = loop.train(config_of(tints), tmp_path)
    assert results["data"]["class_names"] == list(NAMES)
    with np.load(tmp_path / "predictions_test.npz") as predictions:
        assert predictions["probs"].shape == (12, 3, 3)
    assert (tmp_path / "report.html").exists()


def test_options_that_a_plan_does_not_take_are_refused(tints, capsys):
    command = ["--dataset=tints", f"--source={tints}", f"--data_dir={tints / 'data'}"]
    for option, owners in (
        ("split", "site_a, site_b, cxr, covidx_ct, folder"),
        ("split_files", "site_a, site_b"),
        ("name", "folder"),
    ):
        assert prepare.main([*command, f"--{option}=x"]) == 2
        message = capsys.readouterr().err
        assert f"--{option} belongs to --dataset={owners}, not tints" in message


def test_every_data_set_is_declared():
    for name, spec in data.DATASETS.items():
        assert data.spec_of(name) is spec
        assert spec.channels in (1, 3) and callable(spec.load)
    stored = {name for name, spec in data.DATASETS.items() if spec.plan} - {"tints"}
    assert stored == {"site_a", "site_b", "cxr", "covidx_ct", "folder"}
    for name in stored:
        assert data.DATASETS[name][2:] == (1, 256)


def test_gray_beside_colour_is_refused():
    data.check_channels("site_a", "folder:b", "--on=folder:b")
    with pytest.raises(ValueError) as error:
        data.check_channels("mnist", "site_a", "config.data.test=site_a:test")
    assert str(error.value) == (
        "config.data.test=site_a:test: images of site_a have 1 channels, those of "
        "mnist 3; prepare both alike"
    )
