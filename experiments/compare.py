"""Systems of one config side by side: several seeds, paired differences, one table.

python -m experiments.compare configs/siteB.py baseline,short cpe,short full,short \
    --seeds=0,1,2 --set data.data_dir=data --out=runs/table2 --name=table2_site_b

A system is a list of the config's rows, and fields that only it changes behind plus
signs: `full,lite0,short+cam.mode=eval`. The first one is the reference. All systems of
a seed share split, order and, where they have the same parts, initial weights.
Finished runs under --out are taken as they are and stopped ones continued; results go
to experiments/results/NAME.json.

Scores are means over the seeds with their standard deviation, which says how much
training varies; 95 % intervals, of the scores and of the paired difference to the
reference, resample patients: one draw weighs the images of all systems and seeds.
"""

import argparse
import ast
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from cxai_jax import host
from cxai_jax.config import claim_workdir, flatten, load_config_file
from cxai_jax.scoring import evaluate, metrics
from cxai_jax.training import loop as training
from cxai_jax.training.results import versions
from cxai_jax.voting import rules
from cxai_jax.writer import write_json
from experiments.alignment import average, f1

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 2000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="file, for example configs/siteB.py")
    parser.add_argument("systems", nargs="+", help="ROWS[+FIELD=VALUE ...]")
    parser.add_argument("--seeds", default="0,1,2", help="with commas between")
    parser.add_argument("--set", nargs="*", default=[], help="FIELD=VALUE, for all")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--name", required=True, help="of the file in results/")
    options = parser.parse_args(arguments)
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
        configs = {
            system: [
                make_config(options.config, system, [*options.set, f"seed={seed}"])
                for seed in seeds
            ]
            for system in options.systems
        }
    except ValueError as error:
        parser.error(str(error))
    host.keep_freed_memory()
    cache = options.out.absolute() / "xla_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    runs = {system: [] for system in options.systems}
    for number, seed in enumerate(seeds):  # By seed: a stop leaves whole pairs.
        for system in options.systems:
            workdir = options.out / f"{system}-{seed}"
            runs[system].append(run(configs[system][number], workdir))
    table = compare(runs)
    print(describe(table))
    first = runs[options.systems[0]][0]["results"]
    write_json(
        RESULTS / f"{options.name}.json",
        {
            "data": first["data"]["name"],
            "split": first["data"]["split_scheme"],
            "leakage": first["data"]["leakage"].get("verdict"),
            "images": len(runs[options.systems[0]][0]["labels"]),
            "config file": Path(options.config).name,
            "set": [f for f in options.set if not f.startswith("data.data_dir=")],
            "seeds": seeds,
            "table": table,
            "versions": versions(),
            "device": first["device"],
        },
    )


def make_config(file: str, system: str, fields: list[str]) -> ConfigDict:
    """The config of one system.

    Args:
      file: path of a config.
      system: ROWS[+FIELD=VALUE ...].
      fields: further FIELD=VALUE.

    Raises:
      ValueError: for an unknown row or field, or a value of another type.
    """
    rows, *own = system.split("+")
    config = load_config_file(f"{file}:{rows}")
    known = flatten(json.loads(config.to_json()))
    for given in (*fields, *own):
        field, equals, value = given.partition("=")
        if not equals or field not in known:
            raise ValueError(
                f"{given!r} is not FIELD=VALUE with a field of {file}; known: "
                + ", ".join(known)
            )
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # A word.
            pass
        if isinstance(known[field], float) and isinstance(value, int):
            value = float(value)
        try:
            config.update_from_flattened_dict({field: value})
        except TypeError as error:
            raise ValueError(
                f"{given!r}: {field} is like {known[field]!r}, not {value!r}"
            ) from error
    return config


def run(config: ConfigDict, workdir: Path) -> dict:
    """Trains one network, or finds it trained; its predictions with its results."""
    claim_workdir(config, workdir)
    done = workdir / "results.json"
    if not done.exists():
        training.train(config, workdir)
    predictions = evaluate.load_predictions(
        workdir / f"predictions_{config.data.test}.npz"
    )
    del predictions["class_maps"]
    return predictions | {"results": json.loads(done.read_text())}


def compare(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Every score of every system.

    Args:
      runs: system -> its runs by seed, as `run` returns them; the first system is the
        reference. Seeds may have splits of their own, systems may not.

    Returns:
      system -> score -> {"mean", "sd", "low", "high", "seeds"} and, except for the
      reference, "difference" with mean, sd, low, high and seeds.

    Raises:
      ValueError: if two systems of a seed were tested on different images.
    """
    reference = next(iter(runs))
    for system, by_seed in runs.items():
        for seed, (one, other) in enumerate(zip(runs[reference], by_seed, strict=True)):
            if one["names"].tolist() != other["names"].tolist():
                raise ValueError(
                    f"{reference} and {system} were tested on different images, run "
                    f"{seed} of each; give both the same --set data.split"
                )
    patients = [
        np.where(r["patients"] == "", r["names"], r["patients"])
        for r in runs[reference]
    ]
    everybody = np.unique(np.concatenate(patients))
    random, count = np.random.default_rng(0), len(everybody)
    draws = random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    draws = np.concatenate([np.ones((1, count), int), draws])  # Row 0: all.
    weights = [draws[:, np.searchsorted(everybody, p)] for p in patients]
    found = {
        system: [scores(w, r) for w, r in zip(weights, by_seed, strict=True)]
        for system, by_seed in runs.items()
    }
    table = {}
    for system, by_seed in found.items():
        table[system] = {}
        for name in by_seed[0]:
            values = np.stack([s[name] for s in by_seed])  # [seeds, 1 + resamples]
            table[system][name] = spread(values)
            if system != reference and name in found[reference][0]:
                base = np.stack([s[name] for s in found[reference]])
                table[system][name]["difference"] = spread(values - base)
    return table


def spread(values: np.ndarray) -> dict:
    """Mean, deviation and interval of [seeds, 1 + resamples], column 0 unresampled."""
    low, high = np.nanpercentile(values[:, 1:].mean(0), (2.5, 97.5))
    own = values[:, 0]
    return {
        "mean": float(own.mean()),
        "sd": float(own.std(ddof=1)) if len(own) > 1 else None,
        "low": float(low),
        "high": float(high),
        "seeds": own.tolist(),
    }


def scores(weights: np.ndarray, run: dict) -> dict[str, np.ndarray]:
    """Weighted accuracy, precision, recall, F1 and AUC; all but AUC after voting too.

    Where several sites are scored, the same of each, behind "SITE: ".

    Args:
      weights: [R, N], how often each image counts.
      run: as `run` returns it.

    Returns:
      Score -> [R].
    """
    labels, probs, about = run["labels"], run["probs"], run["results"]
    positive = about["data"]["class_names"].index(about["data"]["positive"])
    chosen = {"": probs[:, 0].argmax(1)}
    if (k := probs.shape[1] - 1) > 0:
        theta = about["config"]["tta"]["theta"]
        chosen[" after voting"] = np.asarray(rules.vote(probs, theta=theta, k=k))
    places = {"": np.ones(len(labels), bool)}
    if len(about["data"]["site_names"]) > 1:
        places |= {
            f"{name}: ": run["sites"] == site
            for site, name in enumerate(about["data"]["site_names"])
            if (run["sites"] == site).any()
        }
    found = {}
    for place, here in places.items():
        own, truth = weights[:, here], labels[here]
        for when, decided in chosen.items():
            for name, value in decisions(own, truth, decided[here], positive).items():
                found[f"{place}{name}{when}"] = value
        found[f"{place}auc"] = metrics.weighted_auc(
            truth == positive, probs[here, 0, positive], own
        )
    return found


def decisions(
    weights: np.ndarray, labels: np.ndarray, chosen: np.ndarray, positive: int
) -> dict[str, np.ndarray]:
    """Weighted accuracy, and precision, recall and F1 of the positive class, each [R].

    0/0 is 0, as in `metrics.class_rates`.
    """
    ill, called = labels == positive, chosen == positive
    hits, of_called, of_ill = (weights @ x for x in (ill & called, called, ill))
    return {
        "accuracy": average(weights, labels == chosen),
        "precision": hits / np.maximum(of_called, 1),
        "recall": hits / np.maximum(of_ill, 1),
        "f1": f1(weights, labels, chosen, positive),
    }


def describe(table: dict[str, dict]) -> str:
    """The table as text, in percent."""

    def shown(value: dict, sign: str = "") -> str:
        sd = "" if value["sd"] is None else f" ± {100 * value['sd']:.1f}"
        numbers = (100 * value[key] for key in ("mean", "low", "high"))
        mean, low, high = (f"{number:{sign}.1f}" for number in numbers)
        return f"{mean}{sd} ({low} to {high})"

    lines = ["mean ± sd over seeds (95 % interval over patients), percent"]
    for system, values in table.items():
        lines.append(system)
        for name, value in values.items():
            line = f"  {name:<32} {shown(value):<28}"
            if "difference" in value:
                line += f" difference {shown(value['difference'], '+')}"
            lines.append(line.rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
