"""Scores against hand counts, scikit-learn and properties of the bootstrap."""

import warnings

import numpy as np
import pytest

from cxai_jax.scoring import metrics


def some_predictions(count=60, classes=2, seed=0):
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.ones(classes), count).round(1) + 0.1  # With ties.
    probs /= probs.sum(1, keepdims=True)
    return random.integers(0, classes, count), probs


def test_scores_of_a_case_counted_by_hand():
    labels = np.array([1, 1, 1, 0, 0])
    p = np.array([0.9, 0.8, 0.3, 0.6, 0.1])
    scores = metrics.classification_metrics(labels, np.stack([1 - p, p], 1))
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["precision"] == pytest.approx(2 / 3)
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["specificity"] == pytest.approx(1 / 2)
    assert scores["auc"] == pytest.approx(5 / 6)  # One of six pairs is out of order.
    squares = 0.1**2 + 0.2**2 + 0.7**2 + 0.6**2 + 0.1**2
    assert scores["brier"] == pytest.approx(2 * squares / 5)
    gaps = (1 - 0.9) * 2, 0.2, -0.7, -0.6  # Bins: .9 twice, .8, .7, .6.
    assert scores["ece"] == pytest.approx(sum(map(abs, gaps)) / 5)


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_equal_scikit_learn(classes):
    oracle = pytest.importorskip("sklearn.metrics")
    labels, probs = some_predictions(classes=classes)
    predicted = probs.argmax(1)
    for positive in range(classes):
        scores = metrics.classification_metrics(labels, probs, positive=positive)
        p, r, f, _ = oracle.precision_recall_fscore_support(labels, predicted)
        assert scores["precision"] == pytest.approx(p[positive])
        assert scores["recall"] == pytest.approx(r[positive])
        assert scores["f1"] == pytest.approx(f[positive])
        assert scores["macro_f1"] == pytest.approx(f.mean())
        rest = oracle.recall_score(labels != positive, predicted != positive)
        assert scores["specificity"] == pytest.approx(rest)
        area = oracle.roc_auc_score(labels == positive, probs[:, positive])
        assert scores["auc"] == pytest.approx(area)
        area = oracle.average_precision_score(labels == positive, probs[:, positive])
        assert scores["auprc"] == pytest.approx(area)
        balanced = oracle.balanced_accuracy_score(labels, predicted)
        assert scores["balanced_accuracy"] == pytest.approx(balanced)
        for c in range(classes) if classes > 2 else ():
            assert scores[f"recall_{c}"] == pytest.approx(r[c])
            assert scores[f"precision_{c}"] == pytest.approx(p[c])
    assert scores["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predicted))
    counts = metrics.confusion(labels, predicted, classes)
    np.testing.assert_array_equal(counts, oracle.confusion_matrix(labels, predicted))
    if classes == 3:
        area = oracle.roc_auc_score(labels, probs, multi_class="ovr")
        assert scores["macro_auc"] == pytest.approx(area)
    else:
        half = oracle.brier_score_loss(labels, probs[:, 1])
        assert scores["brier"] == pytest.approx(2 * half)


def test_auc_counts_ties_as_half_and_follows_order_only():
    labels = np.array([0, 1, 0, 1, 1])
    scores = np.array([0.2, 0.2, 0.5, 0.5, 0.9])
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in (0.2, 0.5)]
    assert metrics.auc(labels == 1, scores) == pytest.approx(np.mean(pairs))
    assert metrics.auc(labels == 1, scores**3) == pytest.approx(np.mean(pairs))
    assert metrics.auc(labels == 0, scores) == pytest.approx(1 - np.mean(pairs))


def test_zero_over_zero_is_zero_and_warns():
    probs = np.array([[0.9, 0.1], [0.8, 0.2]])
    with pytest.warns(UserWarning, match="never predicted; 0/0 is taken as 0"):
        scores = metrics.classification_metrics(np.array([0, 1]), probs)
    assert scores["precision"] == scores["recall"] == scores["f1"] == 0


def test_auc_of_one_class_is_nan_and_warns():
    with pytest.warns(UserWarning, match="only one class is present"):
        scores = metrics.classification_metrics(
            np.array([1, 1]), np.array([[0.1, 0.9], [0.2, 0.8]])
        )
    assert np.isnan(scores["auc"])
    assert scores["accuracy"] == 1


@pytest.mark.parametrize(
    ("labels", "probs", "message"),
    [
        ([0, 2], [[0.5, 0.5]] * 2, "go up to 2 but probs has 2 classes"),
        ([0, -1], [[0.5, 0.5]] * 2, "whole numbers from 0"),
        ([0.0, 1.0], [[0.5, 0.5]] * 2, "whole numbers"),
        ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], "NaN or infinite value, first in row 1"),
        ([0, 1], [[2.0, -1.0]] * 2, "apply a softmax to logits"),
        ([0, 1, 1], [[0.5, 0.5]] * 2, r"labels \(3,\) and probs \(2, 2\) disagree"),
        ([], np.zeros((0, 2)), "no predictions to score"),
    ],
)
def test_bad_predictions_are_refused(labels, probs, message):
    with pytest.raises(ValueError, match=message):
        metrics.classification_metrics(np.array(labels), np.array(probs))


def test_a_positive_class_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"positive is 2, expected a class 0..1"):
        metrics.classification_metrics(*some_predictions(), positive=2)


def test_sensitivity_at_a_specificity_is_the_best_allowed_threshold():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    scores = np.array([0.1, 0.2, 0.3, 0.6, 0.25, 0.5, 0.7, 0.9])
    find = metrics.sensitivity_at_specificity
    assert find(labels == 1, scores, specificity=0.75) == (0.75, 0.5)
    assert find(labels == 1, scores, specificity=1.0) == (0.5, 0.7)
    assert find(labels == 1, scores, specificity=0.0) == (1.0, 0.1)
    assert find(labels == 0, scores, specificity=1.0) == (0.0, np.inf)
    with pytest.raises(ValueError, match="needs both classes"):
        find(labels >= 0, scores)


def test_intervals_hold_the_estimate_repeat_with_the_seed_and_shrink():
    labels, probs = some_predictions(400)
    probs[:, 1] = np.where(np.arange(400) % 3, labels, probs[:, 1])
    probs[:, 0] = 1 - probs[:, 1]
    scores = metrics.classification_metrics(labels, probs)
    wide = metrics.bootstrap_intervals(labels, probs, resamples=500)
    for name, (low, high) in wide.items():
        assert low < scores[name] < high
    assert wide == metrics.bootstrap_intervals(labels, probs, resamples=500)
    assert wide != metrics.bootstrap_intervals(labels, probs, resamples=500, seed=1)
    four = np.tile(labels, 4), np.tile(probs, (4, 1))
    narrow = metrics.bootstrap_intervals(*four, resamples=500)
    halved = np.diff(narrow["accuracy"]) / np.diff(wide["accuracy"])
    assert 0.4 < halved[0] < 0.6
    # Drawing the four copies together is drawing the original sample.
    clustered = metrics.bootstrap_intervals(
        *four, patients=np.tile(np.arange(400), 4), resamples=500
    )
    assert clustered == wide


def test_bootstrap_equals_rescoring_each_resample():
    labels, probs = some_predictions(20)
    drawn = np.random.default_rng(3).integers(20, size=(50, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = [metrics.classification_metrics(labels[d], probs[d]) for d in drawn]
    got = metrics.bootstrap_intervals(labels, probs, resamples=50, seed=3)
    assert set(each[0]) - set(got) == {"ece", "brier", "macro_auc"}
    for name, interval in got.items():
        expected = np.nanpercentile([scores[name] for scores in each], (2.5, 97.5))
        np.testing.assert_allclose(interval, expected)


def test_bootstrap_refuses_ids_that_do_not_match():
    with pytest.raises(ValueError, match="1 patient ids for 60 predictions"):
        metrics.bootstrap_intervals(*some_predictions(), patients=["a"])


def test_patients_get_the_mean_probability_in_order_of_appearance():
    labels = np.array([1, 0, 1, 1])
    p = np.array([0.9, 0.2, 0.4, 0.6])
    who = np.array(["z", "b", "z", "a"])
    got = metrics.by_patient(labels, np.stack([1 - p, p], 1), who)
    np.testing.assert_array_equal(got[0], [1, 0, 1])
    np.testing.assert_allclose(got[1][:, 1], [0.65, 0.2, 0.6])
    np.testing.assert_array_equal(got[2], ["z", "b", "a"])


@pytest.mark.parametrize(
    ("patients", "message"),
    [
        (["a", "a"], "patient 'a' has images of different labels"),
        (["a", ""], "a patient id is empty"),
        (["a"], "1 patient ids for 2 predictions"),
    ],
)
def test_impossible_patients_are_refused(patients, message):
    with pytest.raises(ValueError, match=message):
        metrics.by_patient(np.array([0, 1]), np.full((2, 2), 0.5), patients)


def test_average_precision_of_weights_is_that_of_repeated_rows():
    labels, probs = some_predictions(count=40)
    weights = np.random.default_rng(1).integers(0, 3, (5, 40))
    found = metrics.weighted_average_precision(labels == 1, probs[:, 1], weights)
    for value, times in zip(found, weights, strict=True):
        rows = np.repeat(np.arange(40), times)
        again = metrics.average_precision(labels[rows] == 1, probs[rows, 1])
        assert value == pytest.approx(again)
    with pytest.warns(UserWarning, match="auprc: no positive"):
        assert np.isnan(metrics.average_precision(np.zeros(3, bool), np.arange(3)))


def test_intervals_of_three_classes_name_each():
    labels, probs = some_predictions(classes=3)
    scores = metrics.classification_metrics(labels, probs)
    intervals = metrics.bootstrap_intervals(labels, probs, resamples=200)
    assert scores.keys() - intervals.keys() == {"ece", "brier", "macro_auc"}
    for name, (low, high) in intervals.items():
        assert low <= scores[name] <= high, name
