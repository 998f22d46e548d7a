"""predictions.csv: one row per image, written as they are predicted, read to resume.

The page and the patient table are made from the rows alone, so a run that was stopped
and continued gives the same result as one that was not.
"""

import csv
import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cxai_jax import disk
from cxai_jax.data import tables
from cxai_jax.inference import choices, decisions, shown_maps
from cxai_jax.inference.predictor import Predicted, Trained
from cxai_jax.report import page, pictures
from cxai_jax.report.prediction_page import prediction_report
from cxai_jax.report.scores import percent

OVERLAY_HEIGHT = 320  # Pixels at most.
SEPARATOR = " | "  # Of the classes in a prediction set.
LARGE = 500  # Rows from which the page has smaller pictures.
QUALITY = 90  # Of an overlay's JPEG file.
HEIGHTS = (224, 72)  # Pixels of the pictures of a page, a large page.


class Prepared(NamedTuple):
    """One slice, reduced to what is still needed of it."""

    name: str
    patient: str
    flags: list[str]
    input: np.ndarray  # uint8 [S, S, C]
    shown: np.ndarray  # uint8 [H, W], at most OVERLAY_HEIGHT high


class Table:
    """The rows of one output folder.

    Args:
      path: the CSV file.
      class_names: K names; each gives a column p_<name>.
      keep: rows that are written first, from `read`.
      site_names: sites whose answers have columns of their own, NAME@SITE.
    """

    def __init__(
        self,
        path: Path,
        class_names: Sequence[str],
        keep: Sequence[dict],
        site_names: Sequence[str] = (),
    ):
        columns = _columns(class_names, site_names)
        self.rows = list(keep)
        temporary = path.with_suffix(".tmp")
        # A DICOM file may name a patient with what is no character.
        text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
        with temporary.open("w", **text) as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(map(tables.guarded_row, keep))
        temporary.replace(path)
        self._file = path.open("a", **text)
        self._writer = csv.DictWriter(self._file, columns)

    def add(self, rows: Sequence[dict]) -> None:
        """Appends rows to the file at once; missing columns stay empty."""
        rows = [{"error": "", **row} for row in rows]
        self._writer.writerows(map(tables.guarded_row, rows))
        self._file.flush()
        self.rows += [row for row in rows if not row["error"]]

    def close(self) -> None:
        self._file.close()


def _columns(class_names: Sequence[str], site_names: Sequence[str]) -> list[str]:
    columns = ["file", "patient", "probability", "label_before", "label"]
    columns += ["calibrated", "decision", "prediction_set"]
    columns += ["opposing_votes", "votes_cast", "flags", "overlay"]
    answers = [f"p_{name}" for name in class_names]
    columns += answers
    columns += [f"{n}@{site}" for site in site_names for n in ["label", *answers]]
    # Last of all, so that a row cut short by a crash is seen to lack it.
    return [*columns, "error"]


def read(
    path: Path, class_names: Sequence[str], site_names: Sequence[str] = ()
) -> list[dict]:
    """The complete rows of a predictions.csv; rows with an error are left out.

    Raises:
      ValueError: if it is no such table.
    """
    rows, columns = [], _columns(class_names, site_names)
    for number, row in enumerate(tables.read_rows(path, strict=False), 1):
        if row.get("error", "damaged") != "":
            continue
        try:
            if list(row) != columns:
                raise ValueError(f"expected the columns {', '.join(columns)}")
            row = {column: tables.unguarded(cell) for column, cell in row.items()}
            for column, cell in row.items():
                if column.startswith(("probability", "calibrated", "p_")):
                    float(cell)
                elif column.startswith("label"):
                    class_names.index(cell)
            if row["votes_cast"] or row["opposing_votes"]:
                int(row["votes_cast"]), int(row["opposing_votes"])
        except ValueError as error:
            raise ValueError(f"{path} is damaged in row {number}: {error}") from None
        rows.append(row)
    return rows


def overlay_name(name: str) -> str:
    """A file name for the overlay of an image: legible, safe and unique."""
    stem = re.sub(r"[^\w.-]+", "_", Path(name).name)[:60]
    return f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.jpg"


class Answer(NamedTuple):
    """How a run answers: its model, the map that is drawn, the rule of decision."""

    model: Trained
    kind: str  # Of choices.MAPS.
    rule: decisions.Rule
    features: dict  # Of novelty.load_features.
    overlays: str = "all"  # Of choices.OVERLAYS: which are drawn.

    def legend(self) -> str:
        """HTML of what the colours of the maps mean."""
        scale = self.model.map_scale
        told = shown_maps.meaning(self.kind, scale)
        return page.legend(scale, choices.MAPS[self.kind], told)


def row(
    one: Prepared,
    found: Predicted,
    i: int,
    class_map: np.ndarray,
    foreign: str,
    answer: Answer,
    out: Path,
    by_site: Mapping[str, Predicted],
) -> dict:
    """The row of image `i` of a predicted batch; writes its overlay, if drawn.

    Args:
      one: the image.
      found: of its batch.
      i: its place there.
      class_map: what is drawn over it, [h, w] in the unit of shown_maps.
      foreign: what `novelty.foreign` says of it.
      answer: how the run answers.
      out: the folder.
      by_site: the answers that have columns of their own.
    """
    model, names = answer.model, answer.model.class_names
    outside = pictures.share_outside(
        class_map, pictures.body(one.shown), model.map_scale
    )
    doubts = [foreign, *one.flags, page.looks_outside(outside, "the body")]
    flags, overlay = "; ".join(filter(None, doubts)), ""
    if answer.overlays == "all" or (answer.overlays == "flagged" and flags):
        overlay = f"overlays/{overlay_name(one.name)}"
        heated = pictures.overlay(one.shown, class_map, model.map_scale)
        legend = f"{answer.kind} of {names[found.before[i]]}"
        legend += f", 0 to {model.map_scale:.3g}"
        panel = pictures.panel(one.shown, heated, legend)
        disk.write(out / overlay, pictures.encode(panel, "JPEG", quality=QUALITY))

    def chances(answer: Predicted, at: str = "") -> dict:
        probs = zip(names, answer.probs[i], strict=True)
        return {f"p_{name}{at}": f"{p:.6f}" for name, p in probs}

    columns = {}
    for site, other in by_site.items():
        columns[f"label@{site}"] = names[other.after[i]]
        columns |= chances(other, f"@{site}")
    label = int(found.after[i])
    probs = decisions.calibrated(answer.rule, found.probs[i : i + 1])[0]
    decision, candidates = decisions.decide(
        answer.rule, probs, label, model.positive, names
    )
    return {
        "file": one.name,
        "patient": one.patient,
        "probability": f"{found.probs[i, model.positive]:.6f}",
        "label_before": names[found.before[i]],
        "label": names[label],
        "calibrated": f"{probs[model.positive]:.6f}",
        "decision": page.INCONCLUSIVE if foreign else decision,
        "prediction_set": ""
        if candidates is None
        else f"{{{SEPARATOR.join(candidates)}}}",
        "opposing_votes": "" if found.opposing is None else str(found.opposing[i]),
        "votes_cast": "" if found.cast is None else str(found.cast[i]),
        "flags": flags,
        "overlay": overlay,
        **chances(found),
        **columns,
    }


def answers_by_site(row: dict, positive: str) -> tuple[str, ...]:
    """What each site says of a row's image, with the probability of `positive`."""
    return tuple(
        f"{column.removeprefix('label@')}: {label}, "
        + percent(float(row[column.replace("label", f"p_{positive}", 1)]))
        for column, label in row.items()
        if column.startswith("label@") and label
    )


def report_rows(
    rows: Sequence[dict], folder: Path, answer: Answer | None
) -> list[page.Row]:
    """Rows for the page, with pictures made from the overlays in `folder`."""
    if answer is None:
        return []
    height = HEIGHTS[len(rows) > LARGE]
    names, positive = answer.model.class_names, answer.model.positive

    def picture(row: dict) -> tuple[bytes, bytes]:
        try:
            with Image.open(folder / row["overlay"], formats=("JPEG", "PNG")) as panel:
                plain, mapped = pictures.halves(np.asarray(panel))
                both = plain[..., 1], mapped  # The image itself is gray.
                both = (pictures.shrink(half, height) for half in both)
                return tuple(pictures.encode(half, "JPEG") for half in both)
        except OSError:
            return b"", b""  # Somebody removed it; the page shows the row without it.

    shown = page.least_certain([abs(float(r["calibrated"]) - 0.5) for r in rows])
    with ThreadPoolExecutor() as pool:
        found = pool.map(picture, [rows[i] for i in shown])
        drawn = dict(zip(shown.tolist(), found, strict=True))

    def one(i: int, row: dict) -> page.Row:
        plain, mapped = drawn.get(i, (b"", b""))
        raw = np.array([float(row[f"p_{name}"]) for name in names])
        held = row["prediction_set"]
        return page.Row(
            name=row["file"],
            probability=float(row["calibrated"]),
            probs=tuple(decisions.calibrated(answer.rule, raw[None])[0]),
            before=row["label_before"],
            after=row["label"],
            opposing=int(row["opposing_votes"]) if row["opposing_votes"] else None,
            cast=int(row["votes_cast"]) if row["votes_cast"] else None,
            decision=row["decision"],
            candidates=list(filter(None, held[1:-1].split(SEPARATOR)))
            if held
            else None,
            flags=tuple(filter(None, row["flags"].split("; "))),
            patient=row["patient"],
            plain=plain,
            mapped=mapped,
            link=row["overlay"],
            answers=answers_by_site(row, names[positive]),
        )

    return [one(i, row) for i, row in enumerate(rows)]


class Patient(NamedTuple):
    """All images of one patient."""

    patient: str
    images: int
    probability: float  # Mean over the images, of the positive class.
    label: str  # Class with the largest mean probability.


def by_patient(
    rows: Sequence[dict], class_names: Sequence[str], positive: int
) -> list[Patient]:
    """Mean probabilities of the patients that have an id, in order of appearance."""
    groups: dict[str, list] = {}
    for row in rows:
        if row["patient"]:
            probs = [float(row[f"p_{name}"]) for name in class_names]
            groups.setdefault(row["patient"], []).append(probs)
    means = {patient: np.mean(probs, 0) for patient, probs in groups.items()}
    return [
        Patient(
            patient,
            len(groups[patient]),
            float(mean[positive]),
            class_names[mean.argmax()],
        )
        for patient, mean in means.items()
    ]


def finish(
    out: Path,
    rows: Sequence[dict],
    errors: Sequence[tuple[str, str]],
    answer: Answer | None,
    about: dict,
    counts: dict[str, int],
) -> None:
    """Writes report.html and, if any patient is known, patients.csv.

    `answer` is None where the run could not be loaded.
    """
    names = answer.model.class_names if answer else []
    positive = answer.model.positive if answer else 0
    patients = by_patient(rows, names, positive)
    if patients:
        text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
        with (out / "patients.csv").open("w", **text) as file:
            writer = csv.writer(file)
            writer.writerow(Patient._fields)
            writer.writerows(map(tables.guarded, map(str, one)) for one in patients)
    html = prediction_report(
        report_rows(rows, out, answer),
        errors,
        class_names=names,
        positive=positive,
        patients=patients,
        about=about,
        counts=counts,
        results=answer.model.results if answer else None,
        legend=answer.legend() if answer else "",
    )
    disk.write(out / "report.html", html)
