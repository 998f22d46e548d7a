"""Does anything grow? A long training and many predictions, each in one process.

python -m tools.soak --json=experiments/results/soak_cpu.json

Trains a tiny network on phantoms with a save every 50 steps, then predicts image files
one batch after another as `predict` does; samples resident memory and open files on
the way and counts what was compiled after the first quarter. Slopes are least squares
over the samples after it.
"""

import argparse
import gc
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from configs import demo
from cxai_jax import host
from cxai_jax.data import inputs, novelty, pipeline, transforms
from cxai_jax.inference import table
from cxai_jax.inference.decisions import make_rule
from cxai_jax.inference.predictor import Predictor, load
from cxai_jax.inference.shown_maps import CAM, make_maps
from cxai_jax.mesh import make_mesh
from cxai_jax.report import pictures
from cxai_jax.training import loop
from cxai_jax.training.checkpoint import Checkpoints
from cxai_jax.training.results import versions
from cxai_jax.writer import write_json

SAVE_EVERY = 50  # Steps.
FILES = 100  # Image files, predicted again and again.
COMPILED = "/jax/core/compile/backend_compile_duration"


class Samples:
    """Resident memory and open files by how much was done."""

    def __init__(self, total: int):
        self.total, self.rows, self.compiled = total, [], 0
        self._late = False
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, seconds: float, **_) -> None:
        self.compiled += event == COMPILED and self._late

    def take(self, done: int) -> None:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        self.rows.append((done, resident, len(os.listdir("/proc/self/fd"))))
        self._late = self.total / 4 <= done < self.total  # Scoring comes after.

    def summary(self, unit: str) -> dict:
        """Slopes after the first quarter, per 1,000 of `unit`."""
        late = np.array([row for row in self.rows if row[0] >= self.total / 4], float)
        slope = np.polyfit(late[:, 0], late[:, 1:], 1)[0] * 1000
        return {
            unit: self.total,
            "samples": len(self.rows),
            f"memory, MB per 1000 {unit}": round(slope[0] / 1e6, 3),
            f"open files per 1000 {unit}": round(slope[1], 3),
            "memory at the first quarter, MB": round(late[0, 1] / 1e6, 1),
            "memory at the end, MB": round(late[-1, 1] / 1e6, 1),
            "compilations after the first quarter": int(self.compiled),
        }


def small(steps: int):
    config = demo.get_config("full")
    config.data.image_size = 32
    config.data.resize = 36
    config.data.phantom_images = 48
    config.train.batch_size = 8
    config.train.log_every_steps = 10
    config.eval.bootstrap = 20
    config.eval.batch_size = 4
    config.tta.k = 3
    config.tta.patch = 8
    per_epoch = 3
    config.train.epochs = steps / per_epoch
    config.train.checkpoint_every_epochs = SAVE_EVERY / per_epoch
    return config


def train(steps: int, workdir: Path) -> dict:
    """Trains, sampled at every save."""
    samples, save = Samples(steps), Checkpoints.save

    def sampled(self, kind, step, *rest):
        save(self, kind, step, *rest)
        samples.take(step)

    Checkpoints.save = sampled
    try:
        results = loop.train(small(steps), workdir)
    finally:
        Checkpoints.save = save
    assert results["steps"] >= steps
    return samples.summary("steps")


def predict(number: int, workdir: Path, folder: Path) -> dict:
    """Predicts files one after another, sampled every 50 batches."""
    draw = np.random.default_rng(0)
    files = [folder / f"{i}.png" for i in range(FILES)]
    for file in files:
        side = int(draw.integers(40, 400))
        Image.fromarray(draw.integers(0, 255, (side, side), np.uint8)).save(file)
    (folder / "overlays").mkdir()
    model, known = load(workdir), novelty.load(workdir)
    size = model.config.data.image_size
    network_input = pipeline.fit_for_scoring(model.config)
    predictor = Predictor(model, make_mesh())
    features = novelty.load_features(workdir)
    answer = table.Answer(model, CAM, make_rule(model.results, ""), features)
    drawn = make_maps(model, CAM, predictor.batch_size, make_mesh())
    samples, done = Samples(number), 0
    while done < number:
        batch = []
        for place in range(done, done + predictor.batch_size):
            (one,) = inputs.open_slices(files[place % FILES])
            batch.append(
                table.Prepared(
                    one.name,
                    one.patient,
                    novelty.flags(one.gray, known, size),
                    network_input(transforms.as_stored(one.gray)),
                    pictures.shrink(one.gray[..., 0], table.OVERLAY_HEIGHT),
                )
            )
        images = np.stack([one.input for one in batch])
        outcome = predictor(images)
        maps = drawn(images, outcome, {})
        foreign = novelty.foreign(outcome.pooled, features)
        for i, (one, *of_it) in enumerate(zip(batch, maps, foreign, strict=True)):
            table.row(one, outcome, i, *of_it, answer, folder, {})
        done += len(batch)
        if done // len(batch) % 50 == 0 or done >= number:
            samples.take(done)
    return samples.summary("predictions")


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--predictions", type=int, default=10_000)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    host.keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        workdir, folder = Path(name, "run"), Path(name, "images")
        folder.mkdir()
        result = {
            "data": "phantom, 48 images of 32 pixels, seed 0; random images of 40-400",
            "training": train(given.steps, workdir),
            "prediction": predict(given.predictions, workdir, folder),
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }
    write_json(given.json, result)
    print(given.json.read_text())


if __name__ == "__main__":
    main()
