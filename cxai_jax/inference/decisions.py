"""What a run says of an image once its calibration is applied.

The calibrated probability, the prediction set, and a decision: the label at the chosen
operating point, or "inconclusive" where the set holds several classes or none.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cxai_jax.inference.choices import POINTS
from cxai_jax.report.page import INCONCLUSIVE
from cxai_jax.scoring.calibration import conformal_sets, softmax

COVERAGE = 0.9  # Of the prediction sets.


class Rule(NamedTuple):
    """How probabilities become decisions; None where a run does not know."""

    temperature: float | None
    quantile: float | None  # Conformal, of COVERAGE.
    threshold: float | None  # On the positive class; None takes the voted label.
    text: str  # The rule in a sentence.


def make_rule(results: Mapping, point: str) -> Rule:
    """The rule of a run at an operating point.

    Args:
      results: contents of results.json.
      point: one of POINTS, a threshold between 0 and 1 as text, or "" for the label.

    Raises:
      ValueError: for an unknown point, or one that the run does not have.
    """
    fitted = results.get("calibration") or {}
    positive = results["data"]["positive"]
    threshold = _threshold(fitted, point)
    quantile = next(
        (
            row.get("quantile")
            for row in fitted.get("conformal", [])
            if row["coverage_wanted"] == COVERAGE
        ),
        None,
    )
    told = [
        "Probabilities are calibrated on validation images"
        if fitted
        else "Probabilities are raw: the run held out no validation images to calibrate"
    ]
    if threshold is not None:
        told.append(
            f"the decision is {positive} from {100 * threshold:.1f} % on"
            + (f" ({point})" if point in POINTS else "")
        )
    if quantile is not None:
        told.append(
            f"{INCONCLUSIVE} where the {100 * COVERAGE:.0f} % prediction set holds "
            "several classes or none"
        )
    text = "; ".join(told) + "."
    return Rule(fitted.get("temperature"), quantile, threshold, text)


def _threshold(fitted: Mapping, point: str) -> float | None:
    if not point:
        return None
    if point not in POINTS:
        try:
            threshold = float(point)
        except ValueError:
            threshold = -1.0
        if not 0 < threshold < 1:
            raise ValueError(
                f"--operating_point={point} is unknown; give one of "
                f"{', '.join(POINTS)}, or a threshold between 0 and 1 such as 0.5"
            )
        return threshold
    if not fitted:
        raise ValueError(
            f"--operating_point={point}: the run held out no validation images, so it "
            "knows no operating points; train with config.data.fit=train, or give a "
            "threshold such as 0.5"
        )
    wanted = {"spec": "specificity", "sens": "sensitivity"}[point[:4]] + "_wanted"
    rows = [
        row
        for row in fitted["operating_points"]
        if row.get(wanted) == int(point[4:]) / 100
    ]
    if not rows:
        raise ValueError(
            f"--operating_point={point} is unknown to this run, which an earlier "
            "version scored; score it again with --mode=eval"
        )
    if rows[0]["threshold"] is None:
        raise ValueError(
            f"--operating_point={point} is not attainable: on the run's "
            f"{fitted['held_out']} validation images no threshold reaches it"
        )
    return rows[0]["threshold"]


def calibrated(rule: Rule, probs: np.ndarray) -> np.ndarray:
    """softmax(log p / T), float64 [N, K]; as they are where T is unknown."""
    if rule.temperature is None:
        return np.asarray(probs, np.float64)
    logs = np.log(np.maximum(np.asarray(probs, np.float64), 1e-300))
    return softmax(logs / rule.temperature)


def decide(
    rule: Rule, probs: np.ndarray, label: int, positive: int, names: list[str]
) -> tuple[str, list[str] | None]:
    """The decision on one image and its prediction set, None if there is no rule.

    Args:
      rule: of the run.
      probs: calibrated [K].
      label: after voting.
      positive: class of the threshold.
      names: of the classes.
    """
    if rule.threshold is not None:
        others = np.where(np.arange(len(probs)) == positive, -1, probs)
        above = probs[positive] >= rule.threshold
        label = positive if above else int(others.argmax())
    if rule.quantile is None:
        return names[label] if rule.threshold is not None else "", None
    chosen = conformal_sets(probs[None], rule.quantile)[0]
    candidates = [name for name, held in zip(names, chosen, strict=True) if held]
    return names[label] if len(candidates) == 1 else INCONCLUSIVE, candidates
