"""What tells a foreign image by the network's features."""

import numpy as np
import pytest

from cxai_jax.data import novelty, transforms
from cxai_jax.data.records import Records
from cxai_jax.inference import external


def test_the_distance_is_that_to_the_fifth_neighbour():
    random = np.random.default_rng(0)
    reference = novelty.directions(random.normal(size=(40, 6)))
    features = novelty.directions(random.normal(size=(7, 6)))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
    every = np.linalg.norm(features[:, None] - reference[None], axis=2)
    expected = np.sort(every, axis=1)[:, novelty.NEIGHBOURS - 1]
    found = novelty.neighbour_distance(features, reference)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    own = np.linalg.norm(reference[:, None] - reference[None], axis=2)
    without = np.sort(own, axis=1)[:, novelty.NEIGHBOURS]  # The first is itself.
    found = novelty.neighbour_distance(reference, reference, itself=True)
    np.testing.assert_allclose(found, without, rtol=1e-4)


@pytest.mark.parametrize("held_out", [True, False])
def test_foreign_images_are_told_and_own_ones_are_not(held_out, tmp_path):
    random = np.random.default_rng(1)
    centre, other = np.zeros(16), np.zeros(16)
    centre[0], other[1] = 5, 5
    train, val, new = (centre + random.normal(size=(n, 16)) for n in (200, 100, 300))
    described = novelty.describe_features(train, val if held_out else None)
    novelty.save_features(tmp_path, described)
    known = novelty.load_features(tmp_path)
    flagged = np.mean([bool(one) for one in novelty.foreign(new, known)])
    assert flagged < 0.15
    strange = other + random.normal(size=(50, 16))
    told = novelty.foreign(strange, known)
    assert np.mean([one.startswith(novelty.FOREIGN) for one in told]) > 0.95


def test_of_few_images_the_farthest_neighbour_counts_and_zeros_are_finite():
    described = novelty.describe_features(np.eye(3), np.zeros((2, 3)))
    assert described["threshold"] == pytest.approx(2**0.5)  # Of no direction at all.
    known = {"reference": np.eye(3, dtype=np.float32), "threshold": 1.5}
    assert novelty.foreign(np.zeros((1, 3)), known) == [""]


def test_a_missing_or_damaged_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="--mode=eval to write it"):
        novelty.load_features(tmp_path)
    (tmp_path / novelty.FEATURES).write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match="is damaged.*--mode=eval"):
        novelty.load_features(tmp_path)
    np.savez(tmp_path / novelty.FEATURES, reference=np.ones(3), threshold=1.0)
    with pytest.raises(ValueError, match="is damaged"):
        novelty.load_features(tmp_path)


def as_records(images):
    rows = np.zeros(len(images), np.int32)
    names = np.array([f"{i}.png" for i in range(len(images))])
    return Records(images, rows, rows, np.full(len(images), ""), names)


def test_colour_images_are_described_by_their_luma():
    random = np.random.default_rng(2)
    colour = [random.integers(0, 256, (40, 60, 3), np.uint8) for _ in range(3)]
    gray = [transforms.to_gray(image) for image in colour]
    described = novelty.describe(as_records(colour))
    assert described == novelty.describe(as_records(gray))
    means = [image.mean() for image in gray]
    np.testing.assert_allclose(
        described["ranges"]["brightness"], [min(means), max(means)]
    )
    deviations = [image.std() for image in gray]
    np.testing.assert_allclose(
        described["ranges"]["contrast"], [min(deviations), max(deviations)]
    )
    packed = [bytes.fromhex(one) for one in described["difference_hashes"]]
    hashes = np.frombuffer(b"".join(packed), np.uint8).reshape(3, -1)
    known = described | {"difference_hashes": hashes}
    found = external.overlap(as_records(colour), known, 32)
    assert found["seen_in_training"] == 3 and not found["flags"]
