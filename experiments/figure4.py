"""Figure 4 of the CT paper: k, theta and n on a random 30 % of the training images.

python -m experiments.figure4 --workdir runs/b-full [--patches runs/n3-* runs/n4-*]

The run's network votes over these images; panel c adds the other runs of --patches,
which differ in config.cpe.num_patches. The paper trains on the other 70 %. A finished
run has trained on all of them unless --split names one that it has not (val, where
config.data.fit is train): the caption says which is the case.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxai_jax import data
from cxai_jax.inference import predictor
from cxai_jax.inference.predictor import Trained
from cxai_jax.mesh import make_mesh
from cxai_jax.scoring import evaluate
from experiments import figure_command
from experiments.figure3 import draw, sweep
from experiments.figure_command import Drawn
from experiments.run_files import trained_as

SHARE = 0.3  # Of the training images, as Appendix A says.
MASKS = 31  # k, where the run was not scored with voting.


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patches", type=Path, nargs="*", default=[], help="runs of panel c"
    )
    parser.add_argument("--split", default="train", help="train or val")
    parser.add_argument("--share", type=float, default=SHARE, help="of its images")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")


def make(given: argparse.Namespace) -> Drawn:
    trained = predictor.load(given.workdir)
    config = trained.config
    splits = data.load(config.data).splits
    if given.split not in splits:
        raise ValueError(
            f"{config.data.name} has no split {given.split!r}; known: "
            f"{', '.join(splits)}"
        )
    if not 0 < given.share <= 1:
        raise ValueError(f"--share={given.share} must be above 0 and at most 1")
    everything = splits[given.split]
    number = max(1, round(given.share * len(everything)))
    chosen = np.random.default_rng(given.seed).permutation(len(everything))[:number]
    records = everything.subset(np.sort(chosen))
    k = config.tta.k or MASKS
    found = predict(trained, records, k)
    patches = defaultdict(list)
    for workdir in (given.workdir, *given.patches) if given.patches else ():
        other = predictor.load(workdir)
        plain = predict(other, records, 0)
        right = plain["probs"][:, 0].argmax(1) == plain["labels"]
        patches[other.config.cpe.num_patches].append(float(right.mean()))
    theta = config.tta.theta
    figure = draw(
        {f"{number} images of {given.split}": sweep(found, k=k, theta=theta)},
        dict(sorted(patches.items())),
        k=k,
        theta=theta,
    )
    fitted = given.split in config.data.fit.split("+")
    seen = (
        "The network was trained on these very images, so all of it is too good; the "
        "paper trains on the other 70 %."
        if fitted
        else "The network was not trained on these images."
    )
    return Drawn(
        figure,
        f"As Figure 3, on a random {100 * given.share:g} % of {given.split} "
        f"({number} images, seed {given.seed}; one is {100 / number:.2g} points). "
        f"{seen} {trained_as(given.workdir, config)}.",
    )


def predict(trained: Trained, records, k: int) -> dict:
    """Predictions of a run's network with k masks."""
    config = trained.config.copy_and_resolve_references()
    config.tta.k = k
    evaluator = evaluate.Evaluator(trained.model, trained.scale, config, make_mesh())
    return evaluator.predict(trained.variables, records)


def main(arguments: Sequence[str] | None = None) -> None:
    figure_command.run(sys.modules[__name__], arguments)


if __name__ == "__main__":
    main()
