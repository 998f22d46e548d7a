"""The leakage verdict finds what was planted, and nothing else."""

import json

import numpy as np
import pytest

from cxai_jax.data import leakage


def noise(count, seed=0):
    shape = (count, leakage.SIDE, leakage.SIDE)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def examine(splits, thumbnails, patients=None, labels=None, files=None):
    n = len(splits)
    return leakage.examine(
        splits,
        [f"{i}.png" for i in range(n)],
        labels or [0] * n,
        patients or [f"p{i}" for i in range(n)],
        files or [f"file{i}" for i in range(n)],
        [leakage.pixel_digest(t[..., None]) for t in thumbnails],
        thumbnails,
    )


def test_unrelated_images_are_clean():
    found = examine(["train"] * 4 + ["val", "test"], noise(6))
    assert found["verdict"] == "clean"
    assert set(found["pairs"]) == {"train-val", "train-test", "val-test"}
    json.dumps(found)


def test_planted_duplicates_are_counted():
    thumbnails = noise(8)
    thumbnails[5] = thumbnails[1]  # Same pixels, test against train.
    faint = thumbnails[2] // 2 + np.arange(leakage.SIDE, dtype=np.uint8) // 8
    thumbnails[6] = faint  # Darker, with a gradient: only the correlation finds it.
    files = [f"file{i}" for i in range(8)]
    files[5] = files[1]
    found = examine(["train"] * 4 + ["val"] + ["test"] * 3, thumbnails, files=files)
    pair = found["pairs"]["train-test"]
    assert pair["byte_duplicates"] == pair["pixel_duplicates"] == 1
    assert pair["near_duplicates"] == 2
    assert pair["examples"]["near_duplicates"] == [
        ["1.png", "5.png"],
        ["2.png", "6.png"],
    ]
    assert found["pairs"]["train-val"]["near_duplicates"] == 0
    assert found["verdict"] == (
        "LEAKS: 2 of 3 test images have a near duplicate in train (1 pixel-identical)"
    )


def test_duplicates_inside_one_split_are_no_leak_but_conflicts_are_told():
    thumbnails = noise(4)
    thumbnails[1] = thumbnails[0]
    found = examine(["train"] * 3 + ["test"], thumbnails, labels=[0, 1, 0, 0])
    assert found["conflicting_labels"] == {
        "groups": 1,
        "examples": [["0.png", "1.png"]],
    }
    assert found["verdict"] == "1 groups of equal images have conflicting labels"


def test_near_duplicates_with_the_other_label_are_told():
    thumbnails = noise(2)
    thumbnails[1] = thumbnails[0] // 2
    found = examine(["train", "test"], thumbnails, labels=[0, 1])
    assert found["pairs"]["train-test"]["near_duplicates_with_other_label"] == 1
    assert "with the other label" in found["verdict"]


@pytest.mark.parametrize(
    "patients,verdict",
    [
        (["a", "b", "a"], "LEAKS: 1 patients are in both train and test"),
        (["", "", ""], "no patient ids: shared patients cannot be ruled out"),
        (["a", "", "b"], "1 of 3 images have no patient id"),
    ],
)
def test_patients(patients, verdict):
    found = examine(["train", "train", "test"], noise(3), patients=patients)
    assert found["verdict"] == verdict


def test_correlation_matches_float64_and_chunks_do_not_matter(monkeypatch):
    first, second = noise(7, 1), noise(5, 2)
    blend = 0.8 * first[3] + 0.2 * second[4]
    second[4] = blend.round().astype(np.uint8)
    r = np.corrcoef(first.reshape(7, -1), second.reshape(5, -1))[:7, 7:]
    expected = np.argwhere(r > 0.9)
    assert len(expected) == 1
    for chunk in (2, 100):
        monkeypatch.setattr(leakage, "CHUNK", chunk)
        pairs, best = leakage.near_pairs(first, second, 0.9)
        np.testing.assert_array_equal(pairs, expected)
        assert best.argmax() == 4 and (best <= r.max(0) + 1e-5).all()
        np.testing.assert_allclose(best[4], r[:, 4].max(), atol=1e-5)


def smooth(count, cells, seed):
    """Thumbnails of few details, as pictures of bodies are: uint8 [count, 64, 64]."""
    coarse = np.random.default_rng(seed).integers(0, 255, (count, cells, cells))
    places = np.linspace(0, cells - 1, leakage.SIDE)
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(cells)))
    return np.round(weights @ coarse @ weights.T).astype(np.uint8)


@pytest.mark.parametrize("cells", [2, 5, 24])
@pytest.mark.parametrize("few", [0, 50, 10**9])
def test_no_pair_is_ruled_out_wrongly(cells, few, monkeypatch):
    monkeypatch.setattr(leakage, "CHUNK", 16)
    monkeypatch.setattr(leakage, "FEW", few)
    first, second = smooth(60, cells, 3), smooth(50, cells, 4)
    second[7] = 0.9 * first[11]
    r = np.corrcoef(first.reshape(60, -1), second.reshape(50, -1))[:60, 60:]
    pairs, best = leakage.near_pairs(first, second)
    expected = np.argwhere(r > leakage.THRESHOLD)
    assert sorted(pairs.tolist()) == expected.tolist() and [11, 7] in pairs.tolist()
    np.testing.assert_array_equal(best > leakage.SIMILAR, r.max(0) > leakage.SIMILAR)
    rows, columns = leakage._standardise(first), leakage._standardise(second)
    bounds = leakage._bounds(rows) @ leakage._bounds(columns).T
    assert (bounds >= r - 1e-5).all()
    if cells == 5:  # The point of it: most pairs need no product of whole thumbnails.
        assert np.mean(bounds > leakage.SIMILAR - 1e-4) < 0.05


def test_constant_images_correlate_with_nothing_but_equal_pixels_count():
    flat = np.full((3, leakage.SIDE, leakage.SIDE), 9, np.uint8)
    flat[2] = 200
    found = examine(["train", "test", "test"], flat)["pairs"]["train-test"]
    assert found["near_duplicates"] == found["pixel_duplicates"] == 1


def test_thumbnail_and_digests_tell_shape_and_colour():
    image = noise(1)[0][..., None]
    assert leakage.thumbnail(image).shape == (leakage.SIDE, leakage.SIDE)
    np.testing.assert_array_equal(
        leakage.thumbnail(np.repeat(image, 3, -1)), leakage.thumbnail(image)
    )
    assert leakage.pixel_digest(image) != leakage.pixel_digest(
        image.reshape(32, 128, 1)
    )
