"""Does a network that is made to explain itself stop using a shortcut?

Phantoms carry a burnt-in letter outside the lungs. In training it correlates with the
label (phi coefficient 0, 0.5, 0.9 or 1), at test it does not: every test slice is drawn
twice, with and without the letter, and both are scored. Plain training, alignment
(CAM + Grad-CAM), alignment with the lung-mask term, and SnapMix + CPE are compared.
Alignment.md 5 and Viviano et al. (2021): maps can leave a mark while decisions do not,
so the flips count, not the maps.

python -m experiments.shortcut --out=runs/shortcut

Finished runs are skipped; results go to experiments/results/shortcut.json and .png.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import cxr, demo
from configs.rows import baseline
from cxai_jax import host
from cxai_jax import mesh as meshes
from cxai_jax.config import claim_workdir
from cxai_jax.data import phantom, transforms
from cxai_jax.data.records import Records
from cxai_jax.inference.predictor import Predictor, load
from cxai_jax.maps import quality as em
from cxai_jax.maps.grid import upsample
from cxai_jax.report import figures
from cxai_jax.scoring import explanations
from cxai_jax.training import loop as training
from cxai_jax.training.results import versions
from cxai_jax.writer import write_json

RESULTS = Path(__file__).parent / "results"
CORRELATIONS = (0.0, 0.5, 0.9, 1.0)
SEEDS = (0, 1, 2)
METHODS = {
    "cross-entropy": baseline,
    "alignment": cxr.cheap,
    "alignment + lung mask": cxr.mask,
    "SnapMix + CPE": lambda config: None,
}
TEST_SLICES = 240  # Drawn twice each.
EXPLAINED = 32  # Of these, explained with the letter in place.
TEST_SEED = 7
REACH = 4  # Pixels by which the letter's box grows: half a cell of the class map.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/shortcut"))
    options = parser.parse_args()
    host.keep_freed_memory()
    cache = options.out.absolute() / "xla_cache"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    test = paired_slices(make_config("cross-entropy", 0.0, 0))
    rows = []
    for seed in SEEDS:
        for method in METHODS:
            for correlation in CORRELATIONS:
                name = f"{method}-{correlation}-{seed}".replace(" ", "")
                config = make_config(method, correlation, seed)
                values = run(config, options.out / name, *test)
                rows.append(
                    {"method": method, "correlation": correlation, "seed": seed}
                    | values
                )
                print(json.dumps(rows[-1]), flush=True)
    write(rows)


def make_config(method: str, correlation: float, seed: int) -> ConfigDict:
    """The demonstration's tiny network at 64 pixels, shorter."""
    config = demo.get_config("full")
    if method != "SnapMix + CPE":
        baseline(config)
    METHODS[method](config)
    config.seed = seed
    # A scanner burns its letter into one place. Flips would mirror it, crops shift and
    # rescale it: no shortcut to be cured would be learned.
    config.augment.crop = "none"
    config.augment.hflip = config.augment.vflip = False
    # Of two balanced binary variables that agree with probability p, phi = 2 p - 1.
    config.data.phantom_mark = str((1 + correlation) / 2)
    config.optim.clip_norm = 1.0
    config.train.epochs = 20.0
    config.train.checkpoint_every_epochs = 0.0
    config.tta.k = 0
    config.eval.bootstrap = 100
    return config


def paired_slices(config: ConfigDict) -> tuple[Records, Records]:
    """New phantoms, once without and once with the letter, otherwise equal."""
    patient = np.arange(TEST_SLICES) // 4
    sites, labels = patient % 2, patient // 2 % 2

    def draw(mark: bool) -> Records:
        rng = np.random.default_rng(TEST_SEED)
        marked = np.full(TEST_SLICES, mark)
        images, lungs, lesions = phantom.draw(
            rng, config.data.resize, patient, sites, labels, marked
        )
        names = np.array([f"test-{i}" for i in range(TEST_SLICES)])
        return Records(images, labels, sites, patient.astype(str), names, lungs)

    return draw(False), draw(True)


def letter_boxes(clean: Records, marked: Records, size: int) -> np.ndarray:
    """Where the letter is, as the network sees the image: bool [N, size, size]."""
    boxes = np.zeros((len(clean), size, size), bool)
    for i, place in enumerate(boxes):
        changed = (clean.images[i] != marked.images[i]).any(axis=-1)
        seen = transforms.squash(np.where(changed, 255, 0).astype(np.uint8), size)
        rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
        place[
            max(rows[0] - REACH, 0) : rows[-1] + REACH + 1,
            max(columns[0] - REACH, 0) : columns[-1] + REACH + 1,
        ] = True
    return boxes


def run(config: ConfigDict, workdir: Path, clean: Records, marked: Records) -> dict:
    """Trains one network, or finds it trained, and measures it; resumable."""
    claim_workdir(config, workdir)  # What is found there must be of this config.
    done = workdir / "shortcut.json"
    if done.exists():
        return json.loads(done.read_text())
    training.train(config, workdir)
    model = load(workdir)
    mesh = meshes.make_mesh()

    def explained(records: Records) -> dict:
        return explanations.explain(
            model.model, model.scale, model.config, mesh, model.variables, records
        )

    predictor = Predictor(model, mesh)
    first, second = (predicted(predictor, r, config) for r in (clean, marked))
    rows = np.random.default_rng(TEST_SEED).permutation(TEST_SLICES)[:EXPLAINED]
    found = explained(marked.subset(rows))
    boxes = letter_boxes(clean, marked, config.data.image_size)[rows]
    values = score(first, second, marked.labels) | on_letter(found, boxes)
    summary = explanations.summarise(explanations.measure(found))
    kept = ("agreement", "entropy/cam", "empty/cam", "occlusion/cam")
    values |= {name: summary[name]["mean"] for name in kept}
    write_json(done, values)
    return values


def predicted(predictor, records: Records, config: ConfigDict) -> np.ndarray:
    """Predicted class of every image, int [N]."""
    size, batch = config.data.image_size, predictor.batch_size
    images = np.stack([transforms.squash(image, size) for image in records.images])
    parts = [images[i : i + batch] for i in range(0, len(images), batch)]
    return np.concatenate([predictor(part).before for part in parts])


def score(clean: np.ndarray, marked: np.ndarray, labels: np.ndarray) -> dict:
    """Accuracies and flips from the predictions of both versions, int [N] each.

    With both versions of every slice scored, letter and label are independent.
    """
    right = {False: clean == labels, True: marked == labels}
    positive = labels == 1
    agree = np.where(positive, right[True], right[False])
    against = np.where(positive, right[False], right[True])
    return {
        "accuracy": float((agree.mean() + against.mean()) / 2),
        "accuracy_letter_agrees": float(agree.mean()),
        "accuracy_letter_misleads": float(against.mean()),
        "flips": float((clean != marked).mean()),
    }


def on_letter(found: dict, boxes: np.ndarray) -> dict:
    """Share of each map's energy in the letter's box, and the share of a flat map."""
    values = {"letter/area": float(boxes.mean())}
    for name in (*explanations.MAPS, "occlusion"):
        drawn = np.asarray(upsample(np.maximum(found[name], 0), boxes.shape[1]))
        mass = em.energy_pointing_game(drawn, boxes)
        values[f"letter/{name}"] = em.mean_and_excluded(mass)[0]
    return values


def write(rows: list[dict]) -> None:
    """The table as JSON and the curves as a picture."""
    config = make_config("cross-entropy", 0.0, 0)
    write_json(
        RESULTS / "shortcut.json",
        {
            "data": f"phantom, {config.data.phantom_images} images, "
            f"{config.data.image_size} pixels; test: {TEST_SLICES} new slices, with "
            "and without the letter",
            "model": config.model.name,
            "epochs": config.train.epochs,
            "seeds": SEEDS,
            "versions": versions(),
            "device": jax.devices()[0].device_kind,
            "rows": rows,
        },
    )
    figures.save(curves(rows), RESULTS / "shortcut.png")


def curves(rows: list[dict]) -> Figure:
    """Four panels against the correlation in training; every seed a dot."""
    panels = {
        "accuracy": "Accuracy, letter independent of label",
        "flips": "Decisions that the letter changes",
        "letter/cam": "CAM energy on the letter",
        "letter/occlusion": "Occlusion energy on the letter",
    }
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        for shift, method in enumerate(METHODS):
            own = [row for row in rows if row["method"] == method]
            x = np.array([row["correlation"] for row in own])
            y = np.array([row[key] for row in own], float)
            means = [np.nanmean(y[x == c]) for c in CORRELATIONS]
            line = axes.plot(CORRELATIONS, means, label=method)[0]
            axes.plot(x + 0.01 * (shift - 1.5), y, ".", color=line.get_color(), ms=4)
        if key.startswith("letter"):
            axes.axhline(rows[0]["letter/area"], color="gray", ls=":", lw=1)
        axes.set(title=title, xlabel="Correlation in training", ylim=(0, None))
        axes.title.set_fontsize(9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncol=4)
    return figure


if __name__ == "__main__":
    main()
