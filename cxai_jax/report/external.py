"""The page of external validation: both data sets side by side, then the new one."""

from html import escape

import numpy as np

from cxai_jax.data.records import Records
from cxai_jax.report import figures, page, scores
from cxai_jax.report.training_page import run_parts


def external_report(
    results: dict, predictions: dict, records: Records, own: dict | None
) -> str:
    """The page of a run that was scored on data of another origin.

    Args:
      results: what `external.score_external` returned.
      predictions: contents of its predictions file.
      records: the scored images, for their pictures.
      own: contents of the run's own predictions file; None where it is gone.
    """
    data, run = results["data"], results["run"]
    there, here = f"{run['data']['name']} (its own test)", f"{data['name']} (external)"
    if run["data"]["name"] == data["name"]:
        here = f"{data['name']}, {', '.join(data['counts'])}"
    parts = [
        page.section(
            "Both data sets side by side",
            f"<p>Trained on {escape(run['data']['name'])}. Weights, temperature and "
            "thresholds are those of the run: nothing was fitted to the other data. "
            f"Positive class: {escape(data['positive'])}.</p>",
            _score_table(results, there, here),
            _threshold_table(results, there, here),
            _roc(results, predictions, own, there, here),
        ),
        *run_parts(results, predictions, records, []),
    ]
    title = f"{run['data']['name']} → {data['name']}"
    return page.whole(title, f"{len(records)} external images", parts)


def _score_table(results: dict, there: str, here: str) -> str:
    own = (results["run"]["metrics"] or {}).get("all")
    new = results["metrics"]["all"]

    def cell(values, key):
        return (
            scores.with_interval(values, key).replace("-", "\u2011") if values else ""
        )

    rows = [
        (name, cell(own, key), cell(new, key)) for key, name in scores.SCORES.items()
    ]
    images = ("Images", str(own["number"]) if own else "", str(new["number"]))
    note = "Percent, with the 95 % bootstrap interval in brackets"
    return page.table(("", there, here), [images, *rows], caption=note)


def _threshold_table(results: dict, there: str, here: str) -> str:
    own, new = results["run"]["calibration"], results["calibration"]
    if not new:
        return "<p>The run held out no validation images: no fixed thresholds.</p>"

    def both(point):
        if not scores.defined(point["threshold"]):
            return scores.UNATTAINABLE
        shares = (point[key] for key in ("sensitivity", "specificity"))
        return " / ".join(map(scores.percent, shares))

    rows = [
        (scores.operating_point(a), both(a), both(b))
        for a, b in zip(own["operating_points"], new["operating_points"], strict=True)
    ]
    error = "Calibration error after temperature"
    rows.append((error, *(scores.percent(c["ece_after"]) for c in (own, new))))
    note = "Sensitivity / specificity at the fixed thresholds"
    head = ("Wanted: threshold", there, here)
    return page.table(head, rows, caption=note)


def _roc(results: dict, predictions: dict, own: dict | None, there, here) -> str:
    names = results["data"]["class_names"]
    positive = names.index(results["data"]["positive"])

    def curve(found):
        return np.asarray(found["labels"]) == positive, found["probs"][:, 0, positive]

    curves = ({there: curve(own)} if own else {}) | {here: curve(predictions)}
    caption = f"ROC of {names[positive]}"
    chart = page.chart(figures.to_svg(figures.roc(curves), caption), caption)
    return f'<div class="charts wide">{chart}</div>'
