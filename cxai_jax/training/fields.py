"""What each field of a config may be: `RULES` has a line for each of configs/common.py.

What fields must be together is in validate.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cxai_jax import data, models
from cxai_jax.data.augment import CROPS, NORMALISATIONS
from cxai_jax.data.pipeline import RESIDENCIES
from cxai_jax.data.records import SPLITS
from cxai_jax.maps import saliency
from cxai_jax.methods import METHODS
from cxai_jax.models.adapters import ADAPTERS
from cxai_jax.models.backbone import HEADS
from cxai_jax.models.covidnet import STAGE4_INPUTS
from cxai_jax.models.norm import NORMS
from cxai_jax.objectives import alignment, losses, mixing
from cxai_jax.scoring.metrics import SELECTING
from cxai_jax.training.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
)
from cxai_jax.voting.forward import PREFIX_REUSE
from cxai_jax.voting.rules import FILLS


class Rule(NamedTuple):
    """What a field may be: a test, and the words for it in an error."""

    holds: Callable[[Any], bool]
    expected: str


def is_number(value) -> bool:
    """Whether it is a finite int or float; a bool is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(least: int) -> Rule:
    return Rule(
        lambda v: is_whole(v) and v >= least,
        f"expected a whole number, {least} or more",
    )


def one_of(names: Sequence[str]) -> Rule:
    return Rule(
        lambda v: isinstance(v, str) and v in names, f"known: {', '.join(names)}"
    )


def each(rule: Rule, what: str, least: int = 0) -> Rule:
    """A tuple of `least` items or more that all obey `rule`."""
    return Rule(
        lambda v: (
            isinstance(v, tuple | list) and len(v) >= least and all(map(rule.holds, v))
        ),
        f"expected a tuple of {what}",
    )


FLAG = Rule(lambda v: isinstance(v, bool), "expected True or False")
TEXT = Rule(lambda v: isinstance(v, str), "expected text")
SHARE = Rule(lambda v: is_number(v) and 0 <= v <= 1, "expected a number in 0..1")
POSITIVE = Rule(lambda v: is_number(v) and v > 0, "expected a number above 0")
BELOW_ONE = Rule(
    lambda v: is_number(v) and 0 <= v < 1, "expected a number from 0 to below 1"
)
FROM_ZERO = Rule(lambda v: is_number(v) and v >= 0, "expected a number, 0 or more")


def _is_data_set(name) -> bool:
    kind, _, directory = str(name).partition(":")
    return kind in data.DATASETS and (not directory or kind in data.NAMED)


def _are_splits(names) -> bool:
    parts = names.split("+") if isinstance(names, str) else [""]
    places = [part.rpartition(":") for part in parts]
    return len(set(parts)) == len(parts) and all(
        split in SPLITS and (not name or _is_data_set(name))
        for name, _, split in places
    )


def _is_mark(text) -> bool:
    try:
        return isinstance(text, str) and 0 <= float(text or 0.5) <= 1
    except ValueError:
        return False


def _are_weights(text) -> bool:
    try:
        weights = losses.parse_class_weights(text) if isinstance(text, str) else [-1]
    except ValueError:
        return False
    return all(map(FROM_ZERO.holds, weights)) and sum(weights) > 0


def _ascends(shares) -> bool:
    return each(SHARE, "").holds(shares) and list(shares) == sorted(shares)


def _is_one_over_whole(value) -> bool:
    return (
        is_number(value) and 0 < value <= 1 and abs(parts_of(value) * value - 1) < 0.01
    )


def parts_of(share: float) -> int:
    """k of a share 1/k."""
    return round(1 / share)


SPLIT_NAMES = Rule(
    _are_splits, f"expected {', '.join(SPLITS)} or DATASET:SPLIT, several joined by +"
)
NO_OR_SPLIT_NAMES = Rule(
    lambda v: v == "" or _are_splits(v), f"expected '', or {SPLIT_NAMES.expected[9:]}"
)

RULES: dict[str, Rule] = {
    "seed": whole(0),
    "deterministic": FLAG,
    "method": one_of(METHODS),
    "model.name": one_of(models.MODELS),
    "model.head": one_of(HEADS),
    "model.extra_bn": FLAG,
    "model.pretrained": TEXT,
    "model.dtype": one_of(models.DTYPES),
    "model.projection": whole(0),
    "model.calibrator": whole(0),
    "model.remat": FLAG,
    "model.norm": one_of(NORMS),
    "model.adapter": one_of(ADAPTERS),
    "model.stage4_input": one_of(STAGE4_INPUTS),
    "data.name": Rule(
        _is_data_set,
        f"known: {', '.join(data.DATASETS)}, folder:NAME, tfds:NAME",
    ),
    "data.data_dir": TEXT,
    "data.split": TEXT,
    "data.fold": TEXT,  # data.folds.refold tells its form.
    "data.split_seed": whole(0),
    "data.positive": TEXT,
    "data.fit": SPLIT_NAMES,
    "data.target": NO_OR_SPLIT_NAMES,
    "data.other": NO_OR_SPLIT_NAMES,
    "data.test": SPLIT_NAMES,
    "data.image_size": whole(1),
    "data.resize": whole(1),
    "data.normalisation": one_of(NORMALISATIONS),
    "data.site_repeats": each(whole(1), "whole numbers, 1 or more", least=1),
    "data.residency": one_of(RESIDENCIES),
    "data.phantom_images": whole(12),
    "data.digits_images": whole(0),
    "data.photographs": TEXT,
    "data.phantom_mark": Rule(_is_mark, "expected '' or a probability, e.g. '0.9'"),
    "augment.crop": one_of(CROPS),
    "augment.hflip": FLAG,
    "augment.vflip": FLAG,
    "augment.rotate": Rule(
        lambda v: is_number(v) and 0 <= v <= 180, "expected degrees in 0..180"
    ),
    "augment.intensity": SHARE,
    "mix.name": one_of(mixing.MIXES),
    "mix.prob": SHARE,
    "mix.beta": POSITIVE,
    "mix.same_class": one_of(mixing.SAME_CLASS),
    "mix.boxes": one_of(mixing.BOXES),
    "mix.groups": whole(0),
    "loss.scores": one_of(losses.SCORES),
    "cam.mode": one_of(("train", "eval")),
    "cpe.weight": FROM_ZERO,
    "cpe.num_patches": whole(2),
    "cpe.normalize": FLAG,
    "cpe.temperature": POSITIVE,
    "cpe.sqrt_d": FLAG,
    "cpe.ramp": SHARE,
    "cpe.negatives": one_of(losses.NEGATIVES),
    "cpe.cam_source": one_of(("mixed", "clean")),
    "contrastive.weight": FROM_ZERO,
    "contrastive.temperature": POSITIVE,
    "align.weight": FROM_ZERO,
    "align.maps": each(
        one_of(saliency.MAPS), f"names among {', '.join(saliency.MAPS)}", least=1
    ),
    "align.distance": one_of(alignment.DISTANCES),
    "align.rectify": one_of(alignment.RECTIFY),
    "align.target": one_of(saliency.TARGETS),
    "align.alpha_grad": one_of(saliency.ALPHA_GRADS),
    "align.form": one_of(saliency.FORMS),
    "align.eta": Rule(
        lambda v: is_number(v) and 0 < v < 1, "expected a number between 0 and 1"
    ),
    "align.ramp": SHARE,
    "align.input_grad_fraction": Rule(_is_one_over_whole, "expected 1, 1/2, 1/3, ..."),
    "align.mask_weight": FROM_ZERO,
    "align.mask_dilate": whole(0),
    "adapt.weight": FROM_ZERO,
    "adapt.hidden": each(whole(1), "whole numbers, 1 or more"),
    "adapt.features_after": SHARE,
    "adapt.lr": FROM_ZERO,
    "adapt.calibrator_lr": FROM_ZERO,
    "adapt.width": whole(1),
    "adapt.blocks": whole(1),
    "adapt.pool": whole(1),
    "adapt.cycle_weight": FROM_ZERO,
    "adapt.content_weight": FROM_ZERO,
    "adapt.style_weight": FROM_ZERO,
    "adapt.generator_steps": whole(1),
    "adapt.perceptual": TEXT,
    "adapt.perceptual_width": whole(1),
    "ms_net.warmup": SHARE,
    "ms_net.distill": SHARE,
    "optim.name": one_of(OPTIMIZERS),
    "optim.lr_trunk": FROM_ZERO,
    "optim.lr_fresh": FROM_ZERO,
    "optim.groups": each(TEXT, "rules EXPRESSION=GROUP"),
    "optim.momentum": BELOW_ONE,
    "optim.weight_decay": FROM_ZERO,
    "optim.schedule": one_of(SCHEDULES),
    "optim.milestones": Rule(_ascends, "expected a tuple of shares in 0..1, ascending"),
    "optim.gamma": POSITIVE,
    "optim.warmup": SHARE,
    "optim.clip_norm": FROM_ZERO,
    "train.batch_size": whole(1),
    "train.epochs": POSITIVE,
    "train.accumulate": whole(1),
    "train.steps_per_call": whole(1),
    "train.log_every_steps": whole(1),
    "train.eval_every_epochs": FROM_ZERO,
    "train.checkpoint_every_epochs": FROM_ZERO,
    "train.checkpoint_every_minutes": FROM_ZERO,
    "train.on_nan": one_of(("stop", "skip")),
    "train.keep_checkpoints": whole(1),
    "train.selection": one_of(("last", "best_val")),
    "train.select_metric": one_of(SELECTING),
    "train.patience": whole(0),
    "train.class_weights": Rule(
        lambda v: v in ("none", "auto") or _are_weights(v),
        "expected none, auto, or a number from 0 for each class, such as '1,3'",
    ),
    "train.label_smoothing": BELOW_ONE,
    "train.ema": BELOW_ONE,
    "eval.batch_size": whole(1),
    "eval.bootstrap": whole(1),
    "tta.k": whole(0),
    "tta.theta": SHARE,
    "tta.patch": whole(1),
    "tta.fill": one_of(FILLS),
    "tta.chunk": whole(1),
    "tta.early_exit": FLAG,
    "tta.prefix_reuse": one_of(PREFIX_REUSE),
}
