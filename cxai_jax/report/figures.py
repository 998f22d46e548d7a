"""Charts of results as Matplotlib figures; pictures of images are in pictures.py.

The charts are drawn without a background and with one ink, so that `to_svg` can hand
the ink to the page (`currentColor`) and a chart follows its light or dark theme.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure

INK = "#010203"  # Near black on paper, the page's own text colour in an SVG.
COLOURS = ("#3b82c4", "#e07a2f", "#2f9e77", "#b0569b", "#8a8f2f", "#7b6bd6")
LOSS_TERMS = ("cross_entropy", "cpe", "contrastive", "align", "outside_mask")
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
STYLE = {
    "svg.fonttype": "none",  # Text stays text: searchable and read aloud.
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
}


@contextmanager
def chart(width: float = 4.4, height: float = 3.4):
    """A styled figure of the given inches and its axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((width, height), layout="constrained")
        yield figure, figure.subplots()


def to_svg(figure: Figure, description: str) -> str:
    """The figure as an inline SVG element that takes the page's text colour."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
    text = buffer.getvalue()
    text = text[text.index("<svg ") :].replace(INK, "currentColor")
    return text.replace(
        "<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1
    )


def save(figure: Figure, path, kind: str | None = None) -> None:
    """Writes the figure on white, into a path or a file object.

    Args:
      figure: what is drawn.
      path: its suffix chooses the format,
      kind: or this does: png, jpeg, ...
    """
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=200, facecolor="white", format=kind)


def roc(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Receiver operating characteristic, one step line per entry.

    Args:
      curves: name -> (bool [N] is positive, scores [N]); equal scores make one step.
        An entry without both classes is left out.
    """
    with chart() as (figure, axes):
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        for name, (positive, scores) in curves.items():
            positive = np.asarray(positive, bool)
            if positive.all() or not positive.any():
                continue
            order = np.argsort(-np.asarray(scores), kind="stable")
            last = np.append(np.diff(np.asarray(scores)[order]) != 0, True)
            hits = np.cumsum(positive[order])[last] / positive.sum()
            alarms = np.cumsum(~positive[order])[last] / (~positive).sum()
            axes.plot(np.append(0, alarms), np.append(0, hits), label=name)
        axes.set(xlabel="1 - specificity", ylabel="sensitivity")
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        if len(axes.lines) > 1:
            figure.legend(loc="outside upper center")  # Off the lines.
    return figure


def confusion(counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Confusion matrix, counts int [K, K], row true and column predicted."""
    size = 2.2 + 0.7 * len(class_names)
    with chart(size + 0.5, size) as (figure, axes):
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        cells = np.zeros((*counts.shape, 4))
        cells[..., :3] = matplotlib.colors.to_rgb(COLOURS[0])
        cells[..., 3] = 0.75 * share  # Transparent where empty: any theme shows.
        axes.imshow(cells)
        for (row, column), count in np.ndenumerate(counts):
            text = f"{count}\n{100 * share[row, column]:.0f} %"
            axes.text(column, row, text, ha="center", va="center")
        ticks = range(len(class_names))
        axes.set_xticks(ticks, class_names)
        axes.set_yticks(ticks, class_names, rotation=90, va="center")
        axes.set(xlabel="predicted", ylabel="true")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure


def reliability(labels: np.ndarray, probs: np.ndarray, bins: int = 10) -> Figure:
    """Reliability diagram: share correct against confidence, and how many images.

    Args:
      labels: int [N].
      probs: [N, K]; the confidence is the row's maximum.
      bins: equal widths over 0..1, right-closed; empty ones are not drawn.
    """
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    used = count > 0
    mean = np.bincount(place, confidence, bins)[used] / count[used]
    share = np.bincount(place, correct, bins)[used] / count[used]
    with chart() as (figure, axes):
        left = np.arange(bins) / bins
        axes.bar(
            left, count / count.max(), 1 / bins, align="edge", color=INK, alpha=0.12
        )
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
        axes.plot(mean, share, marker="o", label="share correct")
        low = 1 / probs.shape[1] - 0.05
        axes.set(xlim=(low, 1.01), ylim=(-0.01, 1.05))
        axes.set(xlabel="confidence", ylabel="share correct (bars: share of images)")
    return figure


def training_loss(log: Sequence[dict]) -> Figure:
    """The training loss and its terms by step, from the rows of metrics.jsonl."""
    rows = [row for row in log if "loss" in row]
    steps = [row["step"] for row in rows]
    terms = dict.fromkeys(name for row in rows for name in row)
    with chart() as (figure, axes):
        for name in ("loss", *(t for t in terms if t in LOSS_TERMS)):
            axes.plot(
                steps, np.array([row.get(name) for row in rows], float), label=name
            )
        axes.set(xlabel="step", ylabel="training loss")
        figure.legend(loc="outside upper center", ncols=2)  # Off the lines.
    return figure


def accuracy_curves(curve: Sequence[dict]) -> Figure:
    """Accuracy by step of every scored split.

    Args:
      curve: rows {"step": s, split: {"accuracy": a, ...}, ...}, as in results.json.
    """
    with chart() as (figure, axes):
        for split in dict.fromkeys(k for row in curve for k in row if k != "step"):
            scored = [row for row in curve if split in row]
            axes.plot(
                [row["step"] for row in scored],
                [row[split]["accuracy"] for row in scored],
                marker=".",
                label=split,
            )
        axes.set(xlabel="step", ylabel="accuracy")
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def trajectories(
    probs: Mapping[str, np.ndarray], labels: Mapping[str, int], *, theta: float
) -> Figure:
    """Probability of the first label while its best cells disappear (Fig. 6).

    Args:
      probs: name -> p_0 .. p_k of one image, [k+1, K].
      labels: name -> label before voting.
      theta: support threshold; the shaded range below it opposes. Exact for two
        classes; with more a vote opposes if one other class reaches 1 - theta.
    """
    with chart(4.4, 3.0 + 0.2 * len(probs)) as (figure, axes):
        for name, values in probs.items():
            short = name if len(name) <= 52 else f"{name[:25]}…{name[-25:]}"
            axes.plot(values[:, labels[name]], label=short)
        axes.axhspan(0, theta, color=INK, alpha=0.08, linewidth=0)
        axes.set(xlabel="cells removed", ylabel="probability of the first label")
        axes.set_ylim(-0.02, 1.02)
        axes.margins(x=0.01)
        if probs:
            figure.legend(loc="outside lower left", fontsize=9)
    return figure
