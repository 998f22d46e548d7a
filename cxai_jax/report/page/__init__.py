"""The parts of a self-contained HTML page, and the page around them.

The page needs no network and no script to be read; a short script adds sorting and
filtering. Its content security policy admits that script and embedded pictures only,
so a hostile file name can do nothing even if escaping failed. Frame, style and script
lie beside this file. All texts are escaped here; what is called `parts` is HTML.
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

from cxai_jax.report import figures

NOTICE = "Research tool, not a medical device. Not for diagnosis or treatment."
MAX_ROWS = 5000  # Of a page's image table; it must stay usable in any browser.


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
    columns = {
        "Picture": any(row.picture for row in rows),
        "File": True,
        "True": any(row.truth for row in rows),
        f"Probability of {class_names[positive]}": True,
        "Label": True,
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
    body = "\n".join(_image_row(row, shown, columns, class_names) for row in rows)
    return (
        '<div id="controls" hidden><label>Search <input type="search" id="search">'
        f'</label> <label>Show <select id="show"><option value="">all</option>{options}'
        '</select></label> <span id="count" role="status"></span></div>'
        f'<table id="images"{pictured}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table>"
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
    picture = embedded(row.picture, row.name) if row.picture else ""
    if row.link:
        name = f'<a href="{escape(row.link)}">{name}</a>'
    bar = f'<span class="bar" style="--p:{row.probability:.3f}"></span>'
    flags = "".join(f"<mark>{escape(flag)}</mark> " for flag in row.flags)
    cells = (
        ("", picture),
        ("", name),
        ("", escape(row.truth)),
        (f"{row.probability:.6f}", f"{percent(row.probability)}{bar}"),
        ("", label),
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


def embedded(jpeg: bytes, description: str) -> str:
    """An image element that holds the picture itself."""
    data = base64.b64encode(jpeg).decode()
    return (
        f'<img src="data:image/jpeg;base64,{data}" alt="{escape(description)}, image '
        'and class map" loading="lazy" decoding="async">'
    )


def chart(figure, caption: str) -> str:
    """A Matplotlib figure with its caption."""
    svg = figures.to_svg(figure, caption)
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


def percent(value: float) -> str:
    """0.913 -> "91.3 %"."""
    return f"{100 * value:.1f} %"
