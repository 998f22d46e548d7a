"""What a finished run leaves: predictions, report and results.json."""

import json
import logging
import platform
import time
from importlib import metadata

import jax

from cxai_jax import disk
from cxai_jax import mesh as meshes
from cxai_jax.data import novelty
from cxai_jax.data.identity import identity
from cxai_jax.data.records import Dataset, Records
from cxai_jax.methods.method import Method
from cxai_jax.report import pictures
from cxai_jax.scoring import calibration, evaluate, explanations
from cxai_jax.training import selection
from cxai_jax.training.run import Run, fit_records
from cxai_jax.types import PyTree
from cxai_jax.writer import read_log, write_json

OPTIMISTIC = "best_test_epoch_accuracy (reference protocol, optimistic)"
EXPLAINED = 24  # Test images whose maps are measured where an alignment term is on.


def conclude(run: Run, method: Method, state, *, steps: int, compiled: dict) -> dict:
    """The one ending of a run: scores the selected weights and writes all files.

    Args:
      run: the run.
      method: its method.
      state: after the last step.
      steps: optimiser steps taken.
      compiled: what compiling the step took, {} where none was.

    Returns:
      The contents of results.json. Beside it lie the predictions file, what `predict`
      needs (novelty) and report.html.
    """
    disk.check(run.out)
    variables, selected = select(run, method, state)
    predictions = run.evaluator.predict(variables, run.test, stoppable=True)
    found = explain_some(run, variables)
    validation = None
    if run.validation is not None:
        validation = run.evaluator.predict(
            variables, run.validation, votes=False, stoppable=True
        )
    features = described_features(run, variables, validation)
    results = collect(run, validation, predictions) | {
        "explanations": summary_of(run, found),
        "selected": selected,
        "steps": steps,
        "time": {**compiled, "total_s": time.monotonic() - run.started},
    }
    if jax.process_index() == 0:
        novelty.save_features(run.out, features)
        write(run, results, predictions, found)
    run.checkpoints.close()
    return results


def select(run: Run, method: Method, state) -> tuple[PyTree, dict]:
    """The variables that the run's selection rule chose, and which they are."""
    rule = run.config.train.selection
    if rule == "last":
        return method.scored(state), {"rule": rule, **stopping_of(run)}
    best = run.checkpoints.restore("best", state)
    if best is None:
        raise FileNotFoundError(
            f"{run.workdir}/checkpoints/best is empty: no epoch was scored yet; "
            "continue with --mode=train"
        )
    state = meshes.put_replicated(best[0], run.mesh)
    chosen = {"rule": rule, "metric": run.config.train.select_metric, "step": best[1]}
    return method.scored(state), {**chosen, **stopping_of(run)}


def stopping_of(run: Run) -> dict:
    """What config.train.patience ended; {} where it did not."""
    if not selection.stopped(run.config, run.curve):
        return {}
    return {
        "stopped_early": {
            "step": run.curve[-1]["step"],
            "patience": run.config.train.patience,
            "metric": run.config.train.select_metric,
        }
    }


def described_features(run: Run, variables: PyTree, validation: dict | None) -> dict:
    """What tells `predict` a foreign image, from training and validation images."""
    fit = fit_records(run.sources, run.config.data.fit)
    some = fit.subset(explanations.evenly(len(fit), novelty.KEPT))
    seen = run.evaluator.predict(variables, some, votes=False, stoppable=True)
    held_out = None if validation is None else validation["pooled"]
    return novelty.describe_features(seen["pooled"], held_out)


def collect(run: Run, validation: dict | None, predictions: dict) -> dict:
    """Scores, calibration, and what the numbers are of."""
    config, dataset, split = run.config, run.tested, run.config.data.test
    calibrated = {}
    if validation is not None:
        positive = dataset.positive
        fitted = calibration.fit(
            validation["logits"], validation["labels"], positive=positive
        )
        calibrated = calibration.measure(
            fitted, predictions["logits"], predictions["labels"], positive=positive
        )
    optimistic = [row[split]["accuracy"] for row in run.curve if split in row]
    return {
        "metrics": evaluate.score(predictions, dataset, config),
        "calibration": calibrated,  # {} where no validation split was held out.
        OPTIMISTIC: max(optimistic, default=None),
        "curve": run.curve,
        "maps": {"scale": pictures.scale_of(predictions)},
        "finished": time.strftime("%Y-%m-%d"),
        "data": describe(run.dataset),
        "tested": describe(dataset),
        "pretrained": run.network.pretrained,
        "config": json.loads(config.to_json()),
        "versions": versions(),
        "device": device(),
    }


def device() -> dict:
    """What a run was computed on."""
    return {
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "hosts": jax.process_count(),
    }


def describe(dataset: Dataset) -> dict:
    """What a data set is: names, counts, fingerprint, leakage."""
    return {**identity(dataset), "leakage": dataset.leakage}


def write(run: Run, results: dict, predictions: dict, found: dict) -> None:
    """Writes the files of a finished run, results.json after what it stands for."""
    split = run.config.data.test
    warn_below_chance(results["metrics"]["all"])
    kept = evaluate.predictions_file(run.out, split)
    evaluate.save_predictions(kept, predictions)
    if found:
        name = kept.name.replace("predictions", "explanations")
        explanations.save(run.out / name, found)
    fit = fit_records(run.sources, run.config.data.fit)
    write_json(run.out / novelty.FILE, novelty.describe(fit))
    write_json(run.out / "results.json", results)
    # Here, for Matplotlib is slow to import and the first step need not wait for it.
    from cxai_jax.report.training_page import run_report

    page = run_report(
        results, predictions, run.test, read_log(run.workdir), found or None
    )
    disk.write(run.out / "report.html", page)


def warn_below_chance(scored: dict) -> None:
    """Says so if the ranking is significantly wrong, as with swapped labels."""
    _, high = scored["intervals"]["auc"]  # NaN where one class is scored.
    if high < 0.5:
        logging.warning(
            "the AUC is below chance (95 %% interval ends at %.2f): are the labels of "
            "the scored images swapped against those trained on?",
            high,
        )


def explain_some(run: Run, variables: PyTree) -> dict:
    """Maps of some test images where a saliency term was on; else {}."""
    config = run.config
    if not (config.align.weight > 0 or config.align.mask_weight > 0):
        return {}
    return explanations.explain(
        run.network.model,
        run.network.scale,
        config,
        run.evaluator.mesh,
        variables,
        explained_records(run),
    )


def explained_records(run: Run) -> Records:
    return run.test.subset(explanations.evenly(len(run.test), EXPLAINED))


def summary_of(run: Run, found: dict) -> dict:
    """Explanation metrics over the images whose maps were made."""
    if not found:
        return {}
    masks = explanations.lung_masks(explained_records(run), run.config.data.image_size)
    return explanations.summarise(explanations.measure(found, masks))


def versions() -> dict:
    """Versions of everything that can change a number."""
    names = ("cxai-jax", "jax", "jaxlib", "flax", "optax", "numpy", "grain", "pillow")
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in names
    }
