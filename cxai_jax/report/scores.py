"""Scores as rows of text, for the terminal, a run's page and the card of a model."""

import math
from collections.abc import Iterable, Sequence

SCORES = {  # Key in results.json -> heading.
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced",
    "precision": "Precision",
    "recall": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
    "auc": "AUC",
    "auprc": "AUPRC",
    "ece": "ECE",
}
# Need no score.
HARD = ("accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1")
RANKING = ("auc", "auprc")
OF_CLASS = ("precision", "recall", "specificity", "f1", "auc")
UNDEFINED, UNATTAINABLE = "not defined", "not attainable"
FEW = 50  # Validation images below which what is fitted on them is a guess.


def defined(value: float | None) -> bool:
    """Whether a score exists: JSON has null where it is 0/0 or unattainable."""
    return value is not None and math.isfinite(value)


def percent(value: float | None) -> str:
    """0.913 -> "91.3 %"."""
    return f"{100 * value:.1f} %" if defined(value) else UNDEFINED


def operating_point(point: dict) -> str:
    """ "Specificity 90.0 %: 0.731" of a row of the fitted operating points."""
    wanted = next(key for key in point if key.endswith("_wanted"))
    title = f"{wanted.removesuffix('_wanted').capitalize()} {percent(point[wanted])}"
    if defined(point["threshold"]):
        title += f": {point['threshold']:.3f}"
    return title


def groups(scored: dict) -> Iterable[tuple[str, dict]]:
    """(name, scores) of every group that evaluate.score made."""
    yield "all images", scored["all"]
    yield from scored.get("per_site", {}).items()
    if "per_patient" in scored:
        yield "per patient", scored["per_patient"]
    if "voted" in scored:
        yield "after voting", scored["voted"]
    for site, values in scored.get("voted_per_site", {}).items():
        yield f"{site}, after voting", values


def with_interval(values: dict, key: str) -> str:
    """ "91.3 (88.0-94.1)" in percent; "" of a score that labels do not have."""
    if key not in values:
        return ""
    if not defined(values[key]):
        return UNDEFINED
    text = f"{100 * values[key]:.1f}"
    low, high = values["intervals"].get(key) or (None, None)
    if defined(low) and defined(high):
        text += f" ({100 * low:.1f}-{100 * high:.1f})"
    return text


def class_rows(scored: dict, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Scores of every class against the rest in percent, and their macro means.

    Rows of name, number of images and OF_CLASS; [] where there are two classes.
    """
    if len(names) < 3:
        return []
    every, apart = scored["all"], scored["per_class"]
    rows = []
    for c, name in enumerate(names):
        own = {key: every[f"{key}_{c}"] for key in ("precision", "recall")}
        own |= {key: apart[name][key] for key in ("specificity", "f1", "auc")}
        bounds = every["intervals"]
        found = {key: bounds[f"{key}_{c}"] for key in own if f"{key}_{c}" in bounds}
        own["intervals"] = found
        cells = (with_interval(own, key) for key in OF_CLASS)
        rows.append((name, str(apart[name]["number"]), *cells))
    means = (with_interval(every, f"macro_{key}") for key in OF_CLASS)
    rows.append(("macro mean", str(every["number"]), *means))
    return rows


def never_predicted(results: dict) -> list[str]:
    """The classes that no scored image was given to, before voting."""
    names, scored = results["data"]["class_names"], results["metrics"]
    if "per_class" in scored:
        rates = [
            (scored["all"][f"recall_{c}"], scored["per_class"][name]["specificity"])
            for c, name in enumerate(names)
        ]
        return [n for n, found in zip(names, rates, strict=True) if found == (0, 1)]
    positive = results["data"]["positive"]
    found = scored["all"]["recall"], scored["all"]["specificity"]
    others = [name for name in names if name != positive]
    return [positive] * (found == (0, 1)) + others * (found == (1, 0))


def warnings_of(results: dict) -> list[str]:
    """What a reader of these numbers must know first; [] if nothing."""
    told, fitted = [], results["calibration"]
    if fitted and fitted["held_out"] < FEW:
        told.append(
            f"Only {fitted['held_out']} validation images: temperature, thresholds and "
            f"prediction sets fitted on fewer than {FEW} are rough guesses."
        )
    every, classes = results["metrics"]["all"], results["data"]["class_names"]
    low, high = every["intervals"].get("balanced_accuracy") or (None, None)
    chance = 1 / len(classes)
    if defined(low) and low <= chance:
        place = (
            "is within the interval, so the scores do not show that the network has "
            "learnt anything."
            if high >= chance
            else "lies above the interval: what the network has learnt points the "
            "wrong way here. See whether the classes were exchanged."
        )
        told.append(
            f"Balanced accuracy {with_interval(every, 'balanced_accuracy')}: chance, "
            f"{100 * chance:.1f}, {place}"
        )
    told += [
        f"No test image was labelled {name}: its precision is 0/0, given as 0."
        for name in never_predicted(results)
    ]
    number = every["number"]
    if number < FEW:
        told.append(f"Only {number} test images: read the intervals, not the scores.")
    for row in fitted.get("conformal", []):
        if defined(row["coverage"]) and row["coverage"] < row["coverage_wanted"] - 0.03:
            told.append(
                f"Prediction sets for {percent(row['coverage_wanted'])} hold the true "
                f"class of {percent(row['coverage'])} of the test images: the test "
                "images differ from the validation images, or those are too few."
            )
    return told
