"""External validation: a finished run on data of another origin (`--mode=eval --on=`).

`--on` names a data set as config.data.name does, or the path of a prepared one.
Nothing is fitted to the new images: weights, temperature, thresholds and prediction
sets are those that the run chose on its own validation images. Everything is written to
`WORKDIR/eval/NAME`; the run's own files stay as they are.
"""

import dataclasses
import json
import logging
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from cxai_jax import data, disk, models
from cxai_jax import mesh as meshes
from cxai_jax.config import claim_workdir
from cxai_jax.data import novelty
from cxai_jax.data.records import Dataset, Records
from cxai_jax.inference.predictor import Trained, load
from cxai_jax.report import pictures
from cxai_jax.report.external import external_report
from cxai_jax.scoring import calibration, evaluate
from cxai_jax.training.results import describe, device, versions
from cxai_jax.training.run import records_of
from cxai_jax.writer import write_json

EXAMPLES = 5  # Names listed per finding.


class Place(NamedTuple):
    """What --on names."""

    dataset: str  # As config.data.name.
    splits: str  # As config.data.test.
    folder: str  # Under WORKDIR/eval.
    data_dir: str = ""  # As config.data.data_dir; "" is that of the run.


def parse(on: str) -> Place:
    """A data set and its splits: "folder:b", "site_a:train+val" or "data/b:val".

    Raises:
      ValueError: for an unknown data set, a path without a prepared one, or a word too
        many.
    """
    kind, *words = on.split(":")
    data_dir = ""
    if kind in data.DATASETS:
        named = [words.pop(0)] if kind in data.NAMED and words else []
    elif kind and any(Path(kind).glob("*/*/summary.json")):
        path = Path(os.path.abspath(kind))
        data_dir, kind = str(path.parent), path.name
        named = []
        if kind not in data.DATASETS:
            kind, named = "folder", [kind]
    splits = words.pop(0) if words else "test"
    if kind not in data.DATASETS or words or not splits:
        raise ValueError(
            f"--on={on}: name a prepared data set, {', '.join(data.DATASETS)}, "
            "folder:NAME, tfds:NAME or the path DATA_DIR/NAME of one, and after a "
            "colon its splits where they are not `test`, for example site_a:val+test"
        )
    name = ":".join([kind, *named])
    # Names have no @, so no two data sets and splits share a folder.
    label = re.sub(r"[^\w.-]", "@", name.removeprefix("folder:"))
    label += "" if splits == "test" else f"@{splits}"
    return Place(name, splits, label, data_dir)


def score_external(config: ConfigDict, workdir: Path, on: str) -> tuple[Path, dict]:
    """Scores the run in `workdir` on other data.

    Args:
      config: the run's, with other `eval`, `tta` or `data.data_dir` if wanted.
      workdir: of a finished run.
      on: see `parse`.

    Returns:
      WORKDIR/eval/NAME, and the contents of results.json in it, whose `run` are the
      run's own scores.

    Raises:
      ValueError: for data with other classes, channels or, where the network has parts
        of each, sites; another config; or a run that is not finished (FileNotFoundError
        too).
    """
    started, place = time.monotonic(), parse(on)
    claim_workdir(config, workdir, write=False)
    trained = load(workdir)
    own = trained.results
    known = novelty.load(workdir)
    config = scored_config(config, place)
    dataset = open_dataset(config, trained, on)
    records = records_of({place.dataset: dataset}, config.data.test, "--on")
    mesh = meshes.scoring_mesh(config.eval.batch_size)
    evaluator = evaluate.Evaluator(trained.model, trained.scale, config, mesh)
    variables = meshes.put_replicated(trained.variables, mesh)
    predictions = evaluator.predict(variables, records)
    tested = describe(dataset)
    found = overlap(records, known, config.data.image_size)
    results = {
        "on": on,
        "metrics": evaluate.score(predictions, dataset, config),
        "calibration": apply_calibration(own, predictions, trained.positive),
        "overlap": found,
        "data": tested | {"counts": {place.splits: len(records)}, "leakage": found},
        "run": {key: own.get(key) for key in ("data", "metrics", "calibration")}
        | {"step": trained.step, "test": trained.config.data.test},
        "curve": [],
        "maps": own.get("maps") or {"scale": pictures.scale_of(predictions)},
        "selected": own.get("selected") or {},
        "time": {"total_s": time.monotonic() - started},
        "config": json.loads(config.to_json()),
        "versions": versions(),
        "device": device(),
    }
    out = workdir / "eval" / place.folder
    if jax.process_index() == 0:
        write(workdir, out, results, predictions, records)
    return out, results


def scored_config(config: ConfigDict, place: Place) -> ConfigDict:
    """The run's config with the other data in the place of its own."""
    changed = ConfigDict(config.to_dict())
    changed.data.update(name=place.dataset, split="", fold="")
    changed.data.data_dir = place.data_dir or config.data.data_dir
    named = [f"{place.dataset}:{split}" for split in place.splits.split("+")]
    changed.data.test = "+".join(named)
    return changed


def open_dataset(config: ConfigDict, trained: Trained, on: str) -> Dataset:
    """The other data, with the run's order of classes and positive class.

    Raises:
      ValueError: if they have other classes or channels, or sites unknown to a network
        that has parts of each.
    """
    dataset, run = data.load(config.data), trained.config
    if sorted(dataset.class_names) != sorted(trained.class_names):
        raise ValueError(
            f"--on={on} has the classes {', '.join(dataset.class_names)} and the run "
            f"{', '.join(trained.class_names)}; prepare it with the same names"
        )
    data.check_channels(run.data.name, config.data.name, f"--on={on}")
    if models.needs_site(run.model) and list(dataset.site_names) != trained.site_names:
        raise ValueError(
            f"--on={on}: the network of this run has parts of its own for the sites "
            f"{', '.join(trained.site_names)} and none for those of these data, "
            f"{', '.join(dataset.site_names)}; test a run with config.model.norm=plain"
        )
    positive = trained.class_names[trained.positive]
    if dataset.class_names[dataset.positive] != positive:
        logging.warning(
            "--on=%s was prepared with the positive class %s; scored with the run's, "
            "%s",
            on,
            dataset.class_names[dataset.positive],
            positive,
        )
    label = np.array([trained.class_names.index(c) for c in dataset.class_names])
    return dataclasses.replace(
        dataset,
        splits={
            name: dataclasses.replace(r, labels=label[r.labels].astype(np.int32))
            for name, r in dataset.splits.items()
        },
        class_names=tuple(trained.class_names),
        positive=trained.positive,
    )


def overlap(records: Records, known: dict, input_size: int) -> dict:
    """Which of the images were trained on, and how many are unlike those that were.

    Args:
      records: the images that are scored.
      known: `novelty.load` of the run.
      input_size: pixels, side of the network's input.

    Returns:
      JSON values: number of images seen in training, some of their names, the number
      with each other flag, and the verdict in one line.
    """

    def look(i):
        return novelty.flags(novelty.as_gray(records.images[i]), known, input_size)

    with ThreadPoolExecutor() as pool:
        flags = list(pool.map(look, range(len(records))))
    seen = [i for i, found in enumerate(flags) if novelty.SEEN in found]
    others = [flag for found in flags for flag in found if flag != novelty.SEEN]
    counts = {flag: others.count(flag) for flag in sorted(set(others))}
    total = len(records)
    verdict = "no image was seen in training"
    if seen:
        verdict = f"LEAKS: {len(seen)} of {total} images were seen in training"
    if unlike := sum(bool(set(found) - {novelty.SEEN}) for found in flags):
        verdict += f"; {unlike} of {total} are outside the range of the training images"
    return {
        "seen_in_training": len(seen),
        "examples": [str(records.names[i]) for i in seen[:EXAMPLES]],
        "flags": counts,
        "verdict": verdict,
    }


def apply_calibration(own: dict, predictions: dict, positive: int) -> dict:
    """The run's temperature, thresholds and prediction sets on other images.

    {} where the run held out no validation images.
    """
    fitted = own.get("calibration")
    if not fitted:
        return {}
    kept = [row for row in fitted["conformal"] if "quantile" in row]  # Newer runs.
    return calibration.measure(
        fitted | {"conformal": kept},
        predictions["logits"],
        predictions["labels"],
        positive=positive,
    )


def write(
    workdir: Path, out: Path, results: dict, predictions: dict, records: Records
) -> None:
    """Writes results.json, the predictions file and report.html of other data."""
    out.mkdir(parents=True, exist_ok=True)
    evaluate.save_predictions(out / "predictions.npz", predictions)
    write_json(out / "results.json", results)
    before = evaluate.predictions_file(workdir, results["run"]["test"])
    own = evaluate.load_predictions(before) if before.exists() else None
    page = external_report(results, predictions, records, own)
    disk.write(out / "report.html", page)
