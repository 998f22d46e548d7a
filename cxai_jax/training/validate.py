"""Every field of a config is checked here, before the first step and on one screen.

`RULES` has a line for each field of configs/common.py: what it may be. What fields must
be together follows, first what the config alone can tell (`check_config`), then what
takes the devices, the data and the network (`check_run`, `check_training`). One table,
longer than other files, so that a new field has one place to be looked for.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax import data, models
from cxai_jax import mesh as meshes
from cxai_jax.config import flatten
from cxai_jax.data.augment import CROPS, NORMALISATIONS
from cxai_jax.data.pipeline import RESIDENCIES, training_rows
from cxai_jax.data.records import SPLITS, Records
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
    check_groups,
    parse_groups,
)
from cxai_jax.voting.forward import PREFIX_REUSE, prefix_crops
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
    return is_number(value) and 0 < value <= 1 and abs(_parts(value) * value - 1) < 0.01


def _parts(share: float) -> int:
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
    "model.remat": FLAG,
    "model.norm": one_of(NORMS),
    "model.adapter": one_of(ADAPTERS),
    "model.stage4_input": one_of(STAGE4_INPUTS),
    "data.name": Rule(
        _is_data_set,
        f"known: {', '.join(data.DATASETS)}, folder:NAME, tfds:mnist",
    ),
    "data.data_dir": TEXT,
    "data.split": TEXT,
    "data.fold": TEXT,  # data.folds.refold tells its form.
    "data.split_seed": whole(0),
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
    "adapt.width": whole(1),
    "adapt.blocks": whole(1),
    "adapt.pool": whole(1),
    "adapt.cycle_weight": FROM_ZERO,
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


def check_config(config) -> None:
    """Checks every field, and what fields must be together.

    Raises:
      ValueError: for the first that is wrong: its name, its value, what is expected.
    """
    flat = flatten(config.to_dict())
    for name, rule in RULES.items():
        if name not in flat:
            raise ValueError(f"the config has no field config.{name}; {rule.expected}")
        if not rule.holds(flat[name]):
            raise ValueError(f"config.{name} is {flat[name]!r}; {rule.expected}")
    for complaint in _together(config):
        raise ValueError(complaint)
    parse_groups(config.optim.groups)


def _together(config) -> Iterator[str]:
    """What fields that are right alone get wrong together."""
    size, resize, tta = config.data.image_size, config.data.resize, config.tta
    batch, accumulate = config.train.batch_size, config.train.accumulate
    if config.augment.crop != "none" and resize < size:
        yield (
            f"config.data.image_size={size} does not fit into config.data.resize="
            f"{resize}: a crop is not larger than what it is cut from; raise resize or "
            "set config.augment.crop=none"
        )
    if config.contrastive.weight > 0 and not config.model.projection:
        yield (
            f"config.contrastive.weight is {config.contrastive.weight}, but "
            "config.model.projection is 0: give the embedding a width, such as 128"
        )
    train = config.train
    if config.method != "guided" and (
        train.class_weights != "none" or train.label_smoothing
    ):
        yield (
            f"config.method={config.method} has a loss of its own: set config.train."
            "class_weights=none and config.train.label_smoothing=0"
        )
    if config.align.weight > 0 and len(config.align.maps) < 2:
        yield (
            f"config.align.maps is {tuple(config.align.maps)}: alignment compares at "
            f"least two of {', '.join(saliency.MAPS)}"
        )
    if batch % accumulate:
        yield (
            f"config.train.batch_size={batch} must be a multiple of "
            f"config.train.accumulate={accumulate}"
        )
    for field in ("target", "other"):
        unlabelled = set(filter(None, config.data[field].split("+")))
        if shared := sorted(unlabelled & set(config.data.fit.split("+"))):
            yield (
                f"config.data.fit and config.data.{field} both name {shared[0]!r}: "
                "labels of a target are not read; take it out of config.data.fit"
            )
    if config.train.steps_per_call != 1 and config.data.residency == "host":
        yield (
            f"config.train.steps_per_call={config.train.steps_per_call} needs "
            "config.data.residency=device; set it to 1"
        )
    if config.train.patience and not config.train.eval_every_epochs:
        yield (
            f"config.train.patience={config.train.patience} counts evaluations, and "
            "config.train.eval_every_epochs is 0: set it, such as to 1"
        )
    every = _parts(config.align.input_grad_fraction)
    if _aligns(config) and batch // accumulate % every:
        yield (
            f"config.align.input_grad_fraction={config.align.input_grad_fraction} "
            f"takes one image in {every}, which does not divide the micro-batch of "
            f"{batch // accumulate} (config.train.batch_size / accumulate)"
        )
    if size % tta.patch:
        near = [n for n in range(1, size + 1) if size % n == 0]
        near = min(near, key=lambda n: abs(n - tta.patch))
        yield (
            f"config.tta.patch={tta.patch} does not divide config.data.image_size="
            f"{size} into cells; use a divisor, for example {near}"
        )
    elif tta.k > (cells := (size // tta.patch) ** 2):
        yield (
            f"config.tta.k={tta.k} is more than the {cells} cells of config.tta.patch="
            f"{tta.patch} pixels in an image of {size}"
        )


def _aligns(config) -> bool:
    return config.align.weight > 0 or config.align.mask_weight > 0


def check_run(run) -> None:
    """Checks a config against the devices, the data and the network it runs with.

    Args:
      run: a run.Run, opened.

    Raises:
      ValueError: for the first field that does not fit.
    """
    config, network = run.config, run.network
    meshes.check_batch(config.eval.batch_size, run.mesh, "config.eval.batch_size")
    if config.train.selection == "best_val" and run.validation is None:
        raise ValueError(
            "config.train.selection=best_val needs a split `val` that is not in "
            f"config.data.fit={config.data.fit!r}; {run.dataset.name} has "
            f"{', '.join(run.dataset.splits)}"
        )
    if config.train.patience and run.validation is None:
        raise ValueError(
            f"config.train.patience={config.train.patience} needs a split `val` that "
            f"is not in config.data.fit={config.data.fit!r}; {run.dataset.name} has "
            f"{', '.join(run.dataset.splits)}"
        )
    check_groups(config, network.variables["params"])
    for complaint in _on_the_grid(config, network):
        raise ValueError(complaint)
    voting = config.tta.copy_and_resolve_references()
    with voting.unlocked():
        voting.k = max(voting.k, 1)  # It may be turned on later.
    prefix_crops(network.model, config.data.image_size, voting)


def _on_the_grid(config, network) -> Iterator[str]:
    """What does not fit the maps that the network has at this image size."""
    size = config.data.image_size
    images, site = jnp.zeros((1, size, size, 3)), jnp.zeros(1, jnp.int32)
    forward = functools.partial(network.model.apply, mode="eval")
    _, maps = jax.eval_shape(forward, network.variables, x=images, site=site)
    grid, lower = maps.class_maps.shape[1], maps.lower.shape[1]
    most = grid * grid // 2
    if config.cpe.weight > 0 and config.cpe.num_patches > most:
        yield (
            f"config.cpe.num_patches={config.cpe.num_patches}: two groups of it must "
            f"fit into the {grid}x{grid} grid of {config.model.name} at "
            f"config.data.image_size={size} (at most {most})"
        )
    sides = {"cam": grid, "gradcam_lower": lower, "input_gradient": size}
    for name in config.align.maps if _aligns(config) else ():
        if sides[name] % grid:
            yield (
                f"config.align.maps: {name} has {sides[name]} cells per side, no "
                f"multiple of the {grid} of {config.model.name} at config.data."
                f"image_size={size}; a multiple of 32 pixels fits"
            )


def check_training(run, fit: Records) -> None:
    """Checks a config against the devices and the images that it trains on.

    Raises:
      ValueError: for a batch that does not divide, or has too few images of a site for
        norms of each, or a lung-mask term without masks.
    """
    config = run.config
    micro = config.train.batch_size // config.train.accumulate
    field = "config.train.batch_size"
    if config.train.accumulate > 1:
        field += " / config.train.accumulate"
    meshes.check_batch(micro, run.mesh, field)
    if models.needs_site(config.model):
        _check_sites(run, fit, micro)
    if config.align.mask_weight > 0 and fit.lung_masks is None:
        raise ValueError(
            f"config.align.mask_weight={config.align.mask_weight} needs lung masks and "
            f"{run.dataset.name} has none; set it to 0, or train on cxr or phantom"
        )


def _check_sites(run, fit: Records, batch: int) -> None:
    """A batch must have two images of every site on average: one has no variance."""
    config, names = run.config, run.dataset.site_names
    rows = training_rows(fit, config.data.site_repeats, batch)
    shares = np.bincount(fit.sites[rows], minlength=len(names)) / len(rows)
    rarest = int(shares.argmin())
    if batch * shares[rarest] < 2:
        raise ValueError(
            f"config.train.batch_size={config.train.batch_size} has "
            f"{batch * shares[rarest]:.1f} images of {names[rarest]} on average, and a "
            f"network with parts of each site ({', '.join(names)}) needs at least 2; "
            "raise it, or the site's share with config.data.site_repeats"
        )
