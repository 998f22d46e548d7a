"""Everything that a config can get wrong, said before the first step.

Each alone by the table in fields.py, then what fields must be together: first what the
config can tell (`check_config`), then what takes the devices, the data and the network
(`check_run`, `check_training`).
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax import mesh as meshes
from cxai_jax import models
from cxai_jax.config import flatten, nearest
from cxai_jax.data.pipeline import training_rows
from cxai_jax.data.records import Records
from cxai_jax.maps import saliency
from cxai_jax.training.fields import RULES, parts_of
from cxai_jax.training.optimizer import (
    check_groups,
    parse_groups,
)
from cxai_jax.voting.forward import prefix_crops


def check_config(config) -> None:
    """Checks every field, and what fields must be together.

    Raises:
      ValueError: for the first that is wrong: its name, its value, what is expected.
    """
    flat = flatten(config.to_dict())
    for name in flat:
        if name not in RULES:
            raise ValueError(f"config.{name} is not a field; {nearest(name, RULES)}")
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
    if config.data.positive and not config.data.name.startswith("tfds:"):
        yield (
            f"config.data.positive={config.data.positive!r} is for tfds:NAME; the "
            f"positive class of {config.data.name} was chosen when it was prepared"
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
    if (config.method == "calibrator") != (config.model.calibrator > 0):
        yield (
            f"config.method={config.method} with config.model.calibrator="
            f"{config.model.calibrator}: the method calibrator trains the calibrator, "
            "and no other does; set both, 8 channels as published, or neither"
        )
    if config.model.calibrator and config.model.pretrained:
        yield (
            f"config.model.pretrained={config.model.pretrained!r} names the weights of "
            "a backbone alone, without config.model.calibrator; set it to ''"
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
    every = parts_of(config.align.input_grad_fraction)
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
    _check_selection(run)
    check_groups(config, network.variables["params"])
    for complaint in _on_the_grid(config, network):
        raise ValueError(complaint)
    voting = config.tta.copy_and_resolve_references()
    with voting.unlocked():
        voting.k = max(voting.k, 1)  # It may be turned on later.
    prefix_crops(network.model, config.data.image_size, voting)


def _check_selection(run) -> None:
    """Of a validation split that lacks a class only the accuracy means anything."""
    train = run.config.train
    selects = train.selection == "best_val" or train.patience
    if not selects or train.select_metric == "accuracy":
        return
    names = run.dataset.class_names
    counts = np.bincount(run.validation.labels, minlength=len(names))
    if not counts.all():
        raise ValueError(
            f"config.train.select_metric={train.select_metric} needs every class on "
            f"validation, and the split `val` of {run.dataset.name} has no image of "
            f"{names[int(counts.argmin())]}; prepare it with some, or set "
            "config.train.select_metric=accuracy"
        )


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
