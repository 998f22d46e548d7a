"""What a finished run leaves: predictions, report and results.json."""

import json
import logging
import platform
from importlib import metadata

import jax

from cxai_jax import calibration, evaluate, explain, setup
from cxai_jax import mesh as meshes

EXPLAINED = 24  # Test images whose maps are measured where an alignment term is on.


def conclude(run: setup.Run, state) -> dict:
    """Scores the selected weights on the test split and collects results.json."""
    config, dataset = run.config, run.dataset
    selected = {"rule": config.train.selection}
    if config.train.selection == "best_val":
        best = run.checkpoints.restore("best", state)
        if best is None:
            raise FileNotFoundError(
                f"{run.workdir}/checkpoints/best is empty: no epoch was scored yet; "
                "continue with --mode=train"
            )
        state = meshes.put_replicated(best[0], run.mesh)
        selected["step"] = best[1]
    split = config.data.test
    predictions = run.evaluator.predict(state, dataset.splits[split])
    if jax.process_index() == 0:
        evaluate.save_predictions(run.workdir / f"predictions_{split}.npz", predictions)
    held_out = "val" in dataset.splits and "val" not in config.data.fit.split("+")
    calibrated = {}
    if held_out:
        validation = run.evaluator.predict(state, dataset.splits["val"], votes=False)
        calibrated = calibration.calibrate(
            (validation["logits"], validation["labels"]),
            (predictions["logits"], predictions["labels"]),
            positive=dataset.positive,
        )
    optimistic = [row[split]["accuracy"] for row in run.curve if split in row]
    explained = config.align.weight > 0 or config.align.mask_weight > 0
    return {
        "metrics": evaluate.score(predictions, dataset, config),
        "explanations": explain_some(run, state) if explained else {},
        "calibration": calibrated,  # {} where no validation split was held out.
        "selected": selected,
        "best_test_epoch_accuracy (reference protocol, optimistic)": max(
            optimistic, default=None
        ),
        "curve": run.curve,
        "data": {
            "name": dataset.name,
            "class_names": list(dataset.class_names),
            "positive": dataset.class_names[dataset.positive],
            "site_names": list(dataset.site_names),
            "split_scheme": dataset.split_scheme,
            "fingerprint": dataset.fingerprint,
            "counts": {name: len(records) for name, records in dataset.splits.items()},
            "leakage": dataset.leakage,
        },
        "pretrained": run.network.pretrained,
        "config": json.loads(config.to_json()),
        "versions": versions(),
        "device": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "hosts": jax.process_count(),
        },
    }


def warn_below_chance(scored: dict) -> None:
    """Says so if the ranking is significantly wrong, as with swapped labels."""
    _, high = scored["intervals"]["auc"]  # NaN where one class is scored.
    if high < 0.5:
        logging.warning(
            "the AUC is below chance (95 %% interval ends at %.2f): are the labels of "
            "the scored images swapped against those trained on?",
            high,
        )


def explain_some(run: setup.Run, state) -> dict:
    """Measures the maps of some test images and keeps them for the report."""
    config, split = run.config, run.config.data.test
    records = run.dataset.splits[split]
    records = records.subset(explain.evenly(len(records), EXPLAINED))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    found = explain.explain(
        run.network.model, run.network.scale, config, run.mesh, variables, records
    )
    if jax.process_index() == 0:
        explain.save(run.workdir / f"explanations_{split}.npz", found)
    masks = explain.lung_masks(records, config.data.image_size)
    return explain.summarise(explain.measure(found, masks))


def versions() -> dict:
    """Versions of everything that can change a number."""
    names = ("cxai-jax", "jax", "jaxlib", "flax", "optax", "numpy", "grain", "pillow")
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in names
    }
