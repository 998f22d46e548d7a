"""Systems of one config side by side: folds, seeds, paired differences, one table.

python -m experiments.compare configs/siteB.py --rows baseline,short full,short \
    --backbone=lite0 --folds=5 --seeds=0,1 --set data.data_dir=data --name=rows_site_b

A system is a list of the config's rows, and fields that only it changes behind plus
signs: `full,short+cam.mode=eval`. The first one is the reference. All systems of a seed
share split, order and, where they have the same parts, initial weights. With --folds
every image of the data set is tested, each by the network that has not seen it.

A finished run is one small file in experiments/results/NAME/. Runs whose file is there
are not repeated, stopped ones (under --out) go on, so a campaign continues on another
day or machine; runs go fold by fold, so that whatever is finished can be compared.
Table: experiments/results/NAME.json, .md and .tex; see `paired` for its intervals.
"""

import argparse
import ast
import json
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from cxai_jax import data, host
from cxai_jax.config import claim_workdir, flatten, load_config_file
from cxai_jax.data.folds import ORDERED
from cxai_jax.models import MODELS
from cxai_jax.scoring import evaluate
from cxai_jax.training import loop as training
from cxai_jax.training.results import OPTIMISTIC, versions
from cxai_jax.voting import rules
from cxai_jax.writer import read_log, write_json
from experiments import kept_runs, paired

RESULTS = Path(__file__).parent / "results"
# Slices of a patient where only their order is known: site A has 2,482 of 120 patients
# (Soares et al., 2020).
STACK = 20


class Job(NamedTuple):
    """One run of a campaign; `name` is that of its file."""

    system: str
    seed: int
    config: ConfigDict

    @property
    def fold(self) -> str:
        return self.config.data.fold

    @property
    def name(self) -> str:
        parts = (self.config.data.name, self.system, self.fold, f"s{self.seed}")
        return re.sub(r"[^\w.=-]+", "_", "_".join(filter(None, parts)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="file, for example configs/siteB.py")
    parser.add_argument("--rows", nargs="+", required=True, help="ROWS[+FIELD=VALUE]")
    parser.add_argument("--seeds", default="0,1,2", help="with commas between")
    parser.add_argument("--folds", type=int, help="default: the split as prepared")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--backbone", help="a row such as lite0, or a model's name")
    parser.add_argument("--size", type=int, help="pixels, side of the input")
    parser.add_argument("--set", nargs="*", default=[], help="FIELD=VALUE, for all")
    parser.add_argument("--out", type=Path, help="of the workdirs; default runs/NAME")
    parser.add_argument("--name", required=True, help="of folder and table in results/")
    parser.add_argument("--max_minutes", type=float, help="begin no run after that")
    parser.add_argument(
        "--average", action="store_true", help="the seeds' networks together, as well"
    )
    parser.add_argument("--list", action="store_true", help="say what is finished")
    options = parser.parse_args(arguments)
    folder = RESULTS / options.name
    try:
        jobs = plan(
            options.config,
            {row: row for row in options.rows},
            seeds=[int(seed) for seed in options.seeds.split(",")],
            folds=fold_names(options.folds),
            fields=[*fields_of(options), *options.set],
            backbone=options.backbone,
        )
        if not options.list:
            out = options.out or Path("runs", options.name)
            run_all(jobs, folder, out, minutes=options.max_minutes)
        print(listed(jobs, folder))
        cells = finished(jobs, folder)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if options.list:
        return
    if not all(cells.values()):
        sys.exit("not every row has a finished run: no table yet")
    runs = balanced(cells)
    if options.average:
        runs |= {
            f"{system}, {len(by_seed)} networks averaged": paired.averaged(by_seed)
            for system, by_seed in runs.items()
            if len(by_seed) > 1
        }
    table = paired.compare(runs)
    print(paired.describe(table))
    write_table(RESULTS / options.name, table, about(jobs, folder, runs))


def fields_of(options: argparse.Namespace) -> list[str]:
    """The fields behind --epochs and --size."""
    fields = [] if options.epochs is None else [f"train.epochs={options.epochs}"]
    return fields + (sized(options.size) if options.size else [])


def sized(size: int) -> list[str]:
    """Fields of an input of `size` pixels: its crop margin, and cells, about 28 a side.

    A cell's side divides `size`; of several as near to size / 28 the smaller is taken.
    """
    patch = min(
        (side for side in range(1, size + 1) if size % side == 0),
        key=lambda side: abs(side - size / 28),
    )
    return [
        f"data.image_size={size}",
        f"data.resize={round(size * 15 / 14)}",
        f"tta.patch={patch}",
    ]


def fold_names(folds: int | None) -> list[str]:
    """["1of5", ...], or [""] for the split as prepared.

    Raises:
      ValueError: for fewer than two folds.
    """
    if folds is not None and folds < 2:
        raise ValueError(f"--folds={folds}; expected 2 or more, or none of it")
    return [f"{i + 1}of{folds}" for i in range(folds)] if folds else [""]


def plan(
    file: str,
    systems: dict[str, str],
    *,
    seeds: Sequence[int],
    folds: Sequence[str],
    fields: Sequence[str],
    backbone: str | None = None,
) -> list[Job]:
    """All runs of a campaign: seed by seed, fold by fold, system by system.

    Args:
      file: path of a config.
      systems: name -> ROWS[+FIELD=VALUE ...].
      folds: values of `config.data.fold`.
      fields: FIELD=VALUE, for all.
      backbone: a row, or a key of MODELS.

    Raises:
      ValueError: as `make_config`, or for an unknown backbone.
    """
    words, fields = "", list(fields)
    if backbone in MODELS:
        fields.append(f"model.name={backbone}")
    elif backbone:
        words = f",{backbone}"
    return [
        Job(name, seed, make_config(file, system, given, words))
        for seed in seeds
        for fold in folds
        for given in [[*fields, f"seed={seed}", f"data.fold='{fold}'"]]
        for name, system in systems.items()
    ]


def make_config(
    file: str, system: str, fields: list[str], words: str = ""
) -> ConfigDict:
    """The config of one system.

    Args:
      file: path of a config.
      system: ROWS[+FIELD=VALUE ...].
      fields: further FIELD=VALUE.
      words: further rows, with a comma before each.

    Raises:
      ValueError: for an unknown row or field, or a value of another type.
    """
    rows, *own = re.split(r"\+(?=[\w.]+=)", system)  # train+val is one value.
    config = load_config_file(f"{file}:{rows}{words}")
    known = flatten(json.loads(config.to_json()))
    for given in (*fields, *own):
        field, equals, text = given.partition("=")
        if not equals or field not in known:
            raise ValueError(
                f"{given!r} is not FIELD=VALUE with a field of {file}; known: "
                + ", ".join(known)
            )
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):  # A word.
            value = text
        if isinstance(known[field], str) and not isinstance(value, str):
            value = text  # Class weights such as 1,3.
        if isinstance(known[field], float) and isinstance(value, int):
            value = float(value)
        try:
            config.update_from_flattened_dict({field: value})
        except TypeError as error:
            raise ValueError(
                f"{given!r}: {field} is like {known[field]!r}, not {value!r}"
            ) from error
    return config


def run_all(
    jobs: Sequence[Job],
    folder: Path,
    out: Path,
    *,
    minutes: float | None = None,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> None:
    """Runs the jobs that have no file yet; one that diverges is told and passed over.

    Args:
      folder: where the files of finished runs are.
      out: where runs have their workdirs until they are finished.
      minutes: none is begun that would end later, by the median of those before.

    Raises:
      ValueError: if a file is there that is of another run.
    """
    host.keep_freed_memory()
    cache = out.absolute() / "xla_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    fingerprints: dict[str, str] = {}
    for job in jobs:  # All are checked first, before any time is spent.
        path = folder / f"{job.name}.json"
        if path.exists():
            given = job.config.data
            key = given.to_json()
            if key not in fingerprints:
                fingerprints[key] = data.load(given).fingerprint
            wanted = {
                "config": config_of(job),
                "versions": versions(),
                "fingerprint": fingerprints[key],
            }
            kept_runs.check(path, kept_runs.read(path), wanted)
    begun, seconds = time.monotonic(), []
    missing = [job for job in jobs if not (folder / f"{job.name}.json").exists()]
    for number, job in enumerate(missing, 1):
        started = time.monotonic()
        expected = statistics.median(seconds) if seconds else 0.0
        if minutes is not None and started - begun + expected > 60 * minutes:
            say(f"{minutes:g} minutes are over; {len(missing) - number + 1} runs left")
            return
        try:
            results, predictions = run(job.config, out / job.name)
        except FloatingPointError as error:
            say(f"{job.name} FAILED: {error}")
            continue
        keep(folder / f"{job.name}.json", job, results, predictions)
        shutil.rmtree(out / job.name)
        jax.clear_caches()
        seconds.append(time.monotonic() - started)
        left = statistics.median(seconds) * (len(missing) - number) / 60
        right = np.mean(predictions["chosen"] == predictions["labels"])
        say(
            f"[{number}/{len(missing)}] {job.name}: accuracy {100 * right:.1f} "
            f"({seconds[-1]:.0f} s; about {left:.0f} minutes left)"
        )


def run(config: ConfigDict, workdir: Path) -> tuple[dict, dict]:
    """Trains one network, or finds it trained: results and predictions to keep."""
    claim_workdir(config, workdir)
    done = workdir / "results.json"
    if not done.exists():
        training.train(config, workdir)
    found = evaluate.load_predictions(
        evaluate.predictions_file(workdir, config.data.test)
    )
    predictions = {n: found[n] for n in ("names", "patients", "labels", "sites")}
    predictions["probs"] = found["probs"][:, 0]
    predictions["chosen"] = found["probs"][:, 0].argmax(1)
    if (k := found["probs"].shape[1] - 1) > 0:
        votes = rules.votes_for(found["probs"], theta=config.tta.theta, k=k)
        predictions["voted"] = np.asarray(votes.labels)
        predictions["opposing"] = np.asarray(votes.opposing)
    losses = [row["loss"] for row in read_log(workdir) if "loss" in row]
    results = json.loads(done.read_text())
    return results | {"loss": [losses[0], losses[-1]]}, predictions


def keep(path: Path, job: Job, results: dict, predictions: dict) -> None:
    """Writes the file of a finished run."""
    described = results["data"]
    described["leakage"] = described["leakage"].get("verdict")
    scored = [row for row in results["curve"] if "val" in row]
    curve = {"step": [row["step"] for row in scored]}
    for name in ("accuracy", "cross_entropy"):
        curve[name] = [round(row["val"][name], 4) for row in scored]
    about = {
        "system": job.system,
        "seed": job.seed,
        "fold": job.fold,
        "config": config_of(job),
        "data": described,
        "versions": results["versions"],
        "device": results["device"],
        "steps": results["steps"],
        "seconds": round(results.get("time", {}).get("total_s", 0)),
        "curve": curve,  # Of validation.
        "loss": results["loss"],  # Of the first and the last logged steps.
        "best test epoch": results[OPTIMISTIC],
    }
    kept_runs.keep(path, about, predictions)


def config_of(job: Job) -> dict:
    """The job's config without the place of data and weights."""
    config = json.loads(job.config.to_json())
    del config["data"]["data_dir"]
    weights = config["model"]["pretrained"]
    config["model"]["pretrained"] = weights.replace("\\", "/").split("/")[-1]
    return config


def listed(jobs: Sequence[Job], folder: Path) -> str:
    """Which runs are finished, a line for each system and seed."""
    lines = {}
    for job in jobs:
        there = (folder / f"{job.name}.json").exists()
        mark = (job.fold or "run") if there else "-"
        lines.setdefault((job.system, job.seed), []).append(mark)
    done = sum(mark != "-" for marks in lines.values() for mark in marks)
    return f"{done} of {len(jobs)} runs are finished\n" + "\n".join(
        f"  {system:<24} seed {seed}: {' '.join(marks)}"
        for (system, seed), marks in lines.items()
    )


def finished(jobs: Sequence[Job], folder: Path) -> dict[str, dict]:
    """system -> (seed, fold) -> the run as `paired.compare` wants it.

    Validation images are in more than one fold: there an image counts once a fold, and
    without a known patient it is its own.

    Raises:
      ValueError: if a file is there that is of another config or version.
    """
    cells = {job.system: {} for job in jobs}
    for job in jobs:
        path = folder / f"{job.name}.json"
        if path.exists():
            kept = kept_runs.read(path)
            wanted = {"config": config_of(job), "versions": versions()}
            kept_runs.check(path, kept, wanted)
            described = kept["data"]
            names = described["class_names"]
            found = kept["predictions"]
            found["patients"] = stacks(found, described["site_names"])
            if job.fold and job.config.data.test != "test":
                found["patients"] = paired.persons(found)
                found["names"] = np.char.add(f"{job.fold} ", found["names"])
            cells[job.system][job.seed, job.fold] = found | {
                "positive": names.index(described["positive"]),
                "site_names": described["site_names"],
                "class_names": names,
                "rated": names if len(names) > 2 else [],
            }
    return cells


def stacks(found: dict, site_names: Sequence[str]) -> np.ndarray:
    """Patients [N]; where a site has none but an order, STACK neighbours are one.

    Neighbouring slices are of one patient and err together: taken as independent, they
    would make every interval too narrow.

    Args:
      found: "names", "patients" and "sites" [N].
    """
    patients = found["patients"].astype(object)
    for site, site_name in enumerate(site_names):
        rows = np.flatnonzero(found["sites"] == site)
        if site_name in ORDERED and (patients[rows] == "").all():
            for row in rows:
                name = str(found["names"][row])
                stack = ORDERED[site_name](name) // STACK
                patients[row] = f"{name.rpartition('(')[0]}stack {stack}"
    return patients.astype(str)


def balanced(cells: dict[str, dict]) -> dict[str, dict[int, dict]]:
    """The folds of each seed pooled, of what all systems have finished.

    Of the seeds those with most folds are taken, so that no image counts more.

    Raises:
      ValueError: if the systems have no finished run in common.
    """
    common = set.intersection(*(set(of) for of in cells.values())) if cells else set()
    if not common:
        raise ValueError(f"{', '.join(cells)} have no finished fold and seed in common")
    folds = {s: sorted(f for t, f in common if t == s) for s, _ in sorted(common)}
    most = max(map(len, folds.values()))
    return {
        system: {
            seed: paired.pool([of[seed, fold] for fold in chosen])
            for seed, chosen in folds.items()
            if len(chosen) == most
        }
        for system, of in cells.items()
    }


def about(jobs: Sequence[Job], folder: Path, runs: dict) -> dict:
    """What a table was made of."""
    kept = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in (folder / f"{job.name}.json" for job in jobs)
        if path.exists()
    ]
    by_seed = next(iter(runs.values()))

    def distinct(values):
        return list(dict.fromkeys(values))

    return {
        "data": distinct(k["data"]["name"] for k in kept),
        "split": distinct(k["data"]["split_scheme"] for k in kept),
        "leakage": distinct(k["data"]["leakage"] for k in kept),
        "images": {str(s): len(run["labels"]) for s, run in by_seed.items()},
        "seeds": list(by_seed),
        "runs": len(kept),
        "minutes": round(sum(k["seconds"] for k in kept) / 60),
        "device": distinct(k["device"]["kind"] for k in kept),
        "versions": {
            name: distinct(k["versions"][name] for k in kept)
            for name in kept[0]["versions"]
        },
    }


def write_table(path: Path, table: dict, described: dict) -> None:
    """Writes PATH.json, .md and .tex."""
    write_pages(path, {**described, "table": table}, paired.pages(table))


def write_pages(path: Path, described: dict, pages: Sequence[paired.Page]) -> None:
    """Writes `described`, see `about`, with its table, and pages for reading."""
    write_json(path.with_name(f"{path.name}.json"), described)
    note = (
        f"{', '.join(described['data'])}, test images {described['images']}, "
        f"{described['runs']} runs, percent.\n\n"
    )
    path.with_name(f"{path.name}.md").write_text(note + paired.markdown(pages), "utf-8")
    path.with_name(f"{path.name}.tex").write_text(
        f"% {note}{paired.latex(pages)}", "utf-8"
    )


if __name__ == "__main__":
    main()
