"""The early exit on a run's scored split: are its labels exact, what does it save?

python -m experiments.early_exit --run runs/b-full

The run must have been scored with voting (config.tta.k > 0): its predictions file holds
the full pass. Exit code 1 if a label differs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cxai_jax.data import transforms
from cxai_jax.inference.predictor import Predicted, Predictor, load
from cxai_jax.mesh import make_mesh
from cxai_jax.voting import rules
from experiments.run_files import read_run


def compare(probs: np.ndarray, early: Sequence[Predicted], tta_config) -> dict:
    """The full pass against the early exit.

    Args:
      probs: p_0 .. p_k of the full pass [N, k+1, K].
      early: the early exit's outcome of the same images, batch by batch.
      tta_config: config.tta of the run.

    Returns:
      images, flipped, labels_that_differ, largest_difference (of p_0),
      masked_forwards of the full pass, and votes_not_cast and forwards_saved of them;
      forwards that only fill a batch are run but cast no vote.
    """
    full = rules.votes_for(probs, theta=tta_config.theta, k=tta_config.k)
    labels = np.concatenate([batch.after for batch in early])
    first = np.concatenate([batch.probs for batch in early])
    every = tta_config.k * len(labels)
    return {
        "images": len(labels),
        "flipped": int((full.labels != full.original).sum()),
        "labels_that_differ": int((labels != full.labels).sum()),
        "largest_difference": float(np.abs(first - probs[:, 0]).max()),
        "masked_forwards": every,
        "votes_not_cast": every - int(sum(batch.cast.sum() for batch in early)),
        "forwards_saved": sum(batch.saved for batch in early),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.early_exit")
    parser.add_argument("--run", type=Path, required=True)
    given = parser.parse_args(arguments)
    run = read_run(given.run)
    probs, records = run.predictions["probs"], run.records
    if probs.shape[1] == 1:
        parser.error(f"{given.run} was scored without voting; use --config.tta.k=31")
    model = load(given.run)
    # The run may have been trained without voting and scored with it.
    model.config.tta.update({"k": probs.shape[1] - 1, "early_exit": True})
    predictor = Predictor(model, make_mesh())
    size, batch = run.config.data.image_size, predictor.batch_size
    images = np.stack([transforms.squash(image, size) for image in records.images])
    early = [
        predictor(images[i : i + batch], records.sites[i : i + batch])
        for i in range(0, len(images), batch)
    ]
    found = compare(probs, early, model.config.tta)
    print(json.dumps(found, indent=1))
    return int(found["labels_that_differ"] > 0)


if __name__ == "__main__":
    sys.exit(main())
