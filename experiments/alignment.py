"""Chest X-rays with and without saliency alignment, in pairs of equal seeds.

Purwita & Qomariyah (2021) report F1 89.2 % without and 91.3 % with their loss. Their
network, data and split are not public, and the loss here is a reconstruction, so theirs
is a direction to test and no number to reproduce. Every seed has its own
patient-disjoint split, weights and order; both members of a pair share all three.
Intervals resample patients, once for all seeds and both members.

python tools/prepare_data.py --dataset=cxr --split=seed0 --source=DIR --data_dir=data
(and seed1, seed2)
python -m experiments.alignment --data_dir=data --out=runs/alignment

Finished runs are skipped; results go to experiments/results/alignment.json.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import cxr
from cxai_jax import host
from cxai_jax import mesh as meshes
from cxai_jax.config import claim_workdir
from cxai_jax.data import load as load_data
from cxai_jax.data import phantom
from cxai_jax.data.records import Mapped, Records
from cxai_jax.inference.predictor import Predictor, Trained, load
from cxai_jax.scoring import explanations
from cxai_jax.training import loop as training
from cxai_jax.training.results import versions
from cxai_jax.writer import write_json
from experiments.shortcut import predicted

RESULTS = Path(__file__).parent / "results"
PAPER = {"f1 without": 0.892, "f1 with": 0.913, "source": "Purwita & Qomariyah 2021"}
SEEDS = (0, 1, 2)
RESAMPLES = 2000
SCORES = ("f1", "macro_f1", "accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--out", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--row", default="cheap", choices=("cheap", "full", "mask"))
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--epochs", type=float, default=30.0)
    options = parser.parse_args()
    host.keep_freed_memory()
    cache = options.out.absolute() / "xla_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    pairs = []
    for seed in SEEDS:
        configs = [make_config(row, seed, options) for row in ("baseline", options.row)]
        names = [f"{row}-{seed}" for row in ("baseline", options.row)]
        pair = [
            run(config, options.out / name)
            for config, name in zip(configs, names, strict=True)
        ]
        pairs.append(tuple(pair))
    table = compare(pairs)
    print(describe(table, options.row))
    published = json.loads(configs[1].to_json())
    published["data"].pop("data_dir")  # A place on this machine.
    write_json(
        RESULTS / f"alignment_{options.row}.json",
        {
            "data": "covid-chestxray (June 2020), COVID-19 against other findings",
            "images": [len(first["labels"]) for first, _ in pairs],
            "paper (other data, network and split)": PAPER,
            "f1 of always COVID-19": always_positive(pairs),
            "table": table,
            "verdict": verdict(table),
            "seeds": SEEDS,
            "config": published,
            "versions": versions(),
            "device": jax.devices()[0].device_kind,
        },
    )


def make_config(row: str, seed: int, options: argparse.Namespace) -> ConfigDict:
    """configs/cxr.py with the given row, seed and size."""
    config = cxr.get_config(f"{row},lite0")
    config.seed = seed
    config.data.split = f"seed{seed}"
    config.data.data_dir = options.data_dir
    config.data.image_size = options.image_size
    config.data.resize = round(options.image_size * 256 / 224)
    config.train.epochs = options.epochs
    config.train.checkpoint_every_epochs = 0.0
    return config


def run(config: ConfigDict, workdir: Path) -> dict[str, np.ndarray]:
    """Trains one network, or finds it trained, and measures it; resumable.

    Returns:
      patients, labels, predicted int [N], the same with a letter pasted, and every
      explanation metric [N], NaN for images without a lung mask: only those are
      explained.
    """
    claim_workdir(config, workdir)  # What is found there must be of this config.
    done = workdir / "measured.npz"
    if not done.exists():
        training.train(config, workdir)
        model = load(workdir)
        records = load_data(config.data).splits[config.data.test]
        pasted = dataclasses.replace(records, images=Mapped(paste, records.images))
        predictor = Predictor(model, meshes.make_mesh())
        values = {
            "patients": records.patients,
            "labels": records.labels,
            "predicted": predicted(predictor, records, config),
            "predicted_pasted": predicted(predictor, pasted, config),
        }
        masked = np.array([mask is not None for mask in records.lung_masks])
        for name, value in explained(model, records.subset(masked)).items():
            values[name] = np.full(len(records), np.nan)
            values[name][masked] = value
        np.savez_compressed(done, **values)
    with np.load(done) as file:
        return dict(file)


def explained(model: Trained, records: Records) -> dict[str, np.ndarray]:
    """Every explanation metric of every image, name -> [N]."""
    found = explanations.explain(
        model.model,
        model.scale,
        model.config,
        meshes.make_mesh(),
        model.variables,
        records,
    )
    masks = explanations.lung_masks(records, model.config.data.image_size)
    return explanations.measure(found, masks)


def paste(image: np.ndarray) -> np.ndarray:
    """Burns a white R on black into the upper left corner: uint8 [H, W, C]."""
    scale = max(1, image.shape[0] // 64)
    letter = np.pad(phantom.MARKS[1], 1) * 255
    stamp = np.kron(letter, np.ones((scale, scale))).astype(np.uint8)
    image = image.copy()
    row, column = image.shape[0] // 20, image.shape[1] // 20
    image[row : row + stamp.shape[0], column : column + stamp.shape[1]] = stamp[
        ..., None
    ]
    return image


def compare(pairs: list[tuple[dict, dict]]) -> dict[str, dict]:
    """Every quantity without and with alignment, and the difference.

    Means over the seeds, with the 95 % percentile interval of a paired bootstrap: one
    draw of patients weighs the images of all seeds and of both members of each pair.
    The interval is of these trained networks; how much training itself varies shows in
    the differences of the single seeds.

    Args:
      pairs: (without, with) per seed, as `run` returns them.

    Returns:
      name -> {"without", "with", "difference", "low", "high", "seeds"}; the last is
      the difference of every seed.
    """
    patients = np.unique(np.concatenate([first["patients"] for first, _ in pairs]))
    random = np.random.default_rng(0)
    chance = np.full(len(patients), 1 / len(patients))
    draws = random.multinomial(len(patients), chance, size=RESAMPLES)
    draws = np.concatenate([np.ones((1, len(patients)), int), draws])  # Row 0: all.

    def quantity(function) -> dict:
        both = []
        for pair in pairs:
            weights = draws[:, np.searchsorted(patients, pair[0]["patients"])]
            both.append([function(weights, values, pair) for values in pair])
        both = np.array(both)  # [seeds, 2, 1 + resamples].
        without, with_ = np.nanmean(both, axis=0)
        difference = with_ - without
        low, high = np.nanpercentile(difference[1:], (2.5, 97.5))
        named = {"without": without[0], "with": with_[0], "difference": difference[0]}
        named = {k: float(v) for k, v in (named | {"low": low, "high": high}).items()}
        return named | {"seeds": (both[:, 1, 0] - both[:, 0, 0]).tolist()}

    table = {}
    for name in SCORES:
        for key, suffix in (("predicted", ""), ("predicted_pasted", ", letter pasted")):
            table[name + suffix] = quantity(
                lambda w, v, _, name=name, key=key: scores(w, v["labels"], v[key])[name]
            )
    table["decisions that the letter changes"] = quantity(
        lambda w, v, _: average(w, v["predicted"] != v["predicted_pasted"])
    )
    skipped = {"patients", "labels", "predicted", "predicted_pasted"}
    for name in (n for n in pairs[0][0] if n not in skipped):

        def mean_where_both_exist(weights, values, pair, name=name):
            exists = ~np.isnan(pair[0][name]) & ~np.isnan(pair[1][name])
            return average(weights[:, exists], values[name][exists])

        table[name] = quantity(mean_where_both_exist)
    return table


def average(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Weighted means, [R, N] and [N] -> [R]; NaN where all weights are 0."""
    total = weights.sum(axis=1)
    return weights @ values / np.where(total > 0, total, np.nan)


def scores(
    weights: np.ndarray, labels: np.ndarray, chosen: np.ndarray
) -> dict[str, np.ndarray]:
    """F1 of COVID-19, mean F1 of both classes and accuracy, each [R].

    Args:
      weights: [R, N], how often each image counts.
      labels: int [N], 1 is COVID-19.
      chosen: predicted class, int [N].
    """
    others, covid = (f1(weights, labels, chosen, positive) for positive in (0, 1))
    return {
        "f1": covid,
        "macro_f1": (others + covid) / 2,
        "accuracy": average(weights, labels == chosen),
    }


def f1(
    weights: np.ndarray, labels: np.ndarray, chosen: np.ndarray, positive: int
) -> np.ndarray:
    """Weighted F1 of one class, [R]; the arguments are those of `scores`."""
    hits = weights @ ((labels == positive) & (chosen == positive))
    asked = weights @ ((labels == positive).astype(int) + (chosen == positive))
    return 2 * hits / np.maximum(asked, 1)


def always_positive(pairs: list[tuple[dict, dict]]) -> float:
    """F1 of calling every image COVID-19, mean over the seeds: what F1 is worth."""
    share = [first["labels"].mean() for first, _ in pairs]
    return float(np.mean([2 * p / (1 + p) for p in share]))


def verdict(table: dict[str, dict]) -> str:
    """Agreement up while a map became flatter or more often empty is collapse.

    "Up" means that the whole interval of the difference lies above 0. One pair of maps
    is enough: those that no loss trains can hide in the mean what the others do.
    """

    def rising(*prefixes):
        return [n for n, v in table.items() if n.startswith(prefixes) and v["low"] > 0]

    agreeing, alarms = rising("agreement", "spearman/"), rising("entropy/", "empty/")
    if not agreeing:
        return "agreement of the maps did not rise"
    if alarms:
        return f"collapse: {', '.join(agreeing)} rose together with {', '.join(alarms)}"
    return f"{', '.join(agreeing)} rose without collapse"


def describe(table: dict[str, dict], row: str) -> str:
    """The table as text, with the paper's numbers beside F1."""
    width = max(map(len, table))
    lines = [
        f"{'':<{width}}  without     with   difference [95 % interval]  of each seed"
    ]
    for name, v in table.items():
        lines.append(
            f"{name:<{width}}  {v['without']:7.3f}  {v['with']:7.3f}  "
            f"{v['difference']:+7.3f} [{v['low']:+.3f}, {v['high']:+.3f}]  "
            + " ".join(f"{seed:+.3f}" for seed in v["seeds"])
        )
    lines.insert(
        2,
        f"{'f1 of the paper (other data)':<{width}}  {PAPER['f1 without']:7.3f}  "
        f"{PAPER['f1 with']:7.3f}  {PAPER['f1 with'] - PAPER['f1 without']:+7.3f}",
    )
    return "\n".join([f"alignment: {row}", *lines, verdict(table)])


if __name__ == "__main__":
    main()
