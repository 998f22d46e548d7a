"""Calibration and operating points, fitted on validation and reported on test.

Temperature scaling (Guo et al. 2017), sensitivity at a fixed specificity, and split
conformal prediction sets (Sadinle et al. 2019, the least ambiguous set). All are
NumPy functions of logits and labels; none of them ever sees the test labels.
"""

import numpy as np

from cxai_jax.scoring.metrics import (
    expected_calibration_error,
    sensitivity_at_specificity,
)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [N, K] of logits [N, K], float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = np.exp(shifted - shifted.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T > 0 that minimises the cross-entropy of softmax(logits / T).

    The loss is convex in 1/T, so the sign of its derivative

        sum_n (logit_{y_n} - sum_k p_nk logit_nk)

    is bisected. T is kept in [0.05, 20]: on separable data the optimum is 0.

    Args:
      logits: [N, K], of held-out images.
      labels: int [N].

    Raises:
      ValueError: for empty or non-finite input.
    """
    logits = np.asarray(logits, np.float64)
    if len(logits) == 0 or not np.isfinite(logits).all():
        raise ValueError(
            f"temperature scaling needs finite logits of at least one held-out image, "
            f"got shape {logits.shape}"
        )
    chosen = logits[np.arange(len(labels)), labels]
    low, high = 1 / 20, 1 / 0.05  # Bounds of 1/T.
    for _ in range(60):
        middle = np.sqrt(low * high)
        expected = (softmax(logits * middle) * logits).sum(1)
        if (chosen - expected).sum() > 0:  # The likelihood still grows with 1/T.
            low = middle
        else:
            high = middle
    return float(1 / np.sqrt(low * high))


def conformal_quantile(probs: np.ndarray, labels: np.ndarray, coverage: float) -> float:
    """The score 1 - p_y that `coverage` of new exchangeable images stay within.

    The ceil((n + 1) coverage)-th smallest of the n held-out scores; 1 (every class is
    in the set) where n is too small for the coverage.
    """
    scores = np.sort(1 - probs[np.arange(len(labels)), labels])
    rank = int(np.ceil((len(scores) + 1) * coverage))
    return float(scores[rank - 1]) if rank <= len(scores) else 1.0


def conformal_sets(probs: np.ndarray, quantile: float) -> np.ndarray:
    """Prediction sets: bool [N, K], class k where 1 - p_k <= quantile."""
    return 1 - probs <= quantile + 1e-12


def calibrate(
    held_out: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    positive: int,
    coverages: tuple[float, ...] = (0.9, 0.95),
    specificities: tuple[float, ...] = (0.9, 0.95),
) -> dict:
    """Everything above: fitted on `held_out`, measured on `test`.

    Args:
      held_out, test: (logits [N, K], labels int [N]).
      positive: class index of sensitivity and specificity.

    Returns:
      JSON values: temperature, threshold and the sensitivity and specificity it has on
      the test images per wanted specificity, coverage and mean size of the sets.
    """
    (logits, labels), (test_logits, test_labels) = held_out, test
    temperature = fit_temperature(logits, labels)
    probs, test_probs = (
        softmax(logits / temperature),
        softmax(test_logits / temperature),
    )
    diseased = test_labels == positive
    result = {
        "temperature": temperature,
        "held_out": len(labels),
        "ece_before": expected_calibration_error(test_labels, softmax(test_logits)),
        "ece_after": expected_calibration_error(test_labels, test_probs),
        "operating_points": [],
        "conformal": [],
    }
    for wanted in specificities:
        _, threshold = sensitivity_at_specificity(
            labels == positive, probs[:, positive], specificity=wanted
        )
        called = test_probs[:, positive] >= threshold
        result["operating_points"].append(
            {
                "specificity_wanted": wanted,
                "threshold": threshold,
                "specificity": _share(~called[~diseased]),
                "sensitivity": _share(called[diseased]),
            }
        )
    for wanted in coverages:
        sets = conformal_sets(test_probs, conformal_quantile(probs, labels, wanted))
        result["conformal"].append(
            {
                "coverage_wanted": wanted,
                "coverage": _share(sets[np.arange(len(sets)), test_labels]),
                "mean_set_size": float(sets.sum(1).mean()),
                "single_class_share": _share(sets.sum(1) == 1),
            }
        )
    return result


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else float("nan")
