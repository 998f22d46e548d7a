"""What a classifier is worth: counts, rates, ranking, calibration, intervals.

NumPy only; reads labels and probabilities, never a model. Exact counts, a positive
class that is named, 0/0 = 0 with a warning (decision A24; the published script adds
1e-3 to every denominator, which lowers F1 by about 0.05 points).
"""

import warnings
from collections.abc import Sequence

import numpy as np

# Scores of a ranking or of a confidence, which a bare label does not have.
OF_PROBABILITIES = ("auc", "macro_auc", "auprc", "ece", "brier")
# What config.train.select_metric may be: more is better.
SELECTING = ("accuracy", "auc", "macro_f1", "balanced_accuracy", "auprc")


def classification_metrics(
    labels: np.ndarray, probs: np.ndarray, *, positive: int = 1
) -> dict[str, float]:
    """All scores of one set of predictions; the decision is the argmax.

    Args:
      labels: int [N].
      probs: [N, K], rows sum to 1.
      positive: class that precision, recall, F1, specificity and AUC are about.

    Returns:
      accuracy, balanced accuracy, precision, recall, f1, specificity, auc, auprc, ece
      and brier; the macro_ means of the first three rates and of the one-against-rest
      AUC over classes; of more than two classes recall_0, precision_0, ... as well.

    Raises:
      ValueError: for empty, misshapen or out-of-range input.
    """
    labels, probs = checked(labels, probs)
    if not 0 <= positive < probs.shape[1]:
        raise ValueError(
            f"positive is {positive}, expected a class 0..{probs.shape[1] - 1}"
        )
    counts = confusion(labels, probs.argmax(1), probs.shape[1])
    rates = class_rates(counts)
    aucs = [auc(labels == c, probs[:, c]) for c in range(probs.shape[1])]
    scores = {"accuracy": np.trace(counts) / counts.sum()}
    scores |= of_rates(rates, counts, positive)
    scores |= {
        "auc": aucs[positive],
        "auprc": average_precision(labels == positive, probs[:, positive]),
        "ece": expected_calibration_error(labels, probs),
        "brier": brier(labels, probs),
        "macro_auc": np.mean(aucs),
    }
    return {name: float(value) for name, value in scores.items()}


def checked(labels: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels int64 [N] and probabilities float64 [N, K], or a ValueError."""
    labels, probs = np.asarray(labels), np.asarray(probs, np.float64)
    if probs.ndim != 2 or probs.shape[1] < 2 or labels.shape != probs.shape[:1]:
        raise ValueError(
            f"labels {labels.shape} and probs {probs.shape} disagree; expected [N] and "
            "[N, K] with K >= 2"
        )
    if not len(labels):
        raise ValueError("there are no predictions to score: labels is empty")
    if not np.isfinite(probs).all():
        row = int(np.flatnonzero(~np.isfinite(probs).all(1))[0])
        raise ValueError(f"probs has a NaN or infinite value, first in row {row}")
    if probs.min() < 0 or np.abs(probs.sum(1) - 1).max() > 1e-2:
        raise ValueError(
            "probs must be non-negative and sum to 1 per row; apply a softmax to logits"
        )
    if labels.dtype.kind not in "iub" or labels.min() < 0:
        raise ValueError("labels must be whole numbers from 0 on")
    if labels.max() >= probs.shape[1]:
        raise ValueError(
            f"labels go up to {labels.max()} but probs has {probs.shape[1]} classes"
        )
    return labels.astype(np.int64), probs


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts, int [K, K]: row is the true class, column the predicted one."""
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    pairs = np.bincount(labels * classes + predicted, minlength=classes**2)
    return pairs.reshape(classes, classes)


def class_rates(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall, F1 and specificity of every class.

    precision = TP / predicted, recall = TP / true, f1 = 2 TP / (predicted + true),
    specificity = TN / negatives; 0/0 is 0 and warns.

    Args:
      counts: confusion matrices [..., K, K].

    Returns:
      Four arrays [..., K].
    """
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    true, predicted = counts.sum(-1), counts.sum(-2)
    total = counts.sum((-2, -1))[..., None]
    return {
        "precision": ratio(hits, predicted, "precision: a class is never predicted"),
        "recall": ratio(hits, true, "recall: a class has no samples"),
        "f1": ratio(2 * hits, true + predicted, "f1: a class is absent"),
        "specificity": ratio(
            total - true - predicted + hits,
            total - true,
            "specificity: a class has no negatives",
        ),
    }


def of_rates(rates: dict, counts: np.ndarray, positive: int) -> dict[str, np.ndarray]:
    """The scores that follow from the rates of all classes, [...] each.

    Balanced accuracy is the mean recall of the classes that have samples, as in
    scikit-learn; a macro mean is over all classes.

    Args:
      rates: of `class_rates(counts)`.
      counts: confusion matrices [..., K, K].
      positive: the class of precision, recall, f1 and specificity.
    """
    present = counts.sum(-1) > 0
    scores = {name: values[..., positive] for name, values in rates.items()}
    scores["balanced_accuracy"] = rates["recall"].sum(-1) / present.sum(-1)
    for name in ("precision", "recall", "f1"):
        scores[f"macro_{name}"] = rates[name].mean(-1)
    if (classes := counts.shape[-1]) > 2:
        for name in ("recall", "precision"):
            scores |= {f"{name}_{c}": rates[name][..., c] for c in range(classes)}
    return scores


def ratio(top: np.ndarray, bottom: np.ndarray, reason: str) -> np.ndarray:
    """top / bottom, with 0/0 = 0 and a warning."""
    if np.any(bottom == 0):
        warnings.warn(f"{reason}; 0/0 is taken as 0", stacklevel=3)
    return np.divide(top, bottom, out=np.zeros(np.shape(bottom)), where=bottom != 0)


def auc(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """P(score of a positive > of a negative) + P(equal) / 2 (Mann-Whitney).

    Args:
      is_positive: bool [N].
      scores: [N].

    Returns:
      Area under the ROC curve; NaN, with a warning, if one class is absent.
    """
    is_positive = np.asarray(is_positive, bool)
    value = float(weighted_auc(is_positive, scores, np.ones((1, len(is_positive))))[0])
    if np.isnan(value):
        warnings.warn("auc: only one class is present, the result is NaN", stacklevel=2)
    return value


def weighted_auc(
    is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """AUC of R weighted copies of the sample: weights [R, N] -> [R]."""
    _, tie = np.unique(scores, return_inverse=True)
    order = np.argsort(tie, kind="stable")
    starts = np.flatnonzero(np.diff(tie[order], prepend=-1))

    def per_tie(chosen):
        return np.add.reduceat((weights * chosen)[:, order], starts, axis=1)

    positives, negatives = per_tie(is_positive), per_tie(~is_positive)
    below = np.cumsum(negatives, axis=1) - negatives
    wins = np.sum(positives * (below + negatives / 2), axis=1)
    pairs = positives.sum(1) * negatives.sum(1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def average_precision(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """Area under precision and recall, sum_t (R_t - R_t-1) P_t over the thresholds t.

    Args:
      is_positive: bool [N].
      scores: [N]; equal ones share a threshold.

    Returns:
      0..1, no interpolation; NaN, with a warning, without a positive.
    """
    is_positive = np.asarray(is_positive, bool)
    once = np.ones((1, len(is_positive)))
    value = float(weighted_average_precision(is_positive, scores, once)[0])
    if np.isnan(value):
        warnings.warn("auprc: no positive is present, the result is NaN", stacklevel=2)
    return value


def weighted_average_precision(
    is_positive: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Average precision of R weighted copies of the sample: weights [R, N] -> [R]."""
    _, tie = np.unique(-np.asarray(scores), return_inverse=True)
    order = np.argsort(tie, kind="stable")
    starts = np.flatnonzero(np.diff(tie[order], prepend=-1))
    hits = np.add.reduceat((weights * is_positive)[:, order], starts, axis=1)
    called = np.add.reduceat(weights[:, order], starts, axis=1).cumsum(1)
    found = hits.cumsum(1)
    precision = np.divide(found, called, out=np.zeros(found.shape), where=called > 0)
    area, total = (hits * precision).sum(1), found[:, -1]
    return np.divide(area, total, out=np.full(len(weights), np.nan), where=total > 0)


def expected_calibration_error(
    labels: np.ndarray, probs: np.ndarray, *, bins: int = 15
) -> float:
    """sum_b (n_b / N) |accuracy_b - confidence_b| (Guo et al. 2017).

    Args:
      labels: int [N].
      probs: [N, K]; the confidence is the row's maximum.
      bins: equal widths over 0..1, right-closed.
    """
    confidence = probs.max(1)
    gap = (probs.argmax(1) == labels) - confidence
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(place, gap, minlength=bins)).sum() / len(labels))


def brier(labels: np.ndarray, probs: np.ndarray) -> float:
    """Mean of sum_k (p_k - [y = k])^2, 0..2: twice the one-column form if K = 2."""
    return float(np.square(probs - np.eye(probs.shape[1])[labels]).sum(1).mean())


def sensitivity_at_specificity(
    is_positive: np.ndarray, scores: np.ndarray, *, specificity: float = 0.95
) -> tuple[float, float]:
    """Best sensitivity whose threshold keeps at least the given specificity.

    Args:
      is_positive: bool [N], both values present.
      scores: [N]; a sample is called positive if its score >= the threshold.
      specificity: in 0..1.

    Returns:
      Sensitivity and the threshold; a threshold of infinity calls nothing positive.

    Raises:
      ValueError: if one class is absent.
    """
    is_positive, scores = np.asarray(is_positive, bool), np.asarray(scores)
    if is_positive.all() or not is_positive.any():
        raise ValueError("sensitivity at a specificity needs both classes")
    thresholds = np.append(np.unique(scores), np.inf)
    negatives = np.sort(scores[~is_positive])
    kept = np.searchsorted(negatives, thresholds, "left") / len(negatives)
    threshold = thresholds[np.argmax(kept >= specificity)]
    return float(np.mean(scores[is_positive] >= threshold)), float(threshold)


def bootstrap_intervals(
    labels: np.ndarray,
    probs: np.ndarray,
    *,
    positive: int = 1,
    patients: Sequence | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Percentile-bootstrap intervals of all scores but ece, brier and macro_auc.

    Args:
      labels: int [N].
      probs: [N, K].
      positive: as in `classification_metrics`.
      patients: id per row; given, whole patients are drawn (slices of one patient are
        not independent, and an image-level interval is too narrow).
      resamples: R.
      seed: of the resampling.
      level: coverage.

    Returns:
      name -> (low, high), over the resamples in which the score exists.

    Raises:
      ValueError: as `classification_metrics`, or for ids that do not match the rows.
    """
    labels, probs = checked(labels, probs)
    groups = np.arange(len(labels)) if patients is None else group_index(patients)[1]
    if len(groups) != len(labels):
        raise ValueError(f"{len(groups)} patient ids for {len(labels)} predictions")
    count, classes = int(groups.max()) + 1, probs.shape[1]
    random = np.random.default_rng(seed)
    pairs = np.eye(classes**2)[labels * classes + probs.argmax(1)]
    counts, aucs, areas = [], [], []
    chosen = labels == positive, probs[:, positive]
    block = max(1, 2**22 // len(labels))  # Bounds the memory at some 32 MiB per array.
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = random.integers(count, size=(rows, count))
        drawn += count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        weights = times[:, groups].astype(float)  # How often each row was drawn.
        counts.append((weights @ pairs).reshape(rows, classes, classes))
        aucs.append(weighted_auc(*chosen, weights))
        areas.append(weighted_average_precision(*chosen, weights))
    counts = np.concatenate(counts)
    with warnings.catch_warnings():  # A resample may lack a class by chance.
        warnings.simplefilter("ignore")
        rates = class_rates(counts)
        scores = {"accuracy": np.trace(counts, axis1=1, axis2=2) / counts.sum((1, 2))}
        scores |= of_rates(rates, counts, positive)
        scores |= {"auc": np.concatenate(aucs), "auprc": np.concatenate(areas)}
        tail = 50 * (1 - level)
        return {
            name: tuple(map(float, np.nanpercentile(values, (tail, 100 - tail))))
            for name, values in scores.items()
        }


def by_patient(
    labels: np.ndarray, probs: np.ndarray, patients: Sequence
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row per patient: the mean probability of the patient's images.

    Args:
      labels: int [N], the same within a patient.
      probs: [N, K].
      patients: id per row; none may be empty.

    Returns:
      Labels [P], probabilities [P, K] and ids [P], in the order of first appearance.

    Raises:
      ValueError: for a patient with two labels, an empty id, or ids that do not match.
    """
    labels, probs = checked(labels, probs)
    if len(patients) != len(labels):
        raise ValueError(f"{len(patients)} patient ids for {len(labels)} predictions")
    ids, groups = group_index(patients)
    if "" in ids.astype(str):
        raise ValueError("a patient id is empty; leave those rows out first")
    first = np.full(len(ids), -1)
    first[groups[::-1]] = labels[::-1]
    if (first[groups] != labels).any():
        mixed = ids[groups[np.argmax(first[groups] != labels)]]
        raise ValueError(f"patient {str(mixed)!r} has images of different labels")
    images = np.bincount(groups)
    means = np.stack([np.bincount(groups, column) / images for column in probs.T], 1)
    return first, means, ids


def group_index(patients: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids in order of first appearance, and each row's place among them."""
    ids, first, index = np.unique(
        np.asarray(patients), return_index=True, return_inverse=True
    )
    order = np.argsort(first)
    return ids[order], np.argsort(order)[index]
