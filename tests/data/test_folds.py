"""Folds: disjoint patients, blocks of numbers, near equal classes, one-line errors."""

import dataclasses

import numpy as np
import pytest

from cxai_jax.data import folds, pipeline, sites, splits
from cxai_jax.data.records import SPLITS, Dataset, Records


def clustered(seed, images=400, classes=2):
    """Patients of very different sizes, most with images of one class only."""
    rng = np.random.default_rng(seed)
    patient = np.minimum(rng.geometric(0.03, images), 90)
    labels = patient % classes
    labels = np.where(
        rng.random(images) < 0.1, rng.integers(0, classes, images), labels
    )
    return np.array([f"p{i}" for i in patient]), labels


def imbalance(fold, labels, count):
    """Largest distance of a fold's class count from an equal share."""
    table = np.array(
        [
            [np.sum((fold == f) & (labels == k)) for k in set(labels)]
            for f in range(count)
        ]
    )
    return np.abs(table - table.mean(0)).max()


def scikit_folds(patients, labels, count):
    model_selection = pytest.importorskip("sklearn.model_selection")
    fold = np.empty(len(labels), int)
    splitter = model_selection.StratifiedGroupKFold(count)
    for number, (_, test) in enumerate(splitter.split(labels, labels, patients)):
        fold[test] = number
    return fold


@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("classes", [2, 3])
def test_grouped_folds_are_as_balanced_as_those_of_scikit_learn(count, classes):
    patients, labels = clustered(count, classes=classes)
    fold = splits.grouped_folds(patients, labels, count, seed=1)
    assert set(fold) == set(range(count))
    assert all(len(set(fold[patients == p])) == 1 for p in set(patients))
    theirs = scikit_folds(patients, labels, count)
    assert imbalance(fold, labels, count) <= imbalance(theirs, labels, count)


def test_grouped_folds_of_single_images_differ_by_one_image():
    labels = np.array([0, 1, 2] * 7 + [0])
    fold = splits.grouped_folds(np.full(22, ""), labels, 5)
    assert sorted(np.bincount(fold)) == [4, 4, 4, 5, 5]
    assert imbalance(fold, labels, 5) < 1
    assert (fold == splits.grouped_folds(np.full(22, ""), labels, 5)).all()
    assert (fold != splits.grouped_folds(np.full(22, ""), labels, 5, seed=1)).any()


def test_blocked_folds_are_runs_of_numbers_in_each_class():
    labels = np.repeat([0, 1], [52, 31])
    numbers = np.concatenate([np.arange(52), np.arange(31)])
    mixed = np.random.default_rng(0).permutation(83)
    fold = np.empty(83, int)
    fold[mixed] = splits.blocked_folds(numbers[mixed], labels[mixed], 5)
    assert fold[:52].tolist() == np.repeat(range(5), [11, 11, 10, 10, 10]).tolist()
    assert fold[52:].tolist() == np.repeat(range(5), [7, 6, 6, 6, 6]).tolist()
    # Another seed begins elsewhere: one run goes round the end.
    moved = splits.blocked_folds(splits.turned(numbers, labels, 3), labels, 5)[:52]
    assert np.sum(moved != np.roll(moved, 1)) == 5 and (moved != fold[:52]).any()
    with pytest.raises(ValueError, match="^32 folds of a class of 31 images; ask for"):
        splits.blocked_folds(numbers, labels, 32)


def dataset(names, labels, patients, site_names=("here",), sites_=None, pixels=None):
    """All images in `train`, as a source might have prepared them."""
    count, rng = len(labels), np.random.default_rng(0)
    noise = rng.integers(0, 256, (count, 16, 16, 1)).astype(np.uint8)
    records = Records(
        images=noise if pixels is None else pixels,
        labels=np.asarray(labels, np.int32),
        sites=np.zeros(count, np.int32) if sites_ is None else sites_,
        patients=np.asarray(patients, str),
        names=np.asarray(names, str),
    )
    return Dataset("some", {"train": records}, ("a", "b"), site_names, 1, "given", "f")


def by_patient(images=60, patients=20, **more):
    patient = np.arange(images) % patients
    names = [f"{i:03d}.png" for i in range(images)]
    return dataset(names, patient % 2, [f"p{p}" for p in patient], **more)


def test_every_image_is_tested_once_and_no_patient_is_in_two_parts():
    whole, tested, prints = by_patient(), [], set()
    for number in range(1, 6):
        found = folds.refold(whole, f"{number}of5")
        parts = [set(found.splits[s].patients) for s in SPLITS]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert [len(found.splits[s]) for s in SPLITS] == [42, 6, 12]
        assert all(set(found.splits[s].labels) == {0, 1} for s in SPLITS)
        assert found.split_scheme == f"fold {number} of 5, patient-disjoint"
        assert found.leakage["verdict"] == "clean"
        tested += found.splits["test"].names.tolist()
        prints.add(found.fingerprint)
    assert sorted(tested) == whole.splits["train"].names.tolist() and len(prints) == 5


def test_folds_do_not_depend_on_the_prepared_split():
    whole = by_patient()
    records = whole.splits["train"]
    shuffled = np.random.default_rng(1).permutation(60)
    parts = {"test": shuffled[:50], "val": shuffled[50:]}
    parts = {name: records.subset(rows) for name, rows in parts.items()}
    other = dataclasses.replace(whole, splits=parts)
    one, two = (folds.refold(d, "2of4", seed=7) for d in (whole, other))
    assert one.fingerprint == two.fingerprint
    assert one.split_scheme.endswith(", seed 7")
    assert folds.refold(whole, "2of4").fingerprint != one.fingerprint


def test_the_verdict_is_of_the_fold():
    whole = by_patient()
    images = np.array(whole.splits["train"].images)
    found = folds.refold(whole, "1of5").splits
    tested, fitted = found["test"].names[0], found["train"].names[0]
    images[int(tested[:3])] = images[int(fitted[:3])]
    leaking = folds.refold(by_patient(pixels=images), "1of5")
    assert leaking.leakage["verdict"].startswith(
        "LEAKS: 1 of 12 test images have a near duplicate in train (1 pixel-identical)"
    )
    assert leaking.leakage["pairs"]["train-test"]["shared_patients"] == 0


def test_folds_of_almost_one_size_have_one_shape_on_the_device():
    records = by_patient().splits["train"]
    for count in (41, 42):
        canvas, batch = pipeline.decode_all(
            records.subset(np.arange(count)), lambda image: image, np.inf
        )
        assert canvas == (16, 16, 1) and batch.images.shape == (64, 16, 16, 1)
        np.testing.assert_array_equal(batch.images[:count], records.images[:count])
        assert (batch.images[count:] == records.images[0]).all()
        assert batch.labels.shape == batch.valid.shape == (64,)


def site_a(count=80):
    names = [f"COVID/Covid ({i}).png" for i in range(count)]
    names += [f"non-COVID/Non-Covid ({i}).png" for i in range(count)]
    return names, np.repeat([1, 0], count)


def test_site_a_has_blocks_with_validation_beside_the_test_block():
    names, labels = site_a()
    found = folds.refold(dataset(names, labels, [""] * 160, ("site_a",)), "5of5")
    assert found.split_scheme == "fold 5 of 5, blocked"
    numbers = {
        s: sorted(sites.file_number(n) for n in found.splits[s].names if "non" in n)
        for s in SPLITS
    }
    assert numbers["test"] == list(range(64, 80)) and numbers["val"] == list(range(8))
    assert numbers["train"] == list(range(8, 64))
    assert "no patient ids" in found.leakage["verdict"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fold", range(1, 6))
def test_blocks_have_two_borders_with_train_wherever_they_begin(seed, fold):
    names, labels = site_a()
    given = dataset(names, labels, [""] * 160, ("site_a",))
    found = folds.refold(given, f"{fold}of5", seed)
    for kind in ("Covid", "Non-Covid"):
        trained = np.zeros(80, bool)
        for name in found.splits["train"].names:
            if f"/{kind} " in name:
                trained[sites.file_number(name)] = True
        assert np.sum(trained != np.roll(trained, 1)) == 2


def test_few_images_still_have_a_validation_part():
    names, labels = site_a(6)
    found = folds.refold(dataset(names, labels, [""] * 12, ("site_a",)), "1of2")
    assert [len(found.splits[s]) for s in SPLITS] == [4, 2, 6]
    found = folds.refold(by_patient(images=12, patients=8), "1of2")
    assert all(set(found.splits[s].labels) == {0, 1} for s in SPLITS)


def test_each_site_is_folded_by_its_own_rule():
    names, labels = site_a(40)
    patients = [""] * 80 + [f"p{i % 20}" for i in range(60)]
    both = dataset(
        names + [f"b{i:02d}.png" for i in range(60)],
        np.concatenate([labels, np.arange(60) % 2]),
        patients,
        ("site_a", "site_b"),
        np.repeat([0, 1], [80, 60]).astype(np.int32),
    )
    found = folds.refold(both, "1of5")
    assert found.split_scheme == (
        "fold 1 of 5, site_a: blocked, site_b: patient-disjoint"
    )
    assert np.bincount(found.splits["test"].sites).tolist() == [16, 12]


def test_images_without_patients_are_split_singly_and_labelled_so():
    whole = dataset([f"{i}.png" for i in range(40)], np.arange(40) % 2, [""] * 40)
    found = folds.refold(whole, "1of2")
    assert found.split_scheme == "fold 1 of 2, random (image-level)"
    assert len(found.splits["test"]) == 20


@pytest.mark.parametrize("name", ["6of5", "0of5", "1of1", "five", "2 of 5", "-1of5"])
def test_a_name_out_of_range_is_one_line(name):
    with pytest.raises(ValueError) as error:
        folds.refold(by_patient(), name)
    assert str(error.value) == (
        f"config.data.fold={name!r}; expected KofN with N >= 2 and K from 1 to N, such "
        "as 2of5, or nothing for the split as prepared"
    )


def test_more_folds_than_patients_and_folds_of_one_class_are_one_line():
    with pytest.raises(
        ValueError,
        match="^config.data.fold='1of21' of here: 21 folds of 20 patients; ask for",
    ):
        folds.refold(by_patient(), "1of21")
    with pytest.raises(
        ValueError,
        match="^config.data.fold='1of20' of here: its test part of 3 images lacks a "
        "class; ask for fewer folds or another config.data.split_seed$",
    ):
        folds.refold(by_patient(), "1of20")


def test_site_b_is_as_balanced_as_scikit_learn_makes_it(shared):
    plan = sites.plan_site_b(shared / "data" / "site_b")
    patients = np.array([s.patient for s in plan.sources])
    labels = np.array([s.label for s in plan.sources])
    fold = splits.grouped_folds(patients, labels, 5)
    theirs = scikit_folds(patients, labels, 5)
    assert imbalance(fold, labels, 5) <= imbalance(theirs, labels, 5)
    assert sorted(np.bincount(fold)) == [149, 149, 149, 149, 150]
