"""Results for people: the terminal's closing table and one self-contained HTML page.

The page needs no network and no script to be read; a short script adds sorting and
filtering. Its content security policy admits that script and embedded pictures only,
so a hostile file name can do nothing even if escaping failed.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import NamedTuple

import numpy as np

from cxai_jax import figures, metrics, tta
from cxai_jax.data.records import Records

NOTICE = "Research tool, not a medical device. Not for diagnosis or treatment."
SCORES = {  # Key in results.json -> heading.
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
    "auc": "AUC",
    "ece": "ECE",
}
HARD = ("accuracy", "precision", "recall", "specificity", "f1")  # Need no score.
MAX_ROWS = 5000  # Of a run's table; a page must stay usable in any browser.
EXAMPLES = 4  # Pictures per kind: certain and right, certain and wrong, flipped.


class Row(NamedTuple):
    """One image of the page's table."""

    name: str
    probability: float  # Of the positive class, unmasked image.
    before: str  # Label before voting.
    after: str  # Label after voting.
    opposing: int | None = None  # Votes against `before`, None without voting.
    cast: int | None = None  # Votes cast.
    flags: Sequence[str] = ()
    patient: str = ""
    truth: str = ""
    picture: bytes = b""  # JPEG.
    link: str = ""  # Where the full picture lies, relative to the page.


def summary(results: dict) -> str:
    """The table a run prints at its end: every score with its 95 % interval."""
    data, scored = results["data"], results["metrics"]
    lines = [["", *(SCORES[key] for key in HARD), SCORES["auc"]]]
    for name, values in _score_rows(scored):
        cells = [_with_interval(values, key) for key in (*HARD, "auc")]
        if name == "after voting":
            cells[-1] = ""
        lines.append([name, *cells])
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
            f"{data['counts'][split]} images, percent with 95 % interval",
            *table,
            *([] if flips is None else [f"labels flipped by voting: {len(flips)}"]),
            f"leakage: {data['leakage'].get('verdict', 'not examined')}",
        ]
    )


def run_report(
    results: dict, predictions: dict, records: Records, log: Sequence[dict]
) -> str:
    """The page of a finished run.

    Args:
      results: contents of results.json.
      predictions: contents of the predictions file.
      records: the scored split, for its pictures.
      log: rows of metrics.jsonl.
    """
    data, config = results["data"], results["config"]
    names, positive = data["class_names"], data["positive"]
    probs, labels = predictions["probs"], predictions["labels"]
    before, k = probs[:, 0].argmax(1), probs.shape[1] - 1
    theta = config["tta"]["theta"]
    after, opposing = before, None
    if k:
        votes = tta.votes_for(probs, theta=theta, k=k)
        after, opposing = np.asarray(votes.labels), np.asarray(votes.opposing)
    verdict = data["leakage"].get("verdict", "not examined")
    leaks = verdict != "clean"
    counts = ", ".join(f"{count} {name}" for name, count in data["counts"].items())
    parts = [
        _section(
            "Result",
            _score_table(results["metrics"]),
            f'<p class="verdict {"warn" if leaks else "fine"}"><b>Leakage check:</b> '
            f"{escape(verdict)}. Split: {escape(data['split_scheme'])}; {counts} "
            "images.</p>",
        ),
        _section("Charts", _charts(results, predictions, after, log)),
    ]
    certainty = probs[:, 0].max(1)
    right = before == labels
    kinds = {
        "Certain and right": np.flatnonzero(right)[np.argsort(-certainty[right])],
        "Certain and wrong": np.flatnonzero(~right)[np.argsort(-certainty[~right])],
        "Flipped by voting": np.flatnonzero(after != before),
    }
    parts += [
        _section(
            f"{kind}: image and class map",
            _gallery(predictions, records, names, rows[:EXAMPLES]),
        )
        for kind, rows in kinds.items()
        if len(rows)
    ]
    if k:
        parts.append(_voting_section(predictions, before, after, opposing, theta))
    shown = np.arange(len(labels))
    note = ""
    if len(shown) > MAX_ROWS:
        shown = np.argsort(certainty)[:MAX_ROWS]
        note = (
            f"<p>The {MAX_ROWS} least certain of {len(labels)} images; the predictions "
            "file has all.</p>"
        )
    rows = [
        Row(
            name=str(predictions["names"][i]),
            probability=float(probs[i, 0, positive]),
            before=names[before[i]],
            after=names[after[i]],
            opposing=int(opposing[i]) if k else None,
            cast=k or None,
            patient=str(predictions["patients"][i]),
            truth=names[labels[i]],
        )
        for i in shown
    ]
    parts.append(_section("All images", note, _image_table(rows, names, positive)))
    about = {key: results[key] for key in ("device", "versions", "selected", "config")}
    parts.append(_details("Config, versions and device", about))
    model = config["model"]["name"]
    return _page(f"{data['name']} · {model}", f"{len(labels)} test images", parts)


def prediction_report(
    rows: Sequence[Row],
    errors: Sequence[tuple[str, str]],
    *,
    class_names: Sequence[str],
    positive: int,
    patients: Sequence[tuple[str, int, float, str]],
    about: dict,
) -> str:
    """The page of the predict command.

    Args:
      rows: the predicted images.
      errors: (file, reason) of everything that could not be predicted.
      class_names: K names; empty if there is no model to name them.
      positive: the class whose probability is shown.
      patients: (patient, images, mean probability, label) of patients with an id.
      about: JSON values shown at the end: model, window and the like.
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
        _section(
            "Overview",
            '<ul class="tiles">',
            *(f"<li><b>{number}</b> {escape(text)}</li>" for text, number in tiles),
            "</ul>",
        )
    ]
    if errors:
        parts.append(
            _section(
                "Errors",
                '<p class="verdict warn">These were not predicted; everything else '
                "was.</p>",
                _table(("File", "Reason"), errors),
            )
        )
    if patients:
        heading = f"Mean probability of {class_names[positive]}"
        parts.append(
            _section(
                "Patients",
                _table(
                    ("Patient", "Images", heading, "Label"),
                    [(p, str(n), _percent(m), label) for p, n, m, label in patients],
                ),
            )
        )
    if rows:
        parts.append(_section("Images", _image_table(rows, class_names, positive)))
    parts.append(_details("About this prediction", about))
    return _page("Predictions", f"{len(rows)} images", parts)


def _score_rows(scored: dict) -> Iterable[tuple[str, dict]]:
    """(name, scores) of every group that evaluate.score made."""
    yield "all images", scored["all"]
    for site, values in scored.get("per_site", {}).items():
        yield site, values
    if "per_patient" in scored:
        yield "per patient", scored["per_patient"]
    if "voted" in scored:
        yield "after voting", scored["voted"]


def _with_interval(values: dict, key: str) -> str:
    """ "91.3 (88.0-94.1)" in percent."""
    text = f"{100 * values[key]:.1f}"
    if key in values["intervals"]:
        low, high = values["intervals"][key]
        text += f" ({100 * low:.1f}-{100 * high:.1f})"
    return text


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _score_table(scored: dict) -> str:
    rows = []
    for name, values in _score_rows(scored):
        keys = HARD if name == "after voting" else SCORES
        cells = [_with_interval(values, key) if key in keys else "" for key in SCORES]
        rows.append((name, *cells))
    note = "Percent, with the 95 % bootstrap interval in brackets"
    return _table(("", *SCORES.values()), rows, caption=note)


def _charts(results, predictions, after, log) -> str:
    data = results["data"]
    names, positive = data["class_names"], data["positive"]
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
            f"Reliability; expected calibration error {_percent(scored['ece'])}",
        )
    )
    if log:
        charts.append(
            (figures.learning_curves(results["curve"], log), "Learning curves")
        )
    return '<div class="charts">' + "".join(_chart(*c) for c in charts) + "</div>"


def _chart(figure, caption: str) -> str:
    wide = ' class="wide"' if figure.get_figwidth() > 6 else ""
    svg = figures.to_svg(figure, caption)
    return f"<figure{wide}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


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
            f"predicted {names[label]} ({_percent(probs[label])})"
        )
        picture = _picture(figures.encode(panel, "JPEG", height=256), caption)
        figure.append(
            f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return f'<div class="gallery">{"".join(figure)}</div>'


def _voting_section(predictions, before, after, opposing, theta) -> str:
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
    return _section(
        "Test-time voting",
        f"<p>{k} masks, threshold {theta}: {len(flips)} labels flipped, {helped} of "
        f"them to the true class. A label flips if more than {k / 2:g} votes oppose "
        "it.</p>",
        _chart(figure, "Score while the most relevant cells are removed"),
    )


def _image_table(rows: Sequence[Row], class_names, positive: int) -> str:
    voted = any(row.opposing is not None for row in rows)
    columns = {
        "Picture": any(row.picture for row in rows),
        "File": True,
        "True": any(row.truth for row in rows),
        f"Probability of {class_names[positive]}": True,
        "Label": True,
        "Votes against": voted,
        "Flags": any(row.flags for row in rows),
        "Patient": any(row.patient for row in rows),
    }
    shown = [name for name, wanted in columns.items() if wanted]
    kinds = {f"c{i}": f"label {name}" for i, name in enumerate(class_names)}
    kinds |= {
        tag: text
        for tag, text, any_row in (
            ("flipped", "flipped by voting", voted),
            ("flagged", "with a flag", columns["Flags"]),
            ("wrong", "wrong", columns["True"]),
        )
        if any_row
    }
    options = "".join(
        f'<option value="{tag}">{escape(text)}</option>' for tag, text in kinds.items()
    )
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in shown)
    body = "\n".join(_image_row(row, shown, columns, class_names) for row in rows)
    return (
        '<div id="controls" hidden><label>Search <input type="search" id="search">'
        f'</label> <label>Show <select id="show"><option value="">all</option>{options}'
        '</select></label> <span id="count" role="status"></span></div>'
        '<div class="scroll" role="region" aria-label="Images" tabindex="0">'
        f'<table id="images"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
        "</table></div>"
    )


def _image_row(row: Row, shown, columns, class_names) -> str:
    flipped = row.before != row.after
    tags = [f"c{list(class_names).index(row.after)}"]
    tags += ["flipped"] * flipped + ["flagged"] * bool(row.flags)
    tags += ["wrong"] * bool(row.truth and row.truth != row.after)
    name = escape(row.name)
    label = escape(row.after)
    if flipped:
        label += f" <small>was {escape(row.before)}</small>"
    against = "" if row.opposing is None else f"{row.opposing} of {row.cast}"
    picture = _picture(row.picture, row.name) if row.picture else ""
    if row.link:
        name = f'<a href="{escape(row.link)}">{name}</a>'
    bar = f'<span class="bar" style="--p:{row.probability:.3f}"></span>'
    flags = "".join(f"<mark>{escape(flag)}</mark> " for flag in row.flags)
    cells = (
        ("", picture),
        ("", name),
        ("", escape(row.truth)),
        (f"{row.probability:.6f}", f"{_percent(row.probability)}{bar}"),
        ("", label),
        ("" if row.opposing is None else row.opposing, against),
        (len(row.flags), flags),
        ("", escape(row.patient)),
    )
    html = "".join(
        f'<td data-h="{escape(heading)}"'
        + (f' data-v="{value}"' if value != "" else "")
        + f">{content}</td>"
        for (heading, wanted), (value, content) in zip(
            columns.items(), cells, strict=True
        )
        if wanted
    )
    return f'<tr data-tags="{" ".join(tags)}">{html}</tr>'


def _picture(jpeg: bytes, description: str) -> str:
    data = base64.b64encode(jpeg).decode()
    return (
        f'<img src="data:image/jpeg;base64,{data}" alt="{escape(description)}, image '
        'and class map" loading="lazy" decoding="async">'
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption="") -> str:
    headings = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(
            f'<td data-h="{escape(h)}">{escape(c)}</td>'
            for h, c in zip(head[1:], rest, strict=True)
        )
        + "</tr>"
        for first, *rest in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption or head[0])}" '
        f'tabindex="0"><table>{title}<thead><tr>{headings}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _details(title: str, about: dict) -> str:
    text = escape(json.dumps(about, indent=1, default=str))
    return f"<details><summary>{escape(title)}</summary><pre>{text}</pre></details>"


def _page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return PAGE.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        notice=NOTICE,
        style=STYLE,
        script=SCRIPT,
        digest=digest,
        body="\n".join(parts),
    )


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
img-src data:; style-src 'unsafe-inline'; script-src 'sha256-$digest'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<p id="notice">$notice</p>
<header><h1>$title</h1><p>$subtitle</p></header>
<main id="main">
$body
</main>
<script>$script</script>
</body>
</html>
""")

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f5f6f8; --ink: #1b1f24;
  --soft: #59616b; --line: #d8dce1; --accent: #1f6fb2; --warn: #fdeede;
  --warn-line: #d9762b; --fine: #e6f4ec; --fine-line: #2f8f62; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1e2226;
  --ink: #e6e9ec; --soft: #a0a8b0; --line: #363c43; --accent: #74b3e8;
  --warn: #3a2815; --warn-line: #e89550; --fine: #16301f; --fine-line: #55b488; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
#notice { margin: 0; padding: .45rem 1rem; text-align: center; font-weight: 600;
  background: var(--warn); border-bottom: 2px solid var(--warn-line); }
header, main { max-width: 76rem; margin: auto; padding: 0 1rem; }
h1 { margin: 1.2rem 0 0; font-size: 1.7rem; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--soft); }
h2 { margin: 2rem 0 .6rem; font-size: 1.2rem; }
a { color: var(--accent); }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .3rem; padding: .3rem .8rem; background: var(--page); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.verdict { padding: .6rem .9rem; border-left: 5px solid; border-radius: 4px; }
.warn { background: var(--warn); border-color: var(--warn-line); }
.fine { background: var(--fine); border-color: var(--fine-line); }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 0; padding: 0;
  list-style: none; }
.tiles li { flex: 1 1 9rem; padding: .7rem .9rem; border-radius: 8px;
  background: var(--card); color: var(--soft); font-size: .9rem; }
.tiles b { display: block; color: var(--ink); font-size: 1.6rem; line-height: 1.2; }
.charts, .gallery { display: flex; flex-wrap: wrap; gap: 1rem; align-items: stretch; }
figure { margin: 0; padding: .8rem; border-radius: 8px; background: var(--card); }
.charts figure { flex: 1 1 20rem; max-width: 27rem; }
.charts figure.wide { flex-basis: 40rem; max-width: none; }
figure svg { display: block; width: 100%; height: auto; max-height: 22rem; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.gallery figure { flex: 1 1 18rem; max-width: 36rem; }
figcaption { margin-top: .4rem; color: var(--soft); font-size: .88rem;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .4rem; text-align: left; color: var(--soft);
  font-size: .88rem; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: middle; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 600; }
tbody th { font-weight: 600; }
td small { display: block; color: var(--soft); }
td[data-h="File"], tbody th { overflow-wrap: anywhere; }
#images img { display: block; height: 88px; width: auto; border-radius: 3px; }
#images thead { position: sticky; top: 0; background: var(--page); }
th button { padding: .2rem 0; border: 0; background: none; color: inherit;
  font: inherit; text-align: left; cursor: pointer; }
th button::after { content: " \\2195"; opacity: .45; }
th[aria-sort="ascending"] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort="descending"] button::after { content: " \\2193"; opacity: 1; }
.bar { display: block; width: 6rem; height: 5px; margin-top: 3px; border-radius: 3px;
  background: linear-gradient(to right, var(--accent) calc(100% * var(--p)),
  var(--line) 0); }
mark { display: inline-block; margin: 1px 0; padding: 0 .45rem; border-radius: 9px;
  background: var(--warn); color: inherit; font-size: .85rem; }
#controls { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: center;
  margin-bottom: .6rem; }
#controls[hidden] { display: none; }
input, select { padding: .35rem .5rem; border: 1px solid var(--line);
  border-radius: 6px; background: var(--page); color: inherit; font: inherit; }
#count { color: var(--soft); }
details { margin: 2rem 0; }
pre { overflow-x: auto; padding: .8rem; border-radius: 8px; background: var(--card);
  font-size: .82rem; }
@media (max-width: 40rem) {
  table, tbody, tbody tr, tbody th, tbody td { display: block; }
  thead tr { display: flex; flex-wrap: wrap; gap: 0 .8rem; }
  table:not(#images) thead { display: none; }
  #images thead { position: static; }
  thead th { padding: .2rem 0; border: 0; }
  tbody tr { padding: .6rem 0; border-bottom: 1px solid var(--line); }
  #images tbody tr { content-visibility: auto; contain-intrinsic-size: auto 17rem; }
  tbody tr[hidden] { display: none; }
  tbody th, tbody td { padding: .1rem 0; border: 0; }
  tbody td:empty { display: none; }
  tbody td[data-h]::before { content: attr(data-h) ": "; color: var(--soft); }
  td[data-h="Picture"]::before, td[data-h="File"]::before { content: none; }
  td[data-h="File"] { font-weight: 600; }
  #images img { width: 100%; height: auto; max-width: 22rem; }
  td small { display: inline; }
}
@media print { #controls, .skip { display: none; } }
"""

SCRIPT = """
(() => {
  const table = document.getElementById("images");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows];
  const search = document.getElementById("search");
  const show = document.getElementById("show");
  const words = rows.map((row) => row.textContent.toLowerCase());
  const tags = rows.map((row) => row.dataset.tags.split(" "));
  const filter = () => {
    const text = search.value.toLowerCase();
    let shown = 0;
    rows.forEach((row, i) => {
      const keep = words[i].includes(text) &&
        (!show.value || tags[i].includes(show.value));
      row.hidden = !keep;
      shown += keep;
    });
    document.getElementById("count").textContent =
      shown + " of " + rows.length + " images";
  };
  const value = (row, column) => {
    const cell = row.cells[column];
    return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent;
  };
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    if (heading.textContent === "Picture") return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = new Intl.Collator(undefined, { numeric: true }).compare;
      const compare = (a, b) =>
        typeof a[0] === "number" && typeof b[0] === "number"
          ? a[0] - b[0] : order(a[0], b[0]);
      const keyed = rows.map((row) => [value(row, column), row]).sort(compare);
      if (!up) keyed.reverse();
      body.append(...keyed.map((pair) => pair[1]));
    });
    heading.replaceChildren(button);
  });
  search.addEventListener("input", filter);
  show.addEventListener("change", filter);
  document.getElementById("controls").hidden = false;
  filter();
})();
"""
