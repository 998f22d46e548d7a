"""Figure 3 of the CT paper: accuracy against k, theta and the number of CPE patches.

python -m experiments.figure3 --workdir runs/b-full [--patches runs/n2-* runs/n3-*]

One line for each site. Panels a and b are read off the predictions of the scored split
with the largest k: its masks are nested, so no network is needed. Panel c takes
finished runs that differ in config.cpe.num_patches and the seed. The paper chose k and
theta on the test split; look at them here, and choose with experiments.figure4.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cxai_jax.config import read_config
from cxai_jax.report import figures
from cxai_jax.voting import rules
from cxai_jax.writer import read_json
from experiments import figure_command
from experiments.figure_command import Drawn
from experiments.run_files import need_votes, read_run, source

LEAST = 0.1  # Height of the panels, accuracy.
THETAS = np.round(np.arange(0.05, 0.51, 0.05), 2)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patches", type=Path, nargs="*", default=[], help="runs of panel c"
    )


def make(given: argparse.Namespace) -> Drawn:
    run = read_run(given.workdir)
    need_votes(run)
    theta, sites = run.config.tta.theta, run.predictions["sites"]
    swept = {
        name: sweep(of_rows(run.predictions, sites == site), k=run.masks, theta=theta)
        for site, name in enumerate(run.dataset.site_names)
        if (sites == site).any()
    }
    figure = draw(swept, by_patches(given.patches), k=run.masks, theta=theta)
    numbers = ", ".join(
        f"{swept[name]['number']} of {name} (one is "
        f"{100 / swept[name]['number']:.2g} points)"
        for name in swept
    )
    return Drawn(
        figure,
        f"Accuracy after voting with the first k masked images at theta = {theta:g} "
        f"(a) and with {run.masks} of them against theta (b); dashed: without voting. "
        + (
            "c: against n of CPE, mean and sd over seeds, without voting. "
            * bool(given.patches)
        )
        + f"Images: {numbers}. These are the images that the run is scored on: a k or "
        f"theta chosen here would be chosen on them. {source(run)}",
    )


def of_rows(predictions: dict, rows: np.ndarray) -> dict:
    """Probabilities and labels of some images."""
    return {name: predictions[name][rows] for name in ("probs", "labels")}


def accuracy(predictions: dict, *, k: int, theta: float) -> float:
    """Share of right labels after voting with the first k masks; k = 0 is no voting."""
    if k == 0:
        labels = predictions["probs"][:, 0].argmax(1)
    else:
        labels = np.asarray(rules.vote(predictions["probs"], theta=theta, k=k))
    return float((labels == predictions["labels"]).mean())


def sweep(predictions: dict, *, k: int, theta: float) -> dict:
    """Accuracies behind panels a and b.

    Args:
      predictions: probs [N, k + 1 or more, K] and labels [N].
      k: masks in panel b.
      theta: threshold in panel a.

    Returns:
      `ks` and `by_k`, `thetas` and `by_theta`, `without`, the accuracy without voting,
      and `number` N.
    """
    ks = np.arange(1, predictions["probs"].shape[1])
    return {
        "ks": ks,
        "by_k": [accuracy(predictions, k=int(n), theta=theta) for n in ks],
        "thetas": THETAS,
        "by_theta": [accuracy(predictions, k=k, theta=float(t)) for t in THETAS],
        "without": accuracy(predictions, k=0, theta=theta),
        "number": len(predictions["labels"]),
    }


def by_patches(workdirs: Sequence[Path]) -> dict[int, list[float]]:
    """config.cpe.num_patches -> test accuracies of the runs, one per seed.

    Raises:
      FileNotFoundError: for a workdir without a run.
      ValueError: for one without results.
    """
    found = defaultdict(list)
    for workdir in workdirs:
        config = read_config(workdir)
        scores = read_json(workdir / "results.json", "metrics")["metrics"]
        found[config.cpe.num_patches].append(scores["all"]["accuracy"])
    return dict(sorted(found.items()))


def draw(
    swept: Mapping[str, dict],
    patches: Mapping[int, Sequence[float]],
    *,
    k: int,
    theta: float,
) -> Figure:
    """The panels side by side; panel c only if there are runs.

    Args:
      swept: name of a line -> what `sweep` returned.
      patches: n -> accuracies, one for each seed.
      k: masks in panel b.
      theta: threshold in panel a.
    """
    count = 2 + bool(patches)
    with rc_context(figures.STYLE):
        figure = Figure((3.6 * count, 3.5), layout="constrained")
        panels = figure.subplots(1, count, sharey=True)
        for colour, (name, values) in zip(figures.COLOURS, swept.items(), strict=False):
            panels[0].plot(values["ks"], values["by_k"], color=colour, label=name)
            panels[1].plot(values["thetas"], values["by_theta"], color=colour)
            for panel in panels[:2]:
                panel.axhline(values["without"], color=colour, ls="--", lw=0.9)
        panels[0].set(xlabel=f"k, masked cells (theta = {theta:g})", title="a")
        panels[0].set_ylabel("accuracy")
        panels[1].set(xlabel=f"theta (k = {k})", title="b")
        if patches:
            means = [np.mean(values) for values in patches.values()]
            spread = [
                np.std(values, ddof=1) if len(values) > 1 else 0.0
                for values in patches.values()
            ]
            panels[2].errorbar(
                list(patches), means, spread, marker="o", capsize=3, color=figures.INK
            )
            panels[2].set(xlabel="n, patches per group (CPE)", title="c")
            panels[2].set_xticks(list(patches))
        low, high = panels[0].get_ylim()
        if high - low < LEAST:  # One image must not look like a cliff.
            middle = (low + high) / 2
            panels[0].set_ylim(middle - LEAST / 2, middle + LEAST / 2)
        panels[0].plot([], [], color=figures.INK, ls="--", lw=0.9, label="no voting")
        figure.legend(loc="outside lower center", ncols=len(swept) + 1)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    figure_command.run(sys.modules[__name__], arguments)


if __name__ == "__main__":
    main()
