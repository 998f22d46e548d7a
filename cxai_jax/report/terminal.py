"""The table that a run prints at its end."""

from collections.abc import Sequence

from cxai_jax.report import scores


def summary(results: dict) -> str:
    """Every score with its 95 % interval, and what a reader must know of them."""
    data, scored = results["data"], results["metrics"]
    split = results["config"]["data"]["test"]
    keys = (*scores.HARD, *scores.RANKING)
    lines = [["", *(scores.SCORES[key] for key in keys)]]
    for name, values in scores.groups(scored):
        lines.append([name, *(scores.with_interval(values, key) for key in keys)])
    flips = scored.get("flips")
    return "\n".join(
        [
            f"{data['name']}, {split} split ({data['split_scheme']}), "
            f"{scored['all']['number']} images, percent with 95 % interval; positive "
            f"class: {data['positive']}",
            *aligned(lines),
            *per_class(scored, data["class_names"]),
            *stopped(results),
            *([] if flips is None else [f"labels flipped by voting: {len(flips)}"]),
            f"leakage: {data['leakage'].get('verdict', 'not examined')}",
            *(f"warning: {text}" for text in scores.warnings_of(results)),
        ]
    )


def per_class(scored: dict, names: Sequence[str]) -> list[str]:
    """A row per class where there are more than two; else []."""
    head = ["each class", "Images", *(scores.SCORES[key] for key in scores.OF_CLASS)]
    rows = scores.class_rows(scored, names)
    return aligned([head, *rows]) if rows else []


def stopped(results: dict) -> list[str]:
    """What is said of a run that config.train.patience ended."""
    if not (early := (results.get("selected") or {}).get("stopped_early")):
        return []
    return [
        f"stopped early at step {early['step']}: {early['patience']} evaluations "
        f"without a better {early['metric']} on validation"
    ]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Cells padded to columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
