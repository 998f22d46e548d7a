"""Results for people: the terminal's closing table, the pages of a run and of predict.

What a page is made of is in `page/`.
"""

import os.path
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from cxai_jax.data.records import Records
from cxai_jax.report import figures, page
from cxai_jax.scoring import explanations, metrics
from cxai_jax.voting import rules

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
OPEN_ERRORS = 10  # More are folded away, so that they do not hide the images.
EXAMPLES = 4  # Pictures per kind: certain and right, certain and wrong, flipped.


def summary(results: dict) -> str:
    """The table a run prints at its end: every score with its 95 % interval."""
    data, scored = results["data"], results["metrics"]
    shown = (*HARD, *RANKING)
    lines = [["", *(SCORES[key] for key in shown)]]
    for name, values in score_rows(scored):
        lines.append([name, *(with_interval(values, key) for key in shown)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    split = results["config"]["data"]["test"]
    flips = scored.get("flips")
    return "\n".join(
        [
            f"{data['name']}, {split} split ({data['split_scheme']}), "
            f"{scored['all']['number']} images, percent with 95 % interval; positive "
            f"class: {data['positive']}",
            *table,
            *_class_lines(scored["all"], data["class_names"]),
            *_stopped(results),
            *([] if flips is None else [f"labels flipped by voting: {len(flips)}"]),
            f"leakage: {data['leakage'].get('verdict', 'not examined')}",
        ]
    )


def run_report(
    results: dict,
    predictions: dict,
    records: Records,
    log: Sequence[dict],
    explanations: dict | None = None,
) -> str:
    """The page of a finished run.

    Args: as `run_parts`.
    """
    parts = run_parts(results, predictions, records, log, explanations)
    data, model = results["data"], results["config"]["model"]["name"]
    total = f"{len(predictions['labels'])} test images"
    return page.whole(f"{data['name']} · {model}", total, parts)


def run_parts(
    results: dict,
    predictions: dict,
    records: Records,
    log: Sequence[dict],
    explanations: dict | None = None,
) -> list[str]:
    """The sections of a page of scored images.

    Args:
      results: contents of results.json.
      predictions: contents of the predictions file.
      records: the scored split, for its pictures.
      log: rows of metrics.jsonl.
      explanations: contents of the explanations file, where a run has one.
    """
    data, config = results["data"], results["config"]
    names = data["class_names"]
    positive = names.index(data["positive"])
    probs, labels = predictions["probs"], predictions["labels"]
    before, k = probs[:, 0].argmax(1), probs.shape[1] - 1
    theta = config["tta"]["theta"]
    after, opposing = before, None
    if k:
        votes = rules.votes_for(probs, theta=theta, k=k)
        after, opposing = np.asarray(votes.labels), np.asarray(votes.opposing)
    verdict = data["leakage"].get("verdict", "not examined")
    leaks = verdict not in ("clean", "no image was seen in training")
    counts = ", ".join(f"{count} {name}" for name, count in data["counts"].items())
    parts = [
        page.section(
            "Result",
            _score_table(results["metrics"], data["positive"]),
            _class_table(results["metrics"]["all"], names),
            f'<p class="verdict {"warn" if leaks else "fine"}"><b>Leakage check:</b> '
            f"{escape(verdict)}. Split: {escape(data['split_scheme'])}; {counts} "
            "images.</p>",
        ),
        page.section("Charts", _charts(results, predictions, after, log)),
    ]
    if results["calibration"]:
        parts.append(_calibration_section(results["calibration"], data["positive"]))
    certainty = probs[:, 0].max(1)
    right = before == labels
    kinds = {
        "Certain and right": np.flatnonzero(right)[np.argsort(-certainty[right])],
        "Certain and wrong": np.flatnonzero(~right)[np.argsort(-certainty[~right])],
        "Flipped by voting": np.flatnonzero(after != before),
    }
    parts += [
        page.section(
            f"{kind}: image and class map",
            _gallery(predictions, records, names, rows[:EXAMPLES]),
        )
        for kind, rows in kinds.items()
        if len(rows)
    ]
    if k:
        parts.append(
            _voting_section(predictions, before, after, opposing, theta, names)
        )
    if explanations:
        summary = results["explanations"]
        parts.append(_explanations_section(explanations, summary, records, names))
    rows = [
        page.Row(
            name=str(predictions["names"][i]),
            probability=float(probs[i, 0, positive]),
            before=names[before[i]],
            after=names[after[i]],
            opposing=int(opposing[i]) if k else None,
            cast=k or None,
            patient=str(predictions["patients"][i]),
            truth=names[labels[i]],
        )
        for i in page.least_certain(certainty)
    ]
    note = page.shown_note(len(rows), len(labels), "the predictions file")
    parts.append(
        page.section("All images", note, page.image_table(rows, names, positive))
    )
    about = {key: results[key] for key in ("device", "versions", "selected", "config")}
    parts.append(page.details("Config, versions and device", about))
    return parts


def prediction_report(
    rows: Sequence[page.Row],
    errors: Sequence[tuple[str, str]],
    *,
    class_names: Sequence[str],
    positive: int,
    patients: Iterable[tuple[str, int, float, str]],
    about: dict,
    counts: dict[str, int] | None = None,
) -> str:
    """The page of the predict command.

    Args:
      rows: the predicted images; of very many those nearest to 50 % are shown.
      errors: (file, reason) of everything that could not be predicted.
      class_names: K names; empty if there is no model to name them.
      positive: the class whose probability is shown.
      patients: (patient, images, mean probability, label) of patients with an id.
      about: JSON values shown at the end: model, window and the like.
      counts: of paths, see `tally_sentence`.
    """
    flipped = sum(row.before != row.after for row in rows)
    flagged = sum(bool(row.flags) for row in rows)
    tiles = [("images predicted", len(rows))]
    tiles += [
        (f"labelled {name}", sum(row.after == name for row in rows))
        for name in class_names
    ]
    tiles += [
        ("labels flipped by voting", flipped),
        ("images with a flag", flagged),
        ("files with an error", len(errors)),
    ]
    parts = [
        page.section(
            "Overview",
            '<ul class="tiles">',
            *(f"<li><b>{number}</b> {escape(text)}</li>" for text, number in tiles),
            "</ul>",
            f"<p>Positive class: {escape(class_names[positive])}.</p>"
            if class_names
            else "",
            f"<p>{escape(tally_sentence(counts))}</p>" if counts else "",
            _votes_sentence(rows, about),
        )
    ]
    if errors:
        opened = " open" * (len(errors) <= OPEN_ERRORS)
        parts.append(
            page.section(
                "Errors",
                f'<details class="verdict warn"{opened}>'
                f"<summary>{len(errors)} could not be predicted</summary>",
                page.table(("File", "Reason"), errors),
                "</details>",
            )
        )
    if patients:
        heading = f"Mean probability of {class_names[positive]}"
        parts.append(
            page.section(
                "Patients",
                page.table(
                    ("Patient", "Images", heading, "Label"),
                    [
                        (p, str(n), page.percent(m), label)
                        for p, n, m, label in patients
                    ],
                ),
            )
        )
    if rows:
        total, nearness = len(rows), [abs(row.probability - 0.5) for row in rows]
        rows = [rows[i] for i in page.least_certain(nearness)]
        prefix = os.path.commonprefix([row.name for row in rows])
        prefix = prefix[: prefix.rfind("/") + 1]
        rows = [row._replace(name=row.name.removeprefix(prefix)) for row in rows]
        parts.append(
            page.section(
                "Images",
                page.shown_note(len(rows), total, "predictions.csv"),
                f"<p>Files are in {escape(prefix)}</p>" if prefix else "",
                page.image_table(rows, class_names, positive),
            )
        )
    parts.append(page.details("About this prediction", about))
    return page.whole("Predictions", f"{len(rows)} images", parts)


def tally_sentence(counts: dict[str, int]) -> str:
    """What became of the paths that were named or found; the counts add up.

    Args:
      counts: "found" = "predicted" + "failed" + "ignored" + "left"; and "unmatched",
        the rows of a patients.csv that name no image.
    """
    text = (
        f"{counts['found']} files found: {counts['predicted']} predicted, "
        f"{counts['failed']} failed, {counts['ignored']} ignored"
    )
    if counts["left"]:
        text += f", {counts['left']} left"
    return f"{text}; {counts['unmatched']} rows of patients.csv unmatched"


def _votes_sentence(rows: Sequence[page.Row], about: dict) -> str:
    cast = sum(row.cast or 0 for row in rows)
    if not cast:
        return ""
    every = about["tta"]["k"] * len(rows)
    return (
        f"<p>{cast} votes were cast; the other {every - cast} of {every} could not "
        "have changed a label.</p>"
    )


def score_rows(scored: dict) -> Iterable[tuple[str, dict]]:
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
    text = f"{100 * values[key]:.1f}"
    if key in values["intervals"]:
        low, high = values["intervals"][key]
        text += f" ({100 * low:.1f}-{100 * high:.1f})"
    return text


def _score_table(scored: dict, positive: str) -> str:
    rows = []
    for name, values in score_rows(scored):
        cells = [with_interval(values, key) for key in SCORES]
        # With a hyphen that is no place to break the line.
        rows.append((name, *(cell.replace("-", "\u2011") for cell in cells)))
    note = (
        f"Percent, with the 95 % bootstrap interval in brackets; positive: {positive}"
    )
    return page.table(("", *SCORES.values()), rows, caption=note)


def _class_rows(scored: dict, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """(class, sensitivity, PPV) of more than two classes, and their macro means."""
    if len(names) < 3:
        return []
    keys = [(name, f"recall_{c}", f"precision_{c}") for c, name in enumerate(names)]
    keys.append(("macro mean", "macro_recall", "macro_precision"))
    return [
        (name, with_interval(scored, recall), with_interval(scored, precision))
        for name, recall, precision in keys
    ]


def _class_lines(scored: dict, names: Sequence[str]) -> list[str]:
    return [
        f"{name}: sensitivity {recall}, PPV {precision}"
        for name, recall, precision in _class_rows(scored, names)
    ]


def _class_table(scored: dict, names: Sequence[str]) -> str:
    rows = _class_rows(scored, names)
    note = "Every class against the rest, percent with the 95 % interval"
    return page.table(("", "Sensitivity", "PPV"), rows, caption=note) if rows else ""


def _stopped(results: dict) -> list[str]:
    """What is said of a run that config.train.patience ended."""
    if not (early := results["selected"].get("stopped_early")):
        return []
    return [
        f"stopped early at step {early['step']}: {early['patience']} evaluations "
        f"without a better {early['metric']} on validation"
    ]


def _charts(results, predictions, after, log) -> str:
    data = results["data"]
    names = data["class_names"]
    positive = names.index(data["positive"])
    labels, sites = predictions["labels"], predictions["sites"]
    probs = predictions["probs"][:, 0]
    score = probs[:, positive]
    curves = {"all images": (labels == positive, score)}
    if len(data["site_names"]) > 1:
        curves |= {
            name: (labels[sites == site] == positive, score[sites == site])
            for site, name in enumerate(data["site_names"])
        }
    before = probs.argmax(1)
    scored = results["metrics"]["all"]
    charts = [
        (
            figures.roc(curves),
            f"ROC of {names[positive]}; area {scored['auc']:.3f}",
        ),
        (
            figures.confusion(metrics.confusion(labels, before, len(names)), names),
            "Confusion matrix",
        ),
    ]
    if (after != before).any():
        counts = metrics.confusion(labels, after, len(names))
        charts.append(
            (figures.confusion(counts, names), "Confusion matrix after voting")
        )
    charts.append(
        (
            figures.reliability(labels, probs),
            f"Reliability; expected calibration error {page.percent(scored['ece'])}",
        )
    )
    if any("loss" in row for row in log):
        charts.append((figures.training_loss(log), "Learning curve: training loss"))
    if results["curve"]:
        charts.append(
            (figures.accuracy_curves(results["curve"]), "Learning curve: accuracy")
        )
    return '<div class="charts">' + "".join(page.chart(*c) for c in charts) + "</div>"


def _gallery(predictions, records, names, rows) -> str:
    figure = []
    for i in rows:
        probs = predictions["probs"][i, 0]
        label = int(probs.argmax())
        gray = records.images[int(i)][..., 0]
        panel = figures.side_by_side(
            gray, figures.overlay(gray, predictions["class_maps"][i, :, :, label])
        )
        caption = (
            f"{predictions['names'][i]}: true {names[predictions['labels'][i]]}, "
            f"predicted {names[label]} ({page.percent(probs[label])})"
        )
        picture = page.embedded(
            figures.encode(figures.shrink(panel, 256), "JPEG"), caption
        )
        figure.append(
            f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="gallery">{"".join(figure)}</div>'


def _explanations_section(found: dict, summary: dict, records: Records, names) -> str:
    score, rows = (
        explanations.agreement(found),
        {n: i for i, n in enumerate(records.names)},
    )
    chosen = found["probs"].argmax(1)
    figure = []
    for i in np.argsort(score):  # The worst first; flat maps (NaN) at the end.
        gray = records.images[rows[found["names"][i]]]
        panel = figures.panel(gray, [found[name][i] for name in explanations.MAPS])
        agreement = "no agreement defined: a map is flat"
        if np.isfinite(score[i]):
            agreement = f"agreement {score[i]:+.2f}"
        caption = (
            f"{agreement}. {found['names'][i]}: true {names[found['labels'][i]]}, "
            f"predicted {names[chosen[i]]}"
        )
        picture = page.embedded(
            figures.encode(figures.shrink(panel, 256), "JPEG"), caption
        )
        figure.append(
            f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"
        )
    measures = {
        "entropy": "Entropy, 1 is flat",
        "empty": "Share of empty maps",
        "occlusion": "Correlation with occlusion",
        "border": "Energy at the border",
        "lung": "Energy in the lungs",
        "lung_over_area": "The same over their area",
    }
    known = {key: m for key, m in measures.items() if f"{key}/cam" in summary}
    table = page.table(
        ("Map", *known.values()),
        [
            (title, *(f"{summary[f'{key}/{name}']['mean']:.2f}" for key in known))
            for name, title in explanations.MAPS.items()
        ],
        f"Means over {len(score)} images. Flat or empty maps agree without meaning it",
    )
    return page.section(
        "Do the explanations agree?",
        f"<p>Left to right: image, {', '.join(explanations.MAPS.values())}, each of "
        "the predicted class. Agreement is the mean rank correlation of the three "
        "maps, 1 if they order the regions equally; it says nothing about being right. "
        f"{len(score)} images, least agreement first.</p>",
        table,
        f'<div class="gallery wide">{"".join(figure)}</div>',
    )


def _calibration_section(fitted: dict, positive: str) -> str:
    points = [
        (
            f"Specificity {page.percent(point['specificity_wanted'])}",
            f"{point['threshold']:.3f}",
            page.percent(point["sensitivity"]),
            page.percent(point["specificity"]),
        )
        for point in fitted["operating_points"]
    ]
    sets = [
        (
            f"Coverage {page.percent(row['coverage_wanted'])}",
            page.percent(row["coverage"]),
            f"{row['mean_set_size']:.2f}",
            page.percent(row["single_class_share"]),
        )
        for row in fitted["conformal"]
    ]
    return page.section(
        "Calibration and operating points",
        f"<p>Fitted on {fitted['held_out']} validation images, measured on the test "
        f"images. Temperature {fitted['temperature']:.2f}: expected calibration error "
        f"{page.percent(fitted['ece_before'])} before, "
        f"{page.percent(fitted['ece_after'])} after.</p>",
        page.table(
            ("Wanted", f"Threshold on {positive}", "Sensitivity", "Specificity"), points
        ),
        page.table(
            ("Prediction sets", "Coverage", "Classes per image", "One class"), sets
        ),
    )


def _voting_section(predictions, before, after, opposing, theta, class_names) -> str:
    probs = predictions["probs"]
    k = probs.shape[1] - 1
    # What flipped comes first, then the closest calls, as in the paper's figure.
    order = np.lexsort((-opposing, after == before))[:6]
    names = {str(predictions["names"][i]): i for i in order}
    figure = figures.trajectories(
        {name: probs[i] for name, i in names.items()},
        {name: int(before[i]) for name, i in names.items()},
        theta=theta,
    )
    flips = np.flatnonzero(after != before)
    helped = int((after[flips] == predictions["labels"][flips]).sum())
    return page.section(
        "Test-time voting",
        f"<p>{k} masks, threshold {theta}: {len(flips)} labels flipped, {helped} of "
        f"them to the true class. A label flips if more than {k / 2:g} votes oppose "
        "it.</p>",
        '<div class="charts wide">'
        + page.chart(figure, "Score while the most relevant cells are removed")
        + "</div>",
        _flip_table(predictions, before, after, opposing, class_names, flips),
    )


def _flip_table(predictions, before, after, opposing, names, flips) -> str:
    if not len(flips):
        return ""
    rows = [
        (
            str(predictions["names"][i]),
            names[predictions["labels"][i]],
            names[before[i]],
            names[after[i]],
            str(opposing[i]),
        )
        for i in flips
    ]
    head = ("Flipped image", "True", "Before", "After", "Votes against")
    return page.table(head, rows)
