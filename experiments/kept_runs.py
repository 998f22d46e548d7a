"""One small file for each finished run, to commit: a campaign goes on from them.

The head is plain JSON: config, versions, device, data fingerprint, learning curve. The
predictions, before and after voting, are its last entry: a JSON object, deflated and in
base64, a few kilobytes. Probabilities are rounded to four digits, labels were taken
before that.
"""

import base64
import json
import zlib
from pathlib import Path

import numpy as np

from cxai_jax.config import ADDED_FIELDS, flatten
from cxai_jax.writer import write_json

FORMAT = 1
# Fields that change no number of a run: where it lies and how often it speaks.
FREE_FIELDS = (
    "data.data_dir",
    "data.residency",
    "eval.batch_size",
    "tta.chunk",
    "train.log_every_steps",
    "train.checkpoint_every_epochs",
    "train.checkpoint_every_minutes",
    "train.keep_checkpoints",
    "train.on_nan",
)
COLUMNS = ("names", "patients", "labels", "sites", "probs", "chosen")
VOTED = ("voted", "opposing")  # Only where there was a vote.


def keep(path: Path, about: dict, predictions: dict) -> None:
    """Writes a run's file.

    Args:
      path: of the file.
      about: JSON values, of them "config", "versions" and "data" with its fingerprint.
      predictions: COLUMNS and perhaps VOTED, arrays [N], `probs` [N, K].
    """
    columns = {
        name: np.asarray(values).tolist() for name, values in predictions.items()
    }
    columns["probs"] = np.round(predictions["probs"], 4).tolist()
    packed = zlib.compress(json.dumps(columns, ensure_ascii=False).encode(), 9)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {"format": FORMAT, **about, "predictions": base64.b64encode(packed).decode()},
    )


def read(path: Path) -> dict:
    """The contents of a run's file, `predictions` as arrays.

    Raises:
      ValueError: for a file of another format, or one that is damaged.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        found = kept["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of a run ({error}); delete it to run it again"
        ) from None
    if found != FORMAT:
        raise ValueError(
            f"{path} has the format {found}, this version reads {FORMAT}; delete it to "
            "run it again"
        )
    try:
        columns = json.loads(zlib.decompress(base64.b64decode(kept["predictions"])))
    except (ValueError, KeyError, zlib.error) as error:
        raise ValueError(
            f"{path}: its predictions are damaged ({error}); delete it to run it again"
        ) from None
    kept["predictions"] = {name: np.array(values) for name, values in columns.items()}
    return kept


def check(path: Path, kept: dict, wanted: dict) -> None:
    """Raises ValueError if a kept run is not the one that is wanted.

    Args:
      path: of its file.
      kept: what `read` returned.
      wanted: "config" as a dict, "versions", and the data's "fingerprint" if known.
    """
    try:
        reasons = differences(wanted["config"], kept["config"])
        own, other = (of["versions"]["cxai-jax"] for of in (wanted, kept))
        fingerprint = kept["data"]["fingerprint"]
    except KeyError as error:
        raise ValueError(
            f"{path} is no file of a run (it lacks {error}); delete it to run it again"
        ) from None
    if own != other:
        reasons.append(f"it is of cxai-jax {other}, this is {own}")
    if wanted.get("fingerprint", fingerprint) != fingerprint:
        reasons.append("its images or folds are others (data fingerprint)")
    if reasons:
        raise ValueError(
            f"{path} is of another run: {'; '.join(reasons)}. Delete it, or keep the "
            "new runs in another folder"
        )


def differences(wanted: dict, kept: dict) -> list[str]:
    """How two configs differ but for FREE_FIELDS, a field each, in words."""
    now, then = flatten(wanted), ADDED_FIELDS | flatten(kept)
    return [
        f"config.{name} is {_plain(now.get(name))!r} here and "
        f"{_plain(then.get(name))!r} there"
        for name in sorted(now.keys() | then.keys())
        if _plain(now.get(name)) != _plain(then.get(name)) and name not in FREE_FIELDS
    ]


def _plain(value):
    """Tuples as JSON has them; of a path (of weights) its last part."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, str):
        return value.replace("\\", "/").split("/")[-1]
    return value
