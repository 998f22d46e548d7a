"""Phantoms: deterministic, patient-disjoint, masked, and not solved by brightness."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from cxai_jax import data
from cxai_jax.data.records import concatenate


def config(images=96, resize=32, mark=""):
    return ConfigDict(
        {
            "name": "phantom",
            "data_dir": "",
            "split": "",
            "fold": "",
            "phantom_images": images,
            "resize": resize,
            "phantom_mark": mark,
        }
    )


@pytest.fixture(scope="module")
def dataset():
    return data.load(config(480, 48))


def everything(dataset):
    return concatenate(list(dataset.splits.values()))


def test_splits_are_patient_disjoint_and_balanced(dataset):
    sizes = {key: len(records) for key, records in dataset.splits.items()}
    assert sum(sizes.values()) == 480
    np.testing.assert_allclose(
        np.array(list(sizes.values())) / 480, [0.6, 0.15, 0.25], atol=0.03
    )
    homes = [set(records.patients) for records in dataset.splits.values()]
    assert sum(map(len, homes)) == len(set.union(*homes)) == 120
    for records in dataset.splits.values():
        for site in (0, 1):
            assert records.labels[records.sites == site].mean() == 0.5
    assert dataset.leakage["verdict"] == "clean"
    assert dataset.class_names[dataset.positive] == "COVID-19"


def test_images_and_masks_fit(dataset):
    records = everything(dataset)
    for i in range(0, len(records), 7):
        image, lung, lesion = (
            column[i]
            for column in (records.images, records.lung_masks, records.lesion_masks)
        )
        assert image.dtype == lung.dtype == lesion.dtype == np.uint8
        assert image.shape == (48, (51, 48)[records.sites[i]], 1)
        assert image.shape[:2] == lung.shape == lesion.shape
        assert 0.05 < lung.mean() < 0.5
        assert (lesion <= lung).all() and lung.max() == 1
        assert bool(lesion.any()) == bool(records.labels[i])


def test_opacities_are_brighter_than_the_lung_around_them(dataset):
    records = dataset.splits["train"]
    for i in np.flatnonzero(records.labels)[::5]:
        lesion, lung = records.lesion_masks[i] > 0, records.lung_masks[i] > 0
        image = records.images[i][..., 0]
        assert np.median(image[lesion]) > np.median(image[lung & ~lesion])


def test_no_brightness_threshold_solves_the_task(dataset):
    records = dataset.splits["train"]
    for statistic in (np.mean, np.median, np.max, np.std):
        value = np.array([statistic(image) for image in records.images])
        for site in (0, 1):
            v, y = value[records.sites == site], records.labels[records.sites == site]
            above = (v[None] > v[:, None]) == y[None]
            accuracy = max(above.mean(1).max(), (~above).mean(1).max())
            assert accuracy < 0.75, statistic.__name__


def test_it_is_the_same_every_time_and_changes_with_the_size():
    first, second = data.load(config()), data.load(config())
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(
        first.splits["val"].images[0], second.splits["val"].images[0]
    )
    larger = data.load(config(resize=64))
    assert larger.fingerprint != first.fingerprint
    small, large = (d.splits["train"].lung_masks[0].mean() for d in (first, larger))
    assert abs(small - large) < 0.01  # The same anatomy at another size.


def mark_agreement(records):
    """Share of images whose burnt-in mark agrees with the label."""
    marked = np.array(
        [np.sum(image[: len(image) // 4] == 255) > 5 for image in records.images]
    )
    return np.mean(marked == records.labels)


def test_the_mark_is_a_shortcut_in_training_only():
    plain = data.load(config(480, 48))
    assert 0.35 < mark_agreement(everything(plain)) < 0.65
    shortcut = data.load(config(480, 48, "1.0"))
    assert mark_agreement(shortcut.splits["train"]) == 1
    assert mark_agreement(shortcut.splits["val"]) == 1
    assert 0.3 < mark_agreement(shortcut.splits["test"]) < 0.7
    strong = data.load(config(480, 48, "0.9"))
    assert 0.82 < mark_agreement(strong.splits["train"]) < 0.97
    # The mark changes nothing but its own pixels, and none of a lung.
    a, b = plain.splits["train"], shortcut.splits["train"]
    for i in range(20):
        changed = (a.images[i] != b.images[i])[..., 0]
        assert not (changed & (a.lung_masks[i] > 0)).any()


@pytest.mark.parametrize("images", [12, 31, 100])
def test_small_sets_still_fill_every_split(images):
    dataset = data.load(config(images, 16))
    assert set(dataset.splits) == {"train", "val", "test"}
    assert sum(len(records) for records in dataset.splits.values()) == images
    for records in dataset.splits.values():
        assert set(records.labels) == {0, 1}


@pytest.mark.parametrize(
    "bad,message",
    [
        (config(images=8), "phantom_images=8 must be at least 12"),
        (config(resize=8), "resize=8 must be at least 16"),
        (config(mark="often"), "phantom_mark='often' must be"),
        (config(mark="1.5"), "phantom_mark='1.5' must be"),
    ],
)
def test_errors_name_the_field(bad, message):
    with pytest.raises(ValueError, match=message):
        data.load(bad)


def test_unknown_names_list_the_known_ones():
    bad = config()
    bad.name = "phantoms"
    with pytest.raises(ValueError, match="known: phantom, site_a, site_b, joint"):
        data.load(bad)
    bad.name = "phantom:x"
    with pytest.raises(ValueError, match="config.data.name is 'phantom:x'; known"):
        data.load(bad)
