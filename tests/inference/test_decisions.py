"""Calibrated probabilities, operating points, prediction sets and "inconclusive"."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from ml_collections import ConfigDict

from cxai_jax.inference import decisions, shown_maps
from cxai_jax.mesh import make_mesh
from cxai_jax.scoring import calibration

NAMES = ["healthy", "sick"]


def results(**fitted):
    return {"data": {"positive": "sick"}, "calibration": fitted}


@pytest.fixture(scope="module")
def fitted():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400)
    logits = random.normal(size=(400, 2)) + 1.5 * np.eye(2)[labels]
    return results(**calibration.fit(3 * logits, labels, positive=1))


def test_the_calibrated_probability_divides_the_logits(fitted):
    rule = decisions.make_rule(fitted, "")
    logits = np.array([[1.0, 3.0], [0.0, -5.0]])
    probs = decisions.calibrated(rule, calibration.softmax(logits))
    expected = calibration.softmax(logits / fitted["calibration"]["temperature"])
    np.testing.assert_allclose(probs, expected)
    certain = decisions.calibrated(rule, np.array([[0.0, 1.0]], np.float32))
    assert np.isfinite(certain).all() and certain[0, 1] > 0.99


@pytest.mark.parametrize("point", decisions.POINTS)
def test_an_operating_point_is_a_threshold_on_the_positive_class(fitted, point):
    threshold = decisions.make_rule(fitted, point).threshold
    (row,) = [
        row
        for row in fitted["calibration"]["operating_points"]
        if row.get(
            {"spec": "specificity", "sens": "sensitivity"}[point[:4]] + "_wanted"
        )
        == int(point[4:]) / 100
    ]
    assert threshold == row["threshold"]
    rule = decisions.Rule(1.0, None, threshold, "")
    for shift, name in ((1e-6, "sick"), (-1e-6, "healthy")):
        p = threshold + shift
        found = decisions.decide(rule, np.array([1 - p, p]), 0, 1, NAMES)
        assert found == (name, None)


def test_sensitivity_points_keep_the_wanted_share_of_positives():
    scores = np.linspace(0.05, 0.95, 19)
    logits = np.stack([np.log(1 - scores), np.log(scores)], 1)
    labels = (np.arange(19) >= 9).astype(int)  # Ten positives, 0.5 to 0.95.
    found = calibration.fit(logits, labels, positive=1)
    points = {
        row["sensitivity_wanted"]: row["threshold"]
        for row in found["operating_points"]
        if "sensitivity_wanted" in row
    }
    probs = calibration.softmax(logits / found["temperature"])[:, 1]
    for wanted, threshold in points.items():
        assert (probs[labels == 1] >= threshold).mean() == pytest.approx(
            np.ceil(10 * wanted) / 10
        )


@pytest.mark.parametrize(
    "probs, decision, candidates",
    [
        ([0.02, 0.98], "sick", ["sick"]),
        ([0.5, 0.5], "inconclusive", []),
        ([0.97, 0.03], "healthy", ["healthy"]),
    ],
)
def test_a_set_without_exactly_one_class_is_inconclusive(probs, decision, candidates):
    rule = decisions.Rule(1.0, 0.1, None, "")
    label = int(np.argmax(probs))
    found = decisions.decide(rule, np.array(probs), label, 1, NAMES)
    assert found == (decision, candidates)
    wide = decisions.Rule(1.0, 1.0, None, "")
    assert decisions.decide(wide, np.array(probs), label, 1, NAMES) == (
        "inconclusive",
        NAMES,
    )


@pytest.mark.parametrize(
    "fitted, point, message",
    [
        ({}, "spec90", "held out no validation images.*config.data.fit=train"),
        ({}, "spec80", "--operating_point=spec80 is unknown; give one of spec90"),
        ({}, "1.5", "a threshold between 0 and 1"),
        ({"operating_points": [], "held_out": 9}, "sens95", "an earlier version"),
        (
            {
                "operating_points": [{"specificity_wanted": 0.9, "threshold": None}],
                "held_out": 9,
            },
            "spec90",
            "not attainable: on the run's 9 validation images",
        ),
    ],
)
def test_a_point_that_a_run_does_not_have_is_one_line(fitted, point, message):
    with pytest.raises(ValueError, match=message):
        decisions.make_rule(results(**fitted), point)


def test_a_run_without_calibration_still_takes_a_threshold():
    rule = decisions.make_rule(results(), "0.3")
    assert (rule.temperature, rule.quantile, rule.threshold) == (None, None, 0.3)
    probs = np.array([[0.65, 0.35]])
    np.testing.assert_array_equal(decisions.calibrated(rule, probs), probs)
    assert decisions.decide(rule, probs[0], 0, 1, NAMES) == ("sick", None)
    assert "raw" in rule.text and "30.0 %" in rule.text


class Out(NamedTuple):
    """Of a network that ends before there is a stage before the last."""

    lower: None = None


def test_a_map_that_the_network_cannot_give_is_named():
    config = ConfigDict(
        {
            "data": {"image_size": 8},
            "tta": {"patch": 4},
            "model": {"name": "lenet"},
        }
    )
    network = SimpleNamespace(apply=lambda v, x, mode, site: (x.mean((1, 2)), Out()))
    trained = SimpleNamespace(config=config, model=network, variables={})
    for kind in ("gradcam", "hirescam"):
        with pytest.raises(ValueError) as told:
            shown_maps.make_maps(trained, kind, 2, make_mesh())
        assert str(told.value) == (
            f"--map={kind} needs the stage before the last, and the network of this "
            "run, lenet, gives none; take one of cam, gradient, occlusion"
        )
