"""What a finished run left in its workdir, for the figures: no network is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from cxai_jax import data
from cxai_jax.config import read_config
from cxai_jax.data import transforms
from cxai_jax.data.records import Dataset, Records
from cxai_jax.models import normalisation
from cxai_jax.scoring import evaluate
from cxai_jax.writer import read_json

# (mixes as SnapMix, has CPE) -> its row of the paper's ablation.
TITLES = {
    (False, False): "baseline",
    (False, True): "+ CPE",
    (True, False): "+ SnapMix",
    (True, True): "+ CPE + SnapMix",
}


class Run(NamedTuple):
    """A finished run and the split that it was scored on."""

    workdir: Path
    config: ConfigDict
    results: dict  # Contents of results.json.
    predictions: dict  # Of the scored split; `evaluate.Evaluator.predict` lists them.
    dataset: Dataset

    @property
    def records(self) -> Records:
        """The scored split."""
        return self.dataset.splits[self.config.data.test]

    @property
    def class_names(self) -> list[str]:
        return self.results["data"]["class_names"]

    @property
    def masks(self) -> int:
        """k of the predictions file."""
        return self.predictions["probs"].shape[1] - 1


def read_run(workdir: Path) -> Run:
    """Config, results, predictions and data of a finished run.

    Raises:
      FileNotFoundError: if the run is not finished, was not scored, or its data are not
        where its config says.
      ValueError: if a file is damaged, or the scored split is of another data set.
    """
    config = read_config(workdir)
    file = evaluate.predictions_file(workdir, config.data.test)
    for path in (workdir / "results.json", file):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: the run is not finished; continue it, or "
                "score its last checkpoint with --mode=eval"
            )
    dataset = data.load(config.data)
    if config.data.test not in dataset.splits:
        raise ValueError(
            f"{workdir} was scored on {config.data.test}, which is no split of "
            f"{config.data.name}: its figures cannot be drawn"
        )
    return Run(
        workdir,
        config,
        read_json(workdir / "results.json", "data", "metrics"),
        evaluate.load_predictions(file),
        dataset,
    )


def need_votes(run: Run, k: int = 1) -> None:
    """Raises ValueError if a run was scored with fewer than k masks."""
    if run.masks < k:
        raise ValueError(
            f"{run.workdir} was scored with {run.masks} masks, {k} are needed; score "
            f"it again with --mode=eval --config.tta.k={max(k, 31)}"
        )


def title(config: ConfigDict) -> str:
    """Which row of the paper's ablation a run is; another mix by its name."""
    if config.mix.name not in ("none", "snapmix"):
        return config.mix.name
    return TITLES[config.mix.name == "snapmix", config.cpe.weight > 0]


def trained_as(workdir: Path, config: ConfigDict) -> str:
    """Which run it is and how it was trained, for a caption."""
    return (
        f"Run {workdir.name}: {title(config)}, {config.model.name}, "
        f"{config.data.image_size} px, {config.train.epochs:g} epochs, seed "
        f"{config.seed}, on {config.data.name}"
    )


def source(run: Run) -> str:
    """A sentence for a caption: `trained_as`, and how good the run is."""
    accuracy = 100 * run.results["metrics"]["all"]["accuracy"]
    return (
        f"{trained_as(run.workdir, run.config)}; {accuracy:.1f} % right of "
        f"{len(run.predictions['labels'])} images of {run.config.data.test}."
    )


def seen(run: Run, records: Records, rows: Sequence[int]) -> np.ndarray:
    """Images as the network sees them: uint8 [N, S, S, C]."""
    size = run.config.data.image_size
    return np.stack([transforms.squash(records.images[int(row)], size) for row in rows])


def gray_of(image: np.ndarray) -> np.ndarray:
    """uint8 [S, S, C] -> [S, S, 1]: the mean of the channels."""
    return image.mean(-1, keepdims=True).round().astype(np.uint8)


def masked(
    run: Run, gray: np.ndarray, cells: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """An image with cells masked as voting does, by `config.tta.fill`.

    Args:
      run: whose voting.
      gray: uint8 [S, S, 1].
      cells: flat cell indices.

    Returns:
      uint8 [S, S, 1], and where it is masked, bool [S, S].
    """
    side = run.config.data.image_size // run.config.tta.patch
    place = np.isin(np.arange(side**2), cells).reshape(side, side)
    place = np.kron(place, np.ones((run.config.tta.patch,) * 2)) > 0
    mean, _ = normalisation(run.config.model.name)
    fills = {"min": gray.min(), "mean": gray.mean(), "zero": np.mean(mean)}
    value = np.uint8(fills[run.config.tta.fill])
    return np.where(place[..., None], value, gray), place


def rows_of(names: np.ndarray, wanted: Sequence[str]) -> list[int]:
    """Row numbers of images by name, or by the end of it.

    Args:
      names: str [N], of the images there are.
      wanted: names, or their ends.

    Raises:
      ValueError: if a name fits no image.
    """
    rows = []
    for name in wanted:
        found = np.flatnonzero(np.char.endswith(names, name))
        if not len(found):
            raise ValueError(
                f"no image {name!r} among the run's; they begin with "
                f"{', '.join(names[:3])}"
            )
        rows.append(int(found[0]))
    return rows
