"""Where a run's numbers go: metrics.jsonl always; TensorBoard where tensorboardX is
installed (extra `log`), Weights & Biases where WANDB_PROJECT is set."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cxai_jax import disk


def write_json(path: Path, value: dict) -> None:
    """Writes JSON in one move, see `disk.write`; NaN and infinity become null."""
    text = json.dumps(strict(value), indent=1, allow_nan=False)
    disk.write(path, text + "\n")


def read_json(path: Path, *fields: str) -> dict:
    """The JSON object in a file.

    Raises:
      ValueError: names the file if it cannot be read, is damaged or lacks a field.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, no JSON ({error}); restore it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    if missing := [name for name in fields if name not in value]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return value


def read_log(workdir: Path) -> list[dict]:
    """The rows of metrics.jsonl; [] without one, a line cut short is left out."""
    path = workdir / "metrics.jsonl"
    lines = _lines(path) if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) is not None]


def _lines(path: Path) -> list[str]:
    """Damaged bytes spoil their own line only."""
    return path.read_text("utf-8", errors="replace").split("\n")


def strict(value):
    """The value as JSON has it: plain numbers, lists and dicts; null for NaN, inf."""
    if isinstance(value, np.generic) or hasattr(value, "tolist"):
        return strict(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


class Writer:
    """Appends metrics to `workdir/metrics.jsonl`.

    Only the first process of a multi-host run writes.
    """

    def __init__(self, workdir: Path, *, start_step: int, active: bool = True):
        self.active = active
        self._path = workdir / "metrics.jsonl"
        self._tensorboard = self._wandb = None
        if not active:
            return
        # Rows after the checkpoint belong to a run that died: they will be redone.
        kept = []
        if start_step and self._path.exists():
            rows = _lines(self._path)
            kept = [r for r in rows if _step_of(r) is not None]
            kept = [r for r in kept if _step_of(r) <= start_step]
        disk.write(self._path, "".join(row + "\n" for row in kept))
        self._wandb = _open_wandb(workdir)
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))

    def scalars(self, step: int, values: dict) -> None:
        """One row of metrics.jsonl; `values` maps a name to a plain number."""
        if not self.active:
            return
        values = {name: float(value) for name, value in values.items()}
        row = json.dumps(strict({"step": step, **values}), allow_nan=False) + "\n"
        with disk.writing(self._path, len(row)), self._path.open("a") as file:
            file.write(row)
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    @property
    def shows_images(self) -> bool:
        """Whether `image` has anywhere to write: pictures cost time to make."""
        return bool(self._tensorboard or self._wandb)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """uint8 [H, W, 3] to TensorBoard and Weights & Biases, where they are on."""
        if self._tensorboard:
            self._tensorboard.add_image(name, image, step, dataformats="HWC")
        if self._wandb:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.active:
            print(text, flush=True)

    def close(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _open_wandb(workdir: Path):
    """A Weights & Biases run that a restart in the same workdir continues, or None."""
    project = os.environ.get("WANDB_PROJECT")
    if not project:
        return None
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "WANDB_PROJECT is set but wandb is not installed; pip install wandb, or "
            "unset WANDB_PROJECT"
        ) from error
    path = workdir.absolute()
    return wandb.init(
        project=project,
        name=path.name,
        id=hashlib.sha256(str(path).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(path),
        config=json.loads((path / "config.json").read_text()),
    )


def _step_of(row: str) -> int | None:
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # A line cut short by a crash, or damaged.
