"""Which evaluation is the best, when a run stops, what class weights mean."""

import numpy as np
import pytest
from small import small

from cxai_jax.training import selection
from cxai_jax.training.run import class_weights


def curve(*values):
    return [{"step": i, "val": {"auc": v}} for i, v in enumerate(values)]


@pytest.mark.parametrize(
    "values,gained,stale",
    [
        ((0.5,), True, 0),
        ((0.5, 0.6), True, 0),
        ((0.6, 0.6), False, 1),
        ((0.6, 0.5, 0.55), False, 2),
        ((float("nan"), 0.2), True, 0),
        ((0.2, float("nan")), False, 1),
    ],
)
def test_gains_and_evaluations_without_one(values, gained, stale):
    assert selection.gained(curve(*values), "auc") == gained
    assert selection.stale(curve(*values), "auc") == stale


def test_patience_counts_from_the_best_and_0_never_stops():
    config = small(**{"train.patience": 2, "train.select_metric": "auc"})
    assert not selection.stopped(config, [])
    assert not selection.stopped(config, curve(0.6, 0.5))
    assert selection.stopped(config, curve(0.6, 0.5, 0.5))
    config.train.patience = 0
    assert not selection.stopped(config, curve(0.6, 0.5, 0.5))


@pytest.mark.parametrize("given", ["auto", "1,3", "(2, 6)", "[1,3]", "[1, 3,]"])
def test_the_mean_weight_over_the_images_is_1(given):
    labels = np.array([0] * 9 + [1] * 3)
    weights = np.array(list(map(float, class_weights(given, labels, 2).split(","))))
    assert weights[labels].mean() == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(3)
    assert class_weights("none", labels, 2) == "none"


def test_weights_that_do_not_fit_the_data_are_refused():
    labels = np.array([0, 0, 1])
    message = "config.train.class_weights='1,2,3' has 3 weights and the data 2 classes"
    with pytest.raises(ValueError, match=message):
        class_weights("1,2,3", labels, 2)
    with pytest.raises(ValueError, match="is 0 for every training image"):
        class_weights("0,0,1", labels, 3)
