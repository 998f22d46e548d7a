"""What changes in a data set is told apart, and said."""

import dataclasses

import numpy as np

from cxai_jax.data.identity import differences, identity
from cxai_jax.data.records import Dataset, Records


def records(names, labels):
    number = len(names)
    return Records(
        images=[np.zeros((4, 4, 1), np.uint8)] * number,
        labels=np.array(labels, np.int32),
        sites=np.zeros(number, np.int32),
        patients=np.array([""] * number),
        names=np.array(names),
    )


DATASET = Dataset(
    name="ct",
    splits={
        "train": records(["a.png", "b.png"], [0, 1]),
        "test": records(["c.png", "d.png"], [0, 1]),
    },
    class_names=("COVID", "Normal"),
    site_names=("one",),
    positive=0,
    split_scheme="official",
    fingerprint="f" * 64,
)
OLD = identity(DATASET)


def changed(**fields):
    return differences(OLD, identity(dataclasses.replace(DATASET, **fields)))


def test_nothing_differs_from_itself():
    assert differences(OLD, identity(DATASET)) == ""
    assert differences({}, OLD) == ""  # An earlier version kept nothing.
    assert differences({"name": "ct", "fingerprint": "f" * 64}, OLD) == ""


def test_swapped_splits_are_seen():
    splits = {"train": DATASET.splits["test"], "test": DATASET.splits["train"]}
    assert changed(splits=splits) == (
        "test has 2 images, but not the same ones; "
        "train has 2 images, but not the same ones"
    )


def test_a_label_a_count_and_a_split_are_seen():
    train = records(["a.png", "b.png"], [0, 0])
    splits = DATASET.splits | {"train": train}
    assert changed(splits=splits) == "train has 2 images, but not the same ones"
    splits = DATASET.splits | {"train": records(["a.png"], [0])}
    assert changed(splits=splits) == "train has 2 images there and 1 here"
    splits = DATASET.splits | {"val": records(["e.png"], [0])}
    assert changed(splits=splits) == "val has no images there and 1 here"


def test_names_and_pixels_are_seen():
    assert changed(class_names=("Normal", "COVID")) == (
        "the classes are ['COVID', 'Normal'] there and ['Normal', 'COVID'] here; "
        "the positive class is 'COVID' there and 'Normal' here"
    )
    assert changed(fingerprint="0" * 64) == (
        "the pixels of some images, or their order, differ"
    )
