"""Split functions: disjoint, complete, balanced, reproducible."""

import numpy as np
import pytest

from cxai_jax.data import splits


def shares(split, labels):
    """[class, split] share of the images."""
    return np.array(
        [
            [np.mean(split[labels == k] == name) for name in splits.FRACTIONS]
            for k in np.unique(labels)
        ]
    )


@pytest.mark.parametrize("total", range(0, 12))
def test_counts_add_up_and_serve_test_before_val(total):
    sizes = splits.counts(total)
    assert sum(sizes.values()) == total and min(sizes.values()) >= 0
    assert sizes["test"] >= (total >= 2) and sizes["val"] >= (total >= 3)
    assert sizes["train"] >= (total >= 1)


def test_blocked_is_contiguous_complete_and_balanced():
    labels = np.repeat([0, 1], [300, 200])
    numbers = np.concatenate([np.arange(300), np.arange(200)])
    shuffle = np.random.default_rng(0).permutation(500)
    split = splits.blocked(numbers[shuffle], labels[shuffle])
    np.testing.assert_allclose(
        shares(split, labels[shuffle]), [[0.65, 0.1, 0.25]] * 2, atol=0.02
    )
    for k in (0, 1):
        members = np.flatnonzero(labels[shuffle] == k)
        ordered = split[members[np.argsort(numbers[shuffle][members])]]
        assert np.sum(ordered[1:] != ordered[:-1]) == 8  # 3 runs of 3 parts.


def test_blocked_handles_classes_of_a_few_images():
    split = splits.blocked(np.arange(4), np.array([0, 1, 1, 1]))
    assert split.tolist() == ["train", "train", "val", "test"]


def test_random_is_stratified_and_depends_on_the_seed():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 60, 40]))
    split = splits.random_stratified(labels, seed=1)
    np.testing.assert_allclose(
        shares(split, labels), [[0.65, 0.1, 0.25]] * 3, atol=0.02
    )
    assert (split == splits.random_stratified(labels, seed=1)).all()
    assert (split != splits.random_stratified(labels, seed=2)).any()
    # Neighbours are separated, which is the point of the label "image-level".
    assert np.mean(split[1:] != split[:-1]) > 0.3


def test_patients_are_disjoint_and_classes_balanced():
    rng = np.random.default_rng(0)
    patient = rng.integers(0, 120, 1000)
    labels = (patient % 3 == 0).astype(int)
    patients = np.array([f"p{i}" for i in patient])
    split = splits.patient_disjoint(patients, labels, seed=3)
    homes = {p: set(split[patients == p]) for p in patients}
    assert all(len(home) == 1 for home in homes.values())
    np.testing.assert_allclose(
        shares(split, labels), [[0.65, 0.1, 0.25]] * 2, atol=0.04
    )
    again = splits.patient_disjoint(patients, labels, seed=3)
    assert (split == again).all()
    assert (split != splits.patient_disjoint(patients, labels, seed=4)).any()


def test_patients_with_images_of_both_classes_stay_whole():
    patients = np.repeat([f"p{i}" for i in range(40)], 2)
    split = splits.patient_disjoint(patients, np.tile([0, 1], 40))
    assert (split[::2] == split[1::2]).all()
    assert set(split) == {"train", "val", "test"}


def test_unknown_patients_are_spread_singly():
    split = splits.patient_disjoint(np.full(100, ""), np.zeros(100, int))
    assert {name: int(np.sum(split == name)) for name in splits.FRACTIONS} == {
        "train": 65,
        "val": 10,
        "test": 25,
    }
