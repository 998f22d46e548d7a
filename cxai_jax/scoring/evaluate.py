"""Data split -> predictions file -> metrics.

The predictions file is the border: metrics, tables, figures and the (k, theta) sweeps
read it and never load a model.
"""

from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from cxai_jax import disk, progress, signals
from cxai_jax import mesh as meshes
from cxai_jax.data import pipeline
from cxai_jax.data.augment import Scale
from cxai_jax.data.records import Dataset, Records
from cxai_jax.scoring import metrics
from cxai_jax.types import PyTree
from cxai_jax.voting import rules
from cxai_jax.voting.forward import make_predict_step


class Evaluator:
    """A compiled predict step; made once per run, used for every split."""

    def __init__(self, model: nn.Module, scale: Scale, config, mesh: Mesh):
        meshes.check_batch(config.eval.batch_size, mesh, "config.eval.batch_size")
        self.mesh = mesh
        self._config = config

        # Every host needs the whole answer, so the outputs are replicated.
        def compiled(tta_config):
            step = make_predict_step(model, scale, tta_config)
            return jax.jit(step, out_shardings=meshes.replicated(mesh))

        self._predict = self._look = compiled(config.tta)
        if config.tta.k:
            plain = config.tta.copy_and_resolve_references()
            plain.k = 0
            self._look = compiled(plain)

    def predict(
        self,
        variables: PyTree,
        records: Records,
        *,
        votes: bool = True,
        stoppable: bool = False,
    ) -> dict:
        """Predictions of a split as NumPy arrays, one row per image, in order.

        Args:
          variables: params and batch_stats, on any devices.
          records: the split.
          votes: False runs only the images themselves, whatever `tta.k`.
          stoppable: a signal ends the process, as is right where nothing is lost that
            was not saved.

        Returns:
          names, patients str [N]; labels, sites int32 [N]; logits float32 [N, K];
          probs float32 [N, k+1, K], variant 0 the image itself; class_maps float32
          [N, h, w, K]; pooled float32 [N, D], the features that the head saw.
        """
        config = self._config
        fit = pipeline.fit_for_scoring(config)
        channels = records.images[0].shape[-1]
        canvas = (config.data.image_size, config.data.image_size, channels)
        run, parts, done = self._predict if votes else self._look, [], 0
        variables = jax.device_put(variables, meshes.replicated(self.mesh))
        ends = signals.at_once("in scoring") if stoppable else nullcontext()
        with progress.stage("scoring", len(records)) as show, ends:
            for batch, rows in pipeline.scoring_batches(
                records, fit, canvas, config.eval.batch_size, self.mesh
            ):
                if stoppable:
                    signals.stop_if_asked("in scoring")
                out = jax.device_get(run(variables, batch.images, batch.sites))
                parts.append({name: value[: len(rows)] for name, value in out.items()})
                show(done := done + len(rows))
        stacked = {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
        return {
            "names": np.asarray(records.names, str),
            "patients": np.asarray(records.patients, str),
            "labels": np.asarray(records.labels, np.int32),
            "sites": np.asarray(records.sites, np.int32),
            **stacked,
        }


def save_predictions(path: Path, predictions: dict) -> None:
    """Writes the predictions file (npz), without the pooled features."""
    kept = {name: value for name, value in predictions.items() if name != "pooled"}
    disk.write_arrays(path, kept)


def load_predictions(path: Path) -> dict:
    """Reads a predictions file.

    Raises:
      ValueError: if an array is missing.
    """
    with np.load(path, allow_pickle=False) as file:
        predictions = dict(file)
    wanted = {"names", "labels", "sites", "patients", "logits", "probs", "class_maps"}
    missing = wanted - predictions.keys()
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(sorted(missing))}; it is not a predictions file "
            "of this version, score the run again with --mode=eval"
        )
    return predictions


def quick_score(predictions: dict, positive: int, also: str = "accuracy") -> dict:
    """Accuracy, F1, cross-entropy and the score `also`, without intervals."""
    labels, probs = predictions["labels"], predictions["probs"][:, 0]
    values = metrics.classification_metrics(labels, probs, positive=positive)
    chosen = probs[np.arange(len(labels)), labels]
    return {
        also: values[also],
        "accuracy": values["accuracy"],
        "f1": values["f1"],
        "cross_entropy": float(-np.log(np.maximum(chosen, 1e-12)).mean()),
    }


def score(predictions: dict, dataset: Dataset, config) -> dict:
    """Metrics with bootstrap 95 % intervals: all, per site, per patient, after voting.

    Intervals resample patients; an image without a patient id is its own patient.
    `voted` and `voted_per_site` lack what labels alone do not have
    (`metrics.OF_PROBABILITIES`).
    """
    labels, sites = predictions["labels"], predictions["sites"]
    probs, patients = predictions["probs"], predictions["patients"]
    groups = np.where(patients == "", predictions["names"], patients)

    def scored(rows, probs, labels=labels, groups=groups):
        labels, probs, groups = labels[rows], probs[rows], groups[rows]
        positive = dataset.positive
        values = metrics.classification_metrics(labels, probs, positive=positive)
        intervals = metrics.bootstrap_intervals(
            labels,
            probs,
            positive=positive,
            patients=groups,
            resamples=config.eval.bootstrap,
        )
        return values | {"intervals": intervals, "number": len(labels)}

    everything = np.arange(len(labels))
    original = probs[:, 0]
    result = {"all": scored(everything, original)}
    if probs.shape[2] > 2:
        result["per_class"] = per_class(labels, original, dataset.class_names)
    places = {
        name: np.flatnonzero(sites == site)
        for site, name in enumerate(dataset.site_names)
        if (sites == site).any() and len(dataset.site_names) > 1
    }
    if places:
        result["per_site"] = {n: scored(rows, original) for n, rows in places.items()}
    one_label = patients != ""
    for patient in np.unique(patients[one_label]):
        same = patients == patient
        if len(np.unique(labels[same])) > 1:  # Images before and after the disease.
            one_label &= ~same
    if one_label.any():
        known, means, ids = metrics.by_patient(
            labels[one_label], original[one_label], patients[one_label]
        )
        result["per_patient"] = scored(np.arange(len(ids)), means, known, ids)
    if probs.shape[1] > 1:
        result |= voted(predictions, config, scored, everything, places)
    return result


def per_class(labels: np.ndarray, probs: np.ndarray, class_names) -> dict[str, dict]:
    """Name -> images of each class, and what `all` does not say of every class."""
    rates = metrics.class_rates(
        metrics.confusion(labels, probs.argmax(1), len(class_names))
    )
    return {
        name: {
            "number": int((labels == c).sum()),
            "specificity": float(rates["specificity"][c]),
            "f1": float(rates["f1"][c]),
            "auc": metrics.auc(labels == c, probs[:, c]),
        }
        for c, name in enumerate(class_names)
    }


def voted(predictions: dict, config, scored, everything, places: dict) -> dict:
    """Scores after test-time voting, and every image whose label it changed.

    Args:
      scored: rows, probs -> scores with intervals.
      everything: all row numbers.
      places: site name -> row numbers; {} where there is one site.
    """
    probs = predictions["probs"]
    votes = rules.votes_for(probs, theta=config.tta.theta, k=probs.shape[1] - 1)
    after, before = np.asarray(votes.labels), np.asarray(votes.original)
    flips = [
        {
            "name": str(predictions["names"][i]),
            "label": int(predictions["labels"][i]),
            "before": int(before[i]),
            "after": int(after[i]),
            "opposing": int(votes.opposing[i]),
        }
        for i in np.flatnonzero(before != after)
    ]
    hard = np.eye(probs.shape[2])[after]

    def of_labels(rows):
        values = scored(rows, hard)
        for name in metrics.OF_PROBABILITIES:
            del values[name]
            values["intervals"].pop(name, None)
        return values

    result = {"voted": of_labels(everything), "flips": flips}
    if places:
        result["voted_per_site"] = {n: of_labels(rows) for n, rows in places.items()}
    return result


def predictions_file(workdir: Path, split: str) -> Path:
    """Where a run keeps the predictions of a split, e.g. "test" or "usps:test"."""
    return workdir / f"predictions_{split.replace(':', '_')}.npz"
