"""Writes the table under "## Speed" of the README from results/peer_*_cpu.json.

python -m experiments.speed_table

How many times as fast as PyTorch ours is: the median over interleaved rounds, lowest
and highest in brackets. The files are of `python -m tools.benchmark --peer=torch`.
"""

import json
from pathlib import Path

from experiments.results_table import README, RESULTS, renewed

BEGIN = "<!-- The table is written by python -m experiments.speed_table. -->\n"
NETWORKS = ("efficientnet_lite0", "resnet18", "resnet50", "densenet121")
EVALUATION = "infer"
COLUMNS = {  # Heading -> suite, variant (None: the network's name) and the other side.
    "training, cross-entropy": ("step_plain", "plain", "plain"),
    "training, full method": ("step_full", "full, eval maps", "fair_eval"),
    "the same as published": ("step_full", "full, eval maps", "published"),
    "evaluation": (EVALUATION, None, "torch"),
    "31 votes, one batch": ("tta", "all", "batched"),
    "early exit, published loop": ("tta", "early_unanimous", "published"),
    "and first layers reused": ("tta", "early_unanimous_reuse", "published"),
}


def main() -> None:
    page = renewed(README.read_text("utf-8"), table(RESULTS), BEGIN)
    README.write_text(page, "utf-8")


def table(folder: Path) -> str:
    """One row per network, as Markdown."""
    head = f"| network | {' | '.join(COLUMNS)} |\n" + "|---" * (len(COLUMNS) + 1)
    lines = [head + "|\n"]
    for network in NETWORKS:
        steps = rows(folder / file_name(network))
        evaluation = rows(folder / file_name(EVALUATION))
        cells = []
        for suite, variant, other in COLUMNS.values():
            own = evaluation if suite == EVALUATION else steps
            cells.append(cell(own.get((suite, variant or network)), other))
        name = f"[{network}](experiments/results/{file_name(network)})"
        lines.append(f"| {name} | {' | '.join(cells)} |\n")
    return "".join(lines)


def file_name(name: str) -> str:
    return f"peer_{name}_cpu.json"


def rows(path: Path) -> dict[tuple[str, str], dict]:
    """(suite, variant) -> row of a benchmark's file; {} where there is none."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text("utf-8"))["rows"]
    return {(row["suite"], row["variant"]): row for row in found}


def cell(row: dict | None, other: str) -> str:
    """A ratio with its range, and whether the row was flagged."""
    if row is None:
        return "-"
    ratio = row["ratios"][other]
    text = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
    return text + (" noisy" if row["noisy"] else "") + (" unequal" * bool(row["wrong"]))


if __name__ == "__main__":
    main()
