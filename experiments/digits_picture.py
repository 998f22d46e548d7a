"""Draws what the generators of a run make of digits, both directions, as one PNG.

python -m experiments.digits_picture runs/table4/cycada-usps-lenet-short-seed0 out.png

Rows in pairs: images of a domain, and the same translated into the other.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from cxai_jax.config import read_config
from cxai_jax.data import pipeline
from cxai_jax.methods import calibrator, cycada, dranet, translation
from cxai_jax.training import run as runs

TRANSLATING = {"cycada": cycada, "calibrator": calibrator, "dranet": dranet}
SHOWN = 12  # Images of each domain.
ZOOM = 2


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "workdir", type=Path, help="of a run of cycada, calibrator or dranet"
    )
    parser.add_argument("out", type=Path, help="PNG file")
    options = parser.parse_args(arguments)
    Image.fromarray(draw(options.workdir)).save(options.out)


def draw(workdir: Path) -> np.ndarray:
    """The sheet, uint8 [h, w, 3].

    Raises:
      ValueError: for a run whose method translates nothing.
      FileNotFoundError: if the run has no checkpoint.
    """
    config = read_config(workdir)
    if config.method not in TRANSLATING:
        raise ValueError(
            f"{workdir} is a run of config.method={config.method}; only "
            f"{', '.join(TRANSLATING)} translate images"
        )
    run = runs.open_run(config, workdir)
    plan = runs.make_plan(run)
    found = run.checkpoints.restore("latest", runs.initial_state(run, plan.method))
    if found is None:
        raise FileNotFoundError(f"{workdir}/checkpoints is empty; train first")
    images = {
        name: pictures(plan.streams[name].records, config)
        for name in ("source", "target")
    }
    setting = translation.setting_of(plan.method)
    made = TRANSLATING[config.method].translate(setting, found[0], **images)
    rows = []
    for name, translated in made.items():
        rows += [images[name.split(" -> ")[0]], translated]
    run.checkpoints.close()
    return sheet(rows)


def pictures(records, config) -> jnp.ndarray:
    """The first images of a split in -1..1."""
    batch = pipeline.decode(
        records, np.arange(SHOWN), pipeline.fit_for_scoring(config), canvas(config)
    )
    return jnp.asarray(batch.images, jnp.float32) / 127.5 - 1


def canvas(config) -> tuple[int, int, int]:
    side = config.data.image_size
    return side, side, 3


def sheet(rows: Sequence) -> np.ndarray:
    """Rows of pictures in -1..1 [N, h, w, 3] as one uint8 picture."""
    levels = [np.clip((np.asarray(row) + 1) * 127.5, 0, 255) for row in rows]
    page = np.concatenate([np.concatenate(list(row), axis=1) for row in levels])
    return np.kron(page.astype(np.uint8), np.ones((ZOOM, ZOOM, 1), np.uint8))


if __name__ == "__main__":
    main()
