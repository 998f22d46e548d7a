"""The page of the predict command: the model's card, the images, what is doubtful."""

import os.path
from collections.abc import Iterable, Sequence
from html import escape

from cxai_jax.data.novelty import SEEN
from cxai_jax.report import page, scores

OPEN_ERRORS = 10  # More are folded away, so that they do not hide the images.
FOREIGN = 0.2  # Share of doubtful images from which the whole batch is doubted.


def prediction_report(
    rows: Sequence[page.Row],
    errors: Sequence[tuple[str, str]],
    *,
    class_names: Sequence[str],
    positive: int,
    patients: Iterable[tuple[str, int, float, str]],
    about: dict,
    counts: dict[str, int] | None = None,
    results: dict | None = None,
    legend: str = "",
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
      results: contents of the run's results.json, None if there is no such run.
      legend: HTML of `page.legend`, of the maps beside the images.
    """
    parts = [_card(results)] if results else []
    parts += [_doubts(rows), _overview(rows, errors, class_names, about, counts)]
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
        cells = [
            (p, str(n), scores.percent(mean), label) for p, n, mean, label in patients
        ]
        head = ("Patient", "Images", heading, "Label")
        parts.append(page.section("Patients", page.table(head, cells)))
    if rows:
        total, nearness = len(rows), [abs(row.probability - 0.5) for row in rows]
        rows = [rows[i] for i in page.least_certain(nearness)]
        prefix = os.path.commonprefix([row.name for row in rows])
        prefix = prefix[: prefix.rfind("/") + 1]
        rows = [row._replace(name=row.name.removeprefix(prefix)) for row in rows]
        parts += [
            legend,
            page.section(
                "Images",
                page.shown_note(len(rows), total, "predictions.csv"),
                f"<p>Files are in {escape(prefix)}</p>" if prefix else "",
                page.image_table(rows, class_names, positive),
            ),
        ]
    parts.append(page.details("About this prediction", about))
    title = "Predictions"
    if results:
        title += f" of {results['data']['name']} · {results['config']['model']['name']}"
    return page.whole(title, f"{len(rows)} images", list(filter(None, parts)))


def _card(results: dict) -> str:
    """What the model is and how well it did, before any of its answers."""
    data, config = results["data"], results["config"]
    of = f", of {data['positive']}"
    facts = {
        "Trained on": f"{data['name']}, {data['counts'][config['data']['fit']]} images"
        if config["data"]["fit"] in data["counts"]
        else data["name"],
        "Classes": ", ".join(data["class_names"]),
        "Split": data["split_scheme"],
        "Leakage check": data["leakage"].get("verdict", "not examined"),
    }
    values = results["metrics"]["all"]
    for key, what in (("accuracy", ""), ("recall", of), ("specificity", of)):
        facts[f"{scores.SCORES[key]}{what}"] = scores.with_interval(values, key)
    facts[f"AUC{of}"] = scores.with_interval(values, "auc")
    facts["Measured on"] = f"{values['number']} test images, percent (95 % interval)"
    fitted = results["calibration"]
    facts["Calibrated on"] = (
        f"{fitted['held_out']} validation images" if fitted else "nothing: raw scores"
    )
    model, optimiser = config["model"], config["train"]
    facts["Network"] = f"{model['name']}, {config['data']['image_size']} px"
    facts["Training"] = f"{optimiser['epochs']:g} epochs, seed {config['seed']}"
    facts["Finished"] = results.get("finished", "date not recorded")
    versions = results["versions"]
    facts["Versions"] = ", ".join(
        f"{name} {versions[name]}"
        for name in ("cxai-jax", "jax", "flax")
        if name in versions
    )
    warnings = scores.warnings_of(results)
    clean = facts["Leakage check"] == "clean" and not warnings  # Green reads as good.
    entries = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(text))}</dd></div>"
        for name, text in facts.items()
    )
    return page.section(
        "The model",
        f'<dl class="card {"fine" if clean else "warn"}">{entries}</dl>',
        *(f'<p class="verdict warn">{escape(text)}</p>' for text in warnings),
    )


def _doubts(rows: Sequence[page.Row]) -> str:
    """Banners: so many doubtful images that the batch is the wrong one; known ones."""
    known = sum(SEEN in row.flags for row in rows)
    doubtful = sum(any(flag != SEEN for flag in row.flags) for row in rows)
    told = ""
    if doubtful > FOREIGN * len(rows):
        told += (
            '<p class="verdict alarm" role="alert"><b>These may be the wrong images '
            f"for this model:</b> {doubtful} of {len(rows)} are flagged as unlike its "
            "own. Of such images its answers mean nothing, however certain they look."
            "</p>"
        )
    if known:
        told += (
            f'<p class="verdict warn"><b>{known} of {len(rows)} were {SEEN}:</b> there '
            "the answers show what the network remembers, not what it can do.</p>"
        )
    return told


def _overview(rows, errors, class_names, about: dict, counts) -> str:
    tiles = [("images predicted", len(rows))]
    tiles += [
        (f"labelled {name}", sum(row.after == name for row in rows))
        for name in class_names
    ]
    if any(row.decision for row in rows):
        unclear = sum(row.decision == page.INCONCLUSIVE for row in rows)
        tiles.append((page.INCONCLUSIVE, unclear))
    tiles += [
        ("labels flipped by voting", sum(row.before != row.after for row in rows)),
        ("images with a flag", sum(bool(row.flags) for row in rows)),
        ("files with an error", len(errors)),
    ]
    return page.section(
        "Overview",
        '<ul class="tiles">',
        *(f"<li><b>{number}</b> {escape(text)}</li>" for text, number in tiles),
        "</ul>",
        f"<p>{escape(tally_sentence(counts))}</p>" if counts else "",
        f"<p>{escape(about['decision'])}</p>" if about.get("decision") else "",
        _votes_sentence(rows, about),
    )


def tally_sentence(counts: dict[str, int]) -> str:
    """What became of the paths that were named or found; the counts add up.

    Args:
      counts: "found" = "predicted" + "failed" + "ignored" + "left"; and "unmatched",
        the rows of patients.csv that name no image.
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
