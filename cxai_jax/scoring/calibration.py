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


def fit(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    positive: int,
    coverages: tuple[float, ...] = (0.9, 0.95),
    specificities: tuple[float, ...] = (0.9, 0.95),
    sensitivities: tuple[float, ...] = (0.9, 0.95),
) -> dict:
    """What is decided on held-out images and stays as it is from then on.

    Args:
      logits: [N, K].
      labels: int [N].
      positive: class index of sensitivity and specificity.

    Returns:
      JSON values: temperature, number of held-out images, a threshold on the positive
      class for each wanted specificity and sensitivity, None where no threshold below
      1 attains it, and a conformal quantile for each coverage.
    """
    temperature = fit_temperature(logits, labels)
    probs = softmax(logits / temperature)

    is_positive, scores = labels == positive, probs[:, positive]
    both = is_positive.any() and not is_positive.all()

    def at_specificity(wanted):
        if not both:
            return None
        _, threshold = sensitivity_at_specificity(
            is_positive, scores, specificity=wanted
        )
        return threshold if np.isfinite(threshold) else None

    def at_sensitivity(wanted):
        """The highest threshold that still finds the wanted share of positives."""
        if not both:
            return None
        own = np.sort(scores[is_positive])
        return float(own[int(np.floor(len(own) * (1 - wanted) + 1e-9))])

    return {
        "temperature": temperature,
        "held_out": len(labels),
        "operating_points": [
            {"specificity_wanted": wanted, "threshold": at_specificity(wanted)}
            for wanted in specificities
        ]
        + [
            {"sensitivity_wanted": wanted, "threshold": at_sensitivity(wanted)}
            for wanted in sensitivities
        ],
        "conformal": [
            {
                "coverage_wanted": wanted,
                "quantile": conformal_quantile(probs, labels, wanted),
            }
            for wanted in coverages
        ],
    }


def measure(
    fitted: dict, logits: np.ndarray, labels: np.ndarray, *, positive: int
) -> dict:
    """What `fit` decided, as it works on other images; nothing is fitted to these.

    Args:
      fitted: what `fit`, or this function on other images, returned.
      logits: [N, K], labels: int [N].
      positive: as in `fit`.

    Returns:
      `fitted` with the calibration error before and after, the sensitivity and
      specificity of each threshold, coverage and mean size of the prediction sets.
    """
    probs = softmax(logits / fitted["temperature"])
    diseased = labels == positive
    points = []
    for point in fitted["operating_points"]:
        if point["threshold"] is None:
            points.append(point | {"specificity": None, "sensitivity": None})
            continue
        called = probs[:, positive] >= point["threshold"]
        rates = {
            "specificity": _share(~called[~diseased]),
            "sensitivity": _share(called[diseased]),
        }
        points.append(point | rates)
    sets = []
    for row in fitted["conformal"]:
        chosen = conformal_sets(probs, row["quantile"])
        found = {
            "coverage": _share(chosen[np.arange(len(chosen)), labels]),
            "mean_set_size": float(chosen.sum(1).mean()),
            "single_class_share": _share(chosen.sum(1) == 1),
            "empty_share": _share(chosen.sum(1) == 0),
        }
        sets.append(row | found)
    return {
        "temperature": fitted["temperature"],
        "held_out": fitted["held_out"],
        "ece_before": expected_calibration_error(labels, softmax(logits)),
        "ece_after": expected_calibration_error(labels, probs),
        "operating_points": points,
        "conformal": sets,
    }


def _share(hits: np.ndarray) -> float | None:
    return float(hits.mean()) if len(hits) else None
