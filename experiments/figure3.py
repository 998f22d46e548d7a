"""Figure 3 of the CT paper: accuracy against k, theta and the number of CPE patches.

python -m experiments.figure3 --predictions runs/b/predictions_test.npz --out fig3.png
python -m experiments.figure3 --predictions ... --runs runs/n2-* runs/n3-* --out ...

Panels a and b are read off one predictions file with the largest k: its masks are
nested, so no model is needed. Panel c takes finished runs that differ in
config.cpe.num_patches and the seed. The paper's k and theta were chosen on the test
split; give a validation file to choose, and the test file only to look.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from cxai_jax.report import figures
from cxai_jax.scoring import evaluate
from cxai_jax.voting import rules

THETAS = np.round(np.arange(0.05, 0.51, 0.05), 2)


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
      predictions: contents of a predictions file.
      k: masks in panel b.
      theta: threshold in panel a.

    Returns:
      `ks` and `by_k`, `thetas` and `by_theta`, and `without`, the accuracy without
      voting.

    Raises:
      ValueError: if the file has fewer than k masks.
    """
    most = predictions["probs"].shape[1] - 1
    if most < max(k, 1):
        raise ValueError(
            f"the predictions hold {most} masks, {k} were asked for; score the run "
            f"again with --mode=eval --config.tta.k={k}"
        )
    ks = np.arange(1, most + 1)
    return {
        "ks": ks,
        "by_k": [accuracy(predictions, k=int(n), theta=theta) for n in ks],
        "thetas": THETAS,
        "by_theta": [accuracy(predictions, k=k, theta=float(t)) for t in THETAS],
        "without": accuracy(predictions, k=0, theta=theta),
    }


def by_patches(runs: Sequence[Path]) -> dict[int, list[float]]:
    """config.cpe.num_patches -> test accuracies of the runs, one per seed."""
    found = defaultdict(list)
    for run in runs:
        results = json.loads((run / "results.json").read_text())
        scored = results["metrics"]["all"]["accuracy"]
        found[results["config"]["cpe"]["num_patches"]].append(scored)
    return dict(sorted(found.items()))


def draw(swept: dict, patches: dict, *, k: int, theta: float) -> Figure:
    """The panels side by side; panel c only if there are runs."""
    count = 2 + bool(patches)
    with rc_context(figures.STYLE):
        figure = Figure((4 * count, 3.2), layout="constrained")
        panels = figure.subplots(1, count, sharey=True)
        panels[0].plot(swept["ks"], swept["by_k"], label=f"theta = {theta}")
        panels[0].set(xlabel="k, masked cells", ylabel="accuracy", title="a")
        panels[1].plot(swept["thetas"], swept["by_theta"], label=f"k = {k}")
        panels[1].set(xlabel="theta", title="b")
        for panel in panels[:2]:
            panel.axhline(
                swept["without"], color=figures.INK, ls="--", lw=0.9, label="no voting"
            )
            panel.legend()
        if patches:
            means = [np.mean(values) for values in patches.values()]
            spread = [
                np.std(values, ddof=1) if len(values) > 1 else 0.0
                for values in patches.values()
            ]
            panels[2].errorbar(list(patches), means, spread, marker="o", capsize=3)
            panels[2].set(xlabel="n, patches per group (CPE)", title="c")
            panels[2].set_xticks(list(patches))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.figure3")
    parser.add_argument("--predictions", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--k", type=int, default=31)
    parser.add_argument("--theta", type=float, default=0.2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    predictions = evaluate.load_predictions(given.predictions)
    swept = sweep(predictions, k=given.k, theta=given.theta)
    patches = by_patches(given.runs)
    figures.save(draw(swept, patches, k=given.k, theta=given.theta), given.out)
    print(f"no voting  {swept['without']:.4f}")
    for n, value in zip(swept["ks"], swept["by_k"], strict=True):
        print(f"k {n:3d}  theta {given.theta:.2f}  {value:.4f}")
    for t, value in zip(swept["thetas"], swept["by_theta"], strict=True):
        print(f"k {given.k:3d}  theta {t:.2f}  {value:.4f}")
    for n, values in patches.items():
        print(f"n {n:3d}  {np.mean(values):.4f}  ({len(values)} runs)")


if __name__ == "__main__":
    main()
