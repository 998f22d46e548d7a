"""The page of a finished run: scores, charts, and what the network looked at."""

from collections.abc import Sequence
from html import escape

import numpy as np

from cxai_jax.data.privacy import pseudonym
from cxai_jax.data.records import Records
from cxai_jax.report import figures, gallery, page, pictures, scores
from cxai_jax.scoring import explanations, metrics
from cxai_jax.voting import rules

THUMBNAIL = 72


def run_report(
    results: dict,
    predictions: dict,
    records: Records,
    log: Sequence[dict],
    explanations: dict | None = None,
) -> str:
    """The page of a finished run; arguments as `run_parts`."""
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
    drawn = gallery.Drawn(predictions, after, records, names, results["maps"]["scale"])
    parts = [
        page.section("Result", *_result(results)),
        page.section("Charts", _charts(results, predictions, after, log)),
    ]
    if results["calibration"]:
        parts.append(_calibration_section(results["calibration"], data["positive"]))
    told = page.evidence(drawn.scale)
    parts.append(page.legend(drawn.scale, "Class activation map (CAM)", told))
    # Certainty as the network gives it: calibration keeps the order, not the number.
    raw = ", with probabilities before calibration" if results["calibration"] else ""
    parts += gallery.galleries(drawn, probs[:, 0], labels, before, after, names, raw)
    if k:
        parts.append(
            _voting_section(predictions, before, after, opposing, theta, names)
        )
    if explanations:
        summary = results["explanations"]
        parts.append(_explanations_section(explanations, summary, records, names))
    rows, salt = [], str(data.get("fingerprint"))
    for i in page.least_certain(probs[:, 0].max(1)):
        plain, mapped = drawn.pair(i, THUMBNAIL)
        rows.append(
            page.Row(
                name=str(predictions["names"][i]),
                probability=float(probs[i, 0, positive]),
                probs=tuple(map(float, probs[i, 0])),
                before=names[before[i]],
                after=names[after[i]],
                opposing=int(opposing[i]) if k else None,
                cast=k or None,
                patient=pseudonym(str(predictions["patients"][i]), salt),
                truth=names[labels[i]],
                plain=plain,
                mapped=mapped,
            )
        )
    note = page.shown_note(len(rows), len(labels), "the predictions file")
    parts.append(
        page.section("All images", note, page.image_table(rows, names, positive))
    )
    about = {key: results[key] for key in ("device", "versions", "selected", "config")}
    parts.append(page.details("Config, versions and device", about))
    return parts


def _result(results: dict) -> list[str]:
    data, scored = results["data"], results["metrics"]
    verdict = data["leakage"].get("verdict", "not examined")
    counts = ", ".join(f"{count} {name}" for name, count in data["counts"].items())
    clean = verdict in ("clean", "no image was seen in training")
    look = "fine" if clean else "warn"
    parts = [
        _score_table(scored, data["positive"]),
        f'<p class="verdict {look}"><b>Leakage check:</b> {escape(verdict)}. Split: '
        f"{escape(data['split_scheme'])}; {counts} images.</p>",
    ]
    parts += [
        f'<p class="verdict warn">{escape(text)}</p>'
        for text in scores.warnings_of(results)
    ]
    if rows := scores.class_rows(scored, data["class_names"]):
        head = ("Class", "Images", *(scores.SCORES[key] for key in scores.OF_CLASS))
        note = "Each class against all others, percent with the 95 % interval"
        parts.append(page.table(head, rows, note))
    return parts


def _score_table(scored: dict, positive: str) -> str:
    rows = []
    for name, values in scores.groups(scored):
        cells = [scores.with_interval(values, key) for key in scores.SCORES]
        # With a hyphen that is no place to break the line.
        rows.append((name, *(cell.replace("-", "\u2011") for cell in cells)))
    note = (
        "Percent, with the 95 % bootstrap interval in brackets. Precision, "
        f"sensitivity, specificity, F1 and AUC are of {positive}"
    )
    return page.table(("", *scores.SCORES.values()), rows, caption=note)


def _charts(results, predictions, after, log) -> str:
    data = results["data"]
    names = data["class_names"]
    positive = names.index(data["positive"])
    labels, sites = predictions["labels"], predictions["sites"]
    probs = predictions["probs"][:, 0]
    score = probs[:, positive]
    scored = results["metrics"]["all"]
    if len(names) > 2:
        curves = {
            f"{name} against the rest": (labels == c, probs[:, c])
            for c, name in enumerate(names)
        }
        title = "ROC of each class against the rest"
    else:
        curves = {"all images": (labels == positive, score)}
        area = f"{scored['auc']:.3f}" if scores.defined(scored["auc"]) else "undefined"
        title = f"ROC of {names[positive]}; area {area}"
        if len(data["site_names"]) > 1:
            curves |= {
                name: (labels[sites == site] == positive, score[sites == site])
                for site, name in enumerate(data["site_names"])
            }
    before = probs.argmax(1)
    charts = [
        (figures.roc(curves), title),
        (
            figures.confusion(metrics.confusion(labels, before, len(names)), names),
            "Confusion matrix: images, and their share of the true class",
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
            f"Reliability; expected calibration error {scores.percent(scored['ece'])}",
        )
    )
    if sum("loss" in row for row in log) > 1:  # One point is no curve.
        charts.append((figures.training_loss(log), "Learning curve: training loss"))
    if len(results["curve"]) > 1:
        charts.append(
            (figures.accuracy_curves(results["curve"]), "Learning curve: accuracy")
        )
    drawn = "".join(page.chart(figures.to_svg(*one), one[1]) for one in charts)
    return f'<div class="charts">{drawn}</div>'


def _explanations_section(found: dict, summary: dict, records: Records, names) -> str:
    score = explanations.agreement(found)
    rows = {name: i for i, name in enumerate(records.names)}
    chosen = found["probs"].argmax(1)
    scales = [pictures.common_scale(found[name]) for name in explanations.MAPS]
    figure = []
    for i in np.argsort(score):  # The worst first; flat maps (NaN) at the end.
        gray = pictures.shrink(
            records.images[rows[found["names"][i]]][..., 0], gallery.PICTURE
        )
        maps = [found[name][i].astype(np.float32) for name in explanations.MAPS]
        agreement = "no agreement defined: a map is flat"
        if np.isfinite(score[i]):
            agreement = f"agreement {score[i]:+.2f}"
        caption = (
            f"{agreement}. {found['names'][i]}: true {names[found['labels'][i]]}, "
            f"predicted {names[chosen[i]]}"
        )
        picture = page.embedded(
            pictures.encode(pictures.row(gray, maps, scales), "JPEG"),
            f"{caption}, image and maps",
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

    def mean(key: str) -> str:
        value = summary[key]["mean"]
        return f"{value:.2f}" if scores.defined(value) else scores.UNDEFINED

    table = page.table(
        ("Map", *known.values()),
        [
            (title, *(mean(f"{key}/{name}") for key in known))
            for name, title in explanations.MAPS.items()
        ],
        f"Means over {len(score)} images. Flat or empty maps agree without meaning it",
    )
    return page.section(
        "Do the explanations agree?",
        f"<p>Left to right: image, {', '.join(explanations.MAPS.values())}, each of "
        "the predicted class and each kind on one scale of its own. Agreement is the "
        "mean rank correlation of the three maps, 1 if they order the regions equally; "
        "it says nothing about being right. "
        f"{len(score)} images, least agreement first.</p>",
        table,
        f'<div class="gallery wide">{"".join(figure)}</div>',
    )


def _calibration_section(fitted: dict, positive: str) -> str:
    def point(row: dict) -> tuple[str, ...]:
        title = scores.operating_point(row)
        if not scores.defined(row["threshold"]):
            return (title, *[scores.UNATTAINABLE] * 2)
        shares = (scores.percent(row[key]) for key in ("sensitivity", "specificity"))
        return (title, *shares)

    sets = [
        (
            f"Coverage {scores.percent(row['coverage_wanted'])}",
            scores.percent(row["coverage"]),
            scores.percent(row["single_class_share"]),
            scores.percent(row.get("empty_share")),
            f"{row['mean_set_size']:.2f}",
        )
        for row in fitted["conformal"]
    ]
    return page.section(
        "Calibration and operating points",
        f"<p>Fitted on {fitted['held_out']} validation images, measured on the test "
        f"images. Temperature {fitted['temperature']:.2f}: expected calibration error "
        f"{scores.percent(fitted['ece_before'])} before, "
        f"{scores.percent(fitted['ece_after'])} after.</p>",
        page.table(
            (f"Wanted: threshold on {positive}", "Sensitivity", "Specificity"),
            map(point, fitted["operating_points"]),
        ),
        page.table(
            (
                "Prediction sets",
                "True class in the set",
                "One class",
                "Empty",
                "Classes per image",
            ),
            sets,
        ),
        "<p>A prediction set holds every class that cannot be ruled out at the wanted "
        "coverage. With one class the answer is clear; with several, or with none "
        "(an image unlike any validation image of any class), it is inconclusive. "
        "Many empty sets mean that the network is surer than the wanted coverage "
        "asks for.</p>",
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
    title = "Score while the most relevant cells are removed"
    return page.section(
        "Test-time voting",
        f"<p>{k} masks, threshold {theta}: {len(flips)} labels flipped, {helped} of "
        f"them to the true class. A label flips if more than {k / 2:g} votes oppose "
        "it.</p>",
        '<div class="charts wide">'
        f"{page.chart(figures.to_svg(figure, title), title)}</div>",
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
    return page.table(
        ("Flipped image", "True", "Before", "After", "Votes against"), rows
    )
