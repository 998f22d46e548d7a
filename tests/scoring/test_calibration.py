"""Temperature, operating points and conformal sets against independent values."""

import numpy as np
import pytest

from cxai_jax.scoring import calibration


def drawn(n=4000, scale=1.0, seed=0):
    """Logits whose softmax is the true class distribution, times `scale`."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, 3)) * 1.5
    probs = calibration.softmax(logits)
    labels = (random.random((n, 1)) > probs.cumsum(1)).sum(1)
    return logits * scale, labels


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_temperature_recovers_a_known_scale(scale):
    assert calibration.fit_temperature(*drawn(scale=scale)) == pytest.approx(
        scale, rel=0.08
    )


def test_temperature_is_the_minimum_of_the_cross_entropy():
    logits, labels = drawn(300, 2.0)

    def loss(t):
        probs = calibration.softmax(logits / t)
        return -np.log(probs[np.arange(len(labels)), labels]).mean()

    best = calibration.fit_temperature(logits, labels)
    assert loss(best) <= min(loss(best * 1.02), loss(best / 1.02))


def test_separable_data_stay_in_bounds():
    logits = np.array([[5.0, -5.0], [-5.0, 5.0]])
    right = calibration.fit_temperature(logits, np.array([0, 1]))
    wrong = calibration.fit_temperature(logits, np.array([1, 0]))
    assert 0.0499 <= right < 1
    assert wrong == pytest.approx(20)


def test_non_finite_logits_are_refused():
    with pytest.raises(ValueError, match="finite logits"):
        calibration.fit_temperature(np.full((2, 2), np.nan), np.array([0, 1]))


def test_conformal_sets_cover():
    logits, labels = drawn(2000, seed=1)
    new_logits, new_labels = drawn(2000, seed=2)
    for coverage in (0.8, 0.9, 0.95):
        quantile = calibration.conformal_quantile(
            calibration.softmax(logits), labels, coverage
        )
        sets = calibration.conformal_sets(calibration.softmax(new_logits), quantile)
        covered = sets[np.arange(2000), new_labels].mean()
        assert covered == pytest.approx(coverage, abs=0.025)


def test_too_few_images_give_full_sets():
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert calibration.conformal_quantile(probs, np.array([0, 1]), 0.95) == 1.0


def test_measure_reports_test_values_of_held_out_thresholds():
    held_out, test = drawn(3000, 2.5, seed=3), drawn(3000, 2.5, seed=4)
    fitted = calibration.fit(*held_out, positive=1)
    result = calibration.measure(fitted, *test, positive=1)
    assert result["temperature"] == pytest.approx(2.5, rel=0.1)
    assert result["ece_after"] < 0.03 < result["ece_before"]
    for point in result["operating_points"]:
        (wanted,) = (key for key in point if key.endswith("_wanted"))
        found = point[wanted.removesuffix("_wanted")]
        assert found == pytest.approx(point[wanted], abs=0.03)
        assert 0 < point["sensitivity"] < 1 and 0 < point["specificity"] < 1
    for row in result["conformal"]:
        assert row["coverage"] == pytest.approx(row["coverage_wanted"], abs=0.03)
    again = calibration.measure(result, *drawn(50, 1.0, seed=5), positive=1)
    assert again["temperature"] == fitted["temperature"]
    for one, other in zip(
        fitted["operating_points"], again["operating_points"], strict=True
    ):
        assert one["threshold"] == other["threshold"]
    assert [row["quantile"] for row in again["conformal"]] == [
        row["quantile"] for row in fitted["conformal"]
    ]


def test_what_cannot_be_attained_is_null_and_not_infinity():
    logits = np.array([[0.0, 5.0], [0.0, 5.0], [0.0, 1.0], [0.0, 1.0]])
    labels = np.array([0, 0, 1, 1])  # Every healthy image above every sick one.
    fitted = calibration.fit(logits, labels, positive=1)
    points = fitted["operating_points"]
    assert [p["threshold"] is None for p in points] == [True, True, False, False]
    found = calibration.measure(fitted, logits, labels, positive=1)
    assert found["operating_points"][0] == {
        "specificity_wanted": 0.9,
        "threshold": None,
        "specificity": None,
        "sensitivity": None,
    }
    one_class = calibration.fit(logits[:2], labels[:2], positive=1)
    assert all(p["threshold"] is None for p in one_class["operating_points"])
    sets = found["conformal"][0]
    rest = 1 - sets["single_class_share"] - sets["empty_share"]
    assert sets["mean_set_size"] == pytest.approx(sets["single_class_share"] + 2 * rest)
