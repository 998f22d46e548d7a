"""What a run left in its workdir, for the figures: no model is loaded."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cxai_jax import data
from cxai_jax.config import read_config
from cxai_jax.data.records import Records
from cxai_jax.scoring import evaluate


def read_run(workdir: Path) -> tuple[ConfigDict, dict, dict, Records]:
    """Config, results, predictions and the scored split of a finished run."""
    config = read_config(workdir)
    results = json.loads((workdir / "results.json").read_text())
    split = config.data.test
    predictions = evaluate.load_predictions(workdir / f"predictions_{split}.npz")
    return config, results, predictions, data.load(config.data).splits[split]


def rows_of(predictions: dict, names: Sequence[str]) -> list[int]:
    """Row numbers of images by name, or by the end of it.

    Raises:
      ValueError: if a name fits no image.
    """
    rows = []
    for name in names:
        found = np.flatnonzero(np.char.endswith(predictions["names"], name))
        if not len(found):
            raise ValueError(
                f"no image {name!r} in the predictions file; it begins with "
                f"{', '.join(predictions['names'][:3])}"
            )
        rows.append(int(found[0]))
    return rows
