"""The parts of a self-contained HTML page, and the page around them.

The page needs no network and no script to be read; a short script adds sorting,
filtering, enlarging and the opacity of the maps. Its content security policy admits
that script and embedded pictures only, so a hostile file name can do nothing even if
escaping failed. Frame, style and script lie beside this file. All texts are escaped
here; what is called `parts` is HTML.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import NamedTuple

import numpy as np

from cxai_jax.report import pictures
from cxai_jax.report.scores import percent

NOTICE = "Research tool, not a medical device. Not for diagnosis or treatment."
MAX_ROWS = 5000  # Of a page's image table; it must stay usable in any browser.
INCONCLUSIVE = "inconclusive"
OUTSIDE = 0.5  # Share of a map's evidence outside the body that is worth a warning.
BARS = ("#3b82c4", "#e07a2f", "#2f9e77", "#b0569b", "#8a8f2f", "#7b6bd6")
# Shares of a row; a decision must not be broken within its word.
WIDTHS = {"Picture": 2, "File": 1.4, "Decision": 1.3, "Flags": 1.4, "By site": 1.4}


class Row(NamedTuple):
    """One image of the page's table."""

    name: str
    probability: float  # Of the positive class, unmasked image.
    before: str  # Label before voting.
    after: str  # Label after voting.
    probs: Sequence[float] = ()  # Of every class.
    opposing: int | None = None  # Votes against `before`, None without voting.
    cast: int | None = None  # Votes cast.
    decision: str = ""  # At the operating point; INCONCLUSIVE if the set is not one.
    candidates: Sequence[str] | None = None  # Prediction set; None if unknown.
    flags: Sequence[str] = ()
    patient: str = ""
    truth: str = ""
    plain: bytes = b""  # JPEG of the image,
    mapped: bytes = b""  # and of the image below its map.
    link: str = ""  # Where the full picture lies, relative to the page.
    answers: Sequence[str] = ()  # Of each site, where several were asked.


def least_certain(certainty: Sequence[float]) -> np.ndarray:
    """Numbers of the rows a page shows: all in order, or the MAX_ROWS least certain."""
    if len(certainty) <= MAX_ROWS:
        return np.arange(len(certainty))
    return np.argsort(certainty, kind="stable")[:MAX_ROWS]


def shown_note(shown: int, total: int, source: str) -> str:
    """Says that only some rows are shown, if so, and where the others are."""
    if shown == total:
        return ""
    return f"<p>The {shown} least certain of {total} images; {source} has all.</p>"


def image_table(rows: Sequence[Row], class_names, positive: int) -> str:
    """The table of single images, with what its search and filter need.

    Args:
      rows: one per image.
      class_names: K names.
      positive: the class whose probability is shown.
    """
    voted = any(row.opposing is not None for row in rows)
    decided = any(row.decision for row in rows)
    columns = {
        "Picture": any(row.plain for row in rows),
        "File": True,
        "True": any(row.truth for row in rows),
        f"Probability of {class_names[positive]}": True,
        "Label": True,
        "Decision": decided,
        "Prediction set": any(row.candidates is not None for row in rows),
        "By site": any(row.answers for row in rows),
        "Votes against": voted,
        "Flags": any(row.flags for row in rows),
        "Patient": any(row.patient for row in rows),
    }
    shown = [name for name, wanted in columns.items() if wanted]
    kinds = {f"c{i}": f"label {name}" for i, name in enumerate(class_names)}
    kinds |= {
        tag: text
        for tag, text, any_row in (
            (INCONCLUSIVE, INCONCLUSIVE, decided),
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
    pictured = ' class="pictured"' * columns["Picture"]
    grid = " ".join(f"minmax(0, {WIDTHS.get(name, 1)}fr)" for name in shown)
    body = "\n".join(_image_row(row, columns, class_names) for row in rows)
    return (
        '<div id="controls" hidden><label>Search <input type="search" id="search">'
        f'</label> <label>Show <select id="show"><option value="">all</option>{options}'
        '</select></label> <span id="count" role="status"></span></div>'
        + _colours_of(class_names, rows)
        + f'<table id="images"{pictured} style="--grid: {grid}"><thead><tr>{head}</tr>'
        f"</thead>\n<tbody>{body}</tbody></table>"
    )


def _colours_of(class_names, rows: Sequence[Row]) -> str:
    """Which colour of a stacked bar is which class, where there are more than two."""
    if len(class_names) < 3 or not any(row.probs for row in rows):
        return ""
    keys = "".join(
        f'<li><span style="background:{BARS[c % len(BARS)]}"></span>{escape(name)}</li>'
        for c, name in enumerate(class_names)
    )
    return f'<ul class="key" aria-label="Colours of the probabilities">{keys}</ul>'


def _image_row(row: Row, columns, class_names) -> str:
    flipped = row.before != row.after
    tags = [f"c{list(class_names).index(row.after)}"]
    tags += ["flipped"] * flipped + ["flagged"] * bool(row.flags)
    tags += ["wrong"] * bool(row.truth and row.truth != row.after)
    tags += [INCONCLUSIVE] * (row.decision == INCONCLUSIVE)
    name = escape(row.name)
    label = f"<bdi>{escape(row.after)}</bdi>"
    if len(class_names) > 2 and row.probs:
        chance = row.probs[list(class_names).index(row.before)]
        label += f" <small>{percent(chance)}{' before voting' * flipped}</small>"
    if flipped:
        label += f" <small>was {escape(row.before)}</small>"
    against = "" if row.opposing is None else f"{row.opposing} of {row.cast}"
    picture = pair(row.plain, row.mapped, row.name, row.link) if row.plain else ""
    if row.link:
        name = f'<a href="{escape(row.link)}">{name}</a>'
    flags = "".join(f"<mark>{escape(flag)}</mark> " for flag in row.flags)
    candidates = ", ".join(row.candidates or ()) or "none"
    cells = (
        ("", picture),
        ("", name),
        ("", escape(row.truth)),
        (f"{row.probability:.6f}", f"{percent(row.probability)}{_bar(row)}"),
        ("", label),
        ("", f"<b>{escape(row.decision)}</b>" if row.decision else ""),
        ("", escape(candidates) if row.candidates is not None else ""),
        ("", "<br>".join(map(escape, row.answers))),
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


def _bar(row: Row) -> str:
    """The positive class's probability, or with more than two classes all, stacked."""
    if len(row.probs) < 3:
        return f'<span class="bar" style="--p:{row.probability:.3f}"></span>'
    parts = "".join(
        f'<i style="flex:{p:.3f};background:{BARS[c % len(BARS)]}"></i>'
        for c, p in enumerate(row.probs)
    )
    return f'<span class="bar stacked">{parts}</span>'


def embedded(jpeg: bytes, description: str, kind: str = "") -> str:
    """An image element that holds the picture itself."""
    data = base64.b64encode(jpeg).decode()
    kind = f' class="{kind}"' if kind else ""
    return (
        f'<img{kind} src="data:image/jpeg;base64,{data}" alt="{escape(description)}" '
        'loading="lazy" decoding="async">'
    )


def pair(plain: bytes, mapped: bytes, name: str, link: str = "") -> str:
    """Image and overlay, which the script enlarges and fades: JPEG files of one size.

    Args:
      plain: the image.
      mapped: the image below its map.
      name: what they show.
      link: where the full picture lies.
    """
    full = f' data-link="{escape(link)}"' if link else ""
    return (
        f'<span class="pair"{full}>{embedded(plain, name)}<span class="over">'
        f"{embedded(mapped, f'{name}, with map', 'map')}</span></span>"
    )


def pictured(plain: bytes, mapped: bytes, caption: str, warning: str = "") -> str:
    """A `pair` with its caption and, where the map looks elsewhere, a warning."""
    told = f" <mark>{escape(warning)}</mark>" if warning else ""
    return (
        f"<figure>{pair(plain, mapped, caption)}"
        f"<figcaption>{escape(caption)}{told}</figcaption></figure>"
    )


def looks_outside(share: float, where: str) -> str:
    """A warning if most of a map's evidence lies outside of `where`; else ""."""
    if share <= OUTSIDE:
        return ""
    return f"{100 * share:.0f} % of the map's evidence lies outside {where}"


def evidence(scale: float) -> str:
    """What the highest colour of a map of evidence stands for, in a sentence."""
    return (
        f"The highest colour is evidence that would raise the logit of the class by "
        f"{scale:.3g} above the mean of all classes if it filled the image; a region "
        "counts by its share of the image."
    )


def legend(scale: float, kind: str, meaning: str) -> str:
    """What the colours of the maps mean, and the slider of their opacity.

    Args:
      scale: value of the highest colour, logits.
      kind: what map it is.
      meaning: what the highest colour stands for, in a sentence.
    """
    places = np.linspace(0, 1, 9)
    stops = ", ".join(
        "rgb({:.0f} {:.0f} {:.0f})".format(*rgb) for rgb in pictures.colours(places)
    )
    ends = "".join(f"<span>{scale * share:.3g}</span>" for share in (0, 0.5, 1))
    return section(
        "How to read the maps",
        '<div id="legend"><div class="scale"><div role="img" aria-label="Colour bar, '
        f'from no evidence to {scale:.3g}" style="background: linear-gradient(to '
        f'right, {stops})"></div><div class="ends">{ends}</div></div>'
        '<label id="fade" hidden>Opacity of the maps <input type="range" min="0" '
        'max="100" value="100"></label></div>',
        f"<p>{escape(kind)}, of the class that the network predicts before voting; one "
        f"scale for all images of this model. {escape(meaning)} No "
        "colour is no evidence, or evidence against. Contours run at a quarter, half "
        "and three quarters of the scale; bright tissue carries contours only, so "
        "that it stays visible. A map shows what moved the network, not where the "
        "disease is.</p>",
    )


def chart(svg: str, caption: str) -> str:
    """A drawing with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption="") -> str:
    """A plain table; the first cell of a row is its heading."""
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


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def details(title: str, about: dict) -> str:
    """JSON values, folded away."""
    text = escape(json.dumps(about, indent=1, default=str))
    return f"<details><summary>{escape(title)}</summary><pre>{text}</pre></details>"


def whole(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """The page of these sections."""
    html, style, script = (
        (resources.files(__name__) / f"page.{kind}").read_text("utf-8")
        for kind in ("html", "css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(html).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        notice=NOTICE,
        style=style,
        script=script,
        digest=digest,
        body="\n".join(parts),
    )
