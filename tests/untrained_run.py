"""A workdir as a run leaves it, with untrained weights: made without a train step."""

import json
from pathlib import Path

import jax
import numpy as np
from small import small

from cxai_jax import data
from cxai_jax.config import claim_workdir
from cxai_jax.data import novelty
from cxai_jax.data.identity import identity
from cxai_jax.scoring import evaluate
from cxai_jax.training import run as runs
from cxai_jax.training.checkpoint import Checkpoints
from cxai_jax.writer import write_json


def make_run(workdir: Path, **model_fields):
    """Fills `workdir` for a 32-pixel tiny network; returns (config, training records).

    The head is scaled up, so that probabilities spread and some votes oppose; where
    there are norms of each site, those of site 1 have other statistics.

    Args:
      workdir: an empty folder.
      **model_fields: of `config.model`.
    """
    config = small(**{"eval.batch_size": 4, "tta.theta": 0.45})
    config.model.update(model_fields)
    claim_workdir(config, workdir)
    dataset = data.load(config.data)
    network = runs.build_network(config, 2, num_sites=len(dataset.site_names))
    method = runs.make_method(config, network, total_steps=1)
    state = method.init(jax.random.key(0), network.variables)
    loud = jax.tree_util.tree_map_with_path(
        lambda path, x: 20 * x if "head" in str(path) else x,
        state.params,
    )
    stats = jax.tree.map(
        lambda x: x.at[1].add(0.5) if x.ndim > 1 else x, state.batch_stats
    )
    state = state.replace(params=loud, batch_stats=stats)
    about = {"curve": [], "data": {"": identity(dataset)}}
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save("latest", 1, state, about)
    checkpoints.wait()
    checkpoints.close()
    probs = np.full((len(dataset.splits["test"]), 1, 2), 0.5)
    test = dataset.splits["test"]
    scored = {"probs": probs, "labels": test.labels, "sites": test.sites}
    scored |= {"names": test.names, "patients": test.patients}
    data_of_run = about["data"][""] | {"leakage": {"verdict": "clean"}}
    results = {"data": data_of_run, "metrics": evaluate.score(scored, dataset, config)}
    results |= {"calibration": {}, "maps": {"scale": 10.0}, "versions": {}}
    results["config"] = json.loads(config.to_json())
    write_json(workdir / "results.json", results)
    records = dataset.splits["train"]
    write_json(workdir / novelty.FILE, novelty.describe(records))
    width = state.params["head"]["kernel"].shape[0]
    anything = {"reference": np.zeros((1, width)), "threshold": np.float32(9)}
    novelty.save_features(workdir, anything)
    return config, records
