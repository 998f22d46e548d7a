"""Explanation-guided training: class maps steer mixing, patches and alignment.

    augment -> clean forward (no gradient) -> class map of the true label
            -> mix(images, labels, maps) -> forward of the mixed batch
            -> mixed cross-entropy + CPE + NT-Xent + alignment -> optimiser

The clean forward runs once and serves both SnapMix and CPE (the published step runs it
twice); without mixing one forward serves everything. Randomness is
`fold_in(key, step)`, so nothing random is ever saved. Plain cross-entropy, MixUp,
CutMix, SnapMix with and without each loss are rows of this one method.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from cxai_jax.data.augment import Scale
from cxai_jax.maps import saliency
from cxai_jax.maps.cam import is_flat, of_class, patch_relevance
from cxai_jax.methods import parts
from cxai_jax.methods.method import (
    Method,
    Network,
    TrainState,
    create_state,
    variables_of,
)
from cxai_jax.objectives import alignment, losses
from cxai_jax.objectives.mixing import MIXES, Mixed
from cxai_jax.types import Array, Batch, Outputs, PyTree


class Setting(NamedTuple):
    """What stays the same over all steps of a run."""

    config: object
    model: nn.Module
    scale: Scale
    optimizer: optax.GradientTransformation
    total_steps: int
    groups: int


class Seen(NamedTuple):
    """What the loss terms of one batch may read."""

    variables: PyTree
    site: Array  # int32 [B]
    logits: Array  # [B, K]
    outputs: Outputs  # Of the training forward of the mixed images.
    pair: Mixed
    dominant: Array  # int32 [B], the label of the larger weight
    clean_map: Array  # [B, h, w], class map of the images before mixing
    maps: list  # The signed maps of config.align.maps; [] where no term reads them.
    masks: Array | None  # Lungs, float32 [B, H, W] in 0..1


def make(
    config,
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    total_steps: int,
    groups: int = 1,
) -> Method:
    """The method of a config; arguments as in `methods.build`."""
    setting = Setting(
        config, network.model, network.scale, optimizer, total_steps, groups
    )
    return Method(
        streams=("labelled",),
        init=lambda _, variables: create_state(variables, optimizer),
        step=functools.partial(train_step, setting),
        scored=variables_of,
    )


def train_step(
    setting: Setting, state: TrainState, batches: dict[str, Batch], key: Array
) -> tuple[TrainState, dict]:
    """One step; the metrics are float32 scalars that stay on the device."""
    gradient, batch_stats, metrics = parts.accumulated(
        functools.partial(loss_and_gradient, setting, state.step),
        state.params,
        state.batch_stats,
        batches["labelled"],
        jax.random.fold_in(key, state.step),
        setting.config.train.accumulate,
    )
    metrics["gradient_norm"] = parts.norm(gradient)
    state = parts.update(state, setting.optimizer, gradient, batch_stats)
    return state, jax.tree.map(lambda m: m.astype(jnp.float32), metrics)


def loss_and_gradient(
    setting: Setting,
    step: Array,
    params: PyTree,
    batch_stats: PyTree,
    batch: Batch,
    key: Array,
) -> tuple[PyTree, PyTree, dict]:
    """(gradient, running statistics, metrics) of one batch."""
    key_augment, key_mix = jax.random.split(key)
    images = parts.prepare(key_augment, batch, setting.config, setting.scale)
    clean_map, clean_stats = clean_maps(
        setting, params, batch_stats, images[..., :3], batch
    )
    pair = mixed(setting, key_mix, images, batch.labels, clean_map)
    if reads_clean_maps(setting.config):  # Unmixed images count once (A5).
        changed = (pair.images != images).any()
        batch_stats = jax.tree.map(
            lambda new, old: jnp.where(changed, new, old), clean_stats, batch_stats
        )

    def loss_fn(params):
        # A mixed image belongs to the site of the image that it is pasted into.
        seen, new_stats = see(
            setting, params, batch_stats, pair, clean_map, batch.sites
        )
        loss, metrics = total_loss(setting, seen, step)
        return loss, (metrics, new_stats)

    gradient, (metrics, new_stats) = jax.grad(loss_fn, has_aux=True)(params)
    return gradient, new_stats, metrics


def reads_clean_maps(config) -> bool:
    """Whether the mix or CPE reads the class maps of the images before mixing."""
    mix, cpe = config.mix.name, config.cpe
    return mix == "snapmix" or (
        mix != "none" and cpe.weight > 0 and cpe.cam_source == "clean"
    )


def clean_maps(
    setting: Setting, params: PyTree, batch_stats: PyTree, images: Array, batch: Batch
) -> tuple[Array, PyTree]:
    """Class map [B, h, w] of each true label, and the statistics after the pass (A5).

    [B, 1, 1] zeros and no pass where nothing reads them.
    """
    if not reads_clean_maps(setting.config):
        return jnp.zeros((images.shape[0], 1, 1)), batch_stats
    (_, clean), batch_stats = jax.lax.stop_gradient(
        parts.forward(
            setting.model,
            params,
            batch_stats,
            images,
            setting.config.cam.mode,
            batch.sites,
        )
    )
    return of_class(clean.class_maps, batch.labels), batch_stats


def mixed(
    setting: Setting, key: Array, images: Array, labels: Array, clean_map: Array
) -> Mixed:
    """The batch after `config.mix`."""
    mix = setting.config.mix
    return MIXES[mix.name](
        key,
        images,
        labels,
        clean_map,
        prob=mix.prob,
        beta=mix.beta,
        same_class=mix.same_class,
        boxes=mix.boxes,
        groups=setting.groups,
    )


def see(
    setting: Setting,
    params: PyTree,
    batch_stats: PyTree,
    pair: Mixed,
    clean_map: Array,
    site: Array,
) -> tuple[Seen, PyTree]:
    """The training forward of the mixed images, and what the loss terms read of it."""
    config, model = setting.config, setting.model
    images, masks = pair.images[..., :3], pair.images[..., 3:]
    (logits, outputs), new_stats = parts.forward(
        model, params, batch_stats, images, "train", site
    )
    dominant = jnp.where(pair.weight_a >= pair.weight_b, pair.labels_a, pair.labels_b)
    variables = {"params": params, "batch_stats": batch_stats}
    maps, align = [], config.align
    if align.weight > 0 or align.mask_weight > 0:
        maps = saliency.signed_maps(
            align.maps,
            saliency.stages(model, variables, "explain", site),
            images,
            outputs,
            dominant,
            target=align.target,
            form=align.form,
            alpha_grad=align.alpha_grad,
            input_grad_fraction=align.input_grad_fraction,
        )
    lungs = masks[..., 0] if masks.shape[-1] else None
    seen = Seen(
        variables, site, logits, outputs, pair, dominant, clean_map, maps, lungs
    )
    return seen, new_stats


def loss_terms(config) -> list[tuple[str, float, float, Callable]]:
    """(name, weight, ramp, term): what the loss is the sum of.

    A term is a function of (setting, seen) that gives one value per image, or one for
    the batch. Its weight grows from 0 over the share `ramp` of all steps. A term of
    weight 0 is not in the list and costs nothing.
    """
    align = config.align
    terms = [
        ("cross_entropy", 1.0, 0.0, cross_entropy),
        ("cpe", config.cpe.weight, config.cpe.ramp, patch_contrast),
        ("contrastive", config.contrastive.weight, 0.0, image_contrast),
        ("align", align.weight, align.ramp, disagreement),
        ("outside_mask", align.mask_weight, align.ramp, outside_mask),
    ]
    return [term for term in terms if term[1] > 0]


def total_loss(setting: Setting, seen: Seen, step: Array) -> tuple[Array, dict]:
    """The weighted sum of the terms, and the metrics of the batch."""
    loss, metrics = 0.0, {}
    for name, weight, ramp, term in loss_terms(setting.config):
        metrics[name] = term(setting, seen).mean()
        if ramp:
            weight *= alignment.ramp(step, setting.total_steps, ramp)
        loss += weight * metrics[name]
    metrics |= alarms(setting, seen)
    metrics["accuracy"] = (seen.logits.argmax(-1) == seen.dominant).mean()
    return loss, metrics | {"loss": loss}


def cross_entropy(setting: Setting, seen: Seen) -> Array:
    """Of both labels by their weights (Huang et al. 2021), [B].

    With w of config.train.class_weights each label counts w[its class] times as much;
    with a share s of config.train.label_smoothing the target of a label is
    (1 - s) one-hot + s / K, weighed as the label is.
    """
    train, pair = setting.config.train, seen.pair
    scores = losses.SCORES[setting.config.loss.scores](seen.logits)
    weight_a, weight_b = pair.weight_a, pair.weight_b
    if train.class_weights != "none":
        by_class = jnp.asarray(losses.parse_class_weights(train.class_weights))
        weight_a = weight_a * by_class[pair.labels_a]
        weight_b = weight_b * by_class[pair.labels_b]
    loss = losses.mixed_cross_entropy(
        scores, pair.labels_a, pair.labels_b, weight_a, weight_b
    )
    if share := train.label_smoothing:
        flat = (weight_a + weight_b) * losses.uniform_cross_entropy(scores)
        loss = (1 - share) * loss + share * flat
    return loss


def relevance(setting: Setting, seen: Seen) -> Array:
    """By what CPE ranks the cells, [B, h, w] without gradient: see A4."""
    ranked = of_class(seen.outputs.class_maps, seen.dominant)
    if setting.config.cpe.cam_source == "clean" and reads_clean_maps(setting.config):
        ranked = seen.clean_map
    return jax.lax.stop_gradient(patch_relevance(ranked))


def patch_contrast(setting: Setting, seen: Seen) -> Array:
    """Contrastive patch embedding (Ali et al., Eq. 1), [B]."""
    cpe = setting.config.cpe
    return losses.contrastive_patch_embedding(
        seen.outputs.features,
        relevance(setting, seen),
        num_patches=cpe.num_patches,
        normalize=cpe.normalize,
        temperature=cpe.temperature,
        sqrt_d=cpe.sqrt_d,
        negatives=cpe.negatives,
    )


def image_contrast(setting: Setting, seen: Seen) -> Array:
    """Supervised NT-Xent between the images of the batch, on their projection (A16)."""
    embeddings = setting.model.apply(
        seen.variables, seen.outputs.features, "train", seen.site, method="project"
    )
    temperature = setting.config.contrastive.temperature
    return losses.supervised_nt_xent(embeddings, seen.dominant, temperature=temperature)


def disagreement(setting: Setting, seen: Seen) -> Array:
    """How far the saliency maps of an image are from pointing at one place, [B]."""
    align = setting.config.align
    return alignment.subbatch_alignment(
        seen.maps, distance=align.distance, **map_shape(setting, seen)
    )


def outside_mask(setting: Setting, seen: Seen) -> Array:
    """Share of the maps' energy outside the lungs, [B]."""
    covered = [z for z in seen.maps if z.shape[0] == seen.masks.shape[0]]
    dilate = setting.config.align.mask_dilate
    return alignment.energy_outside(
        covered, seen.masks, dilate=dilate, **map_shape(setting, seen)
    )


def map_shape(setting: Setting, seen: Seen) -> dict:
    """How a signed map becomes a distribution over the cells of the class map."""
    grid = seen.outputs.class_maps.shape[1]
    align = setting.config.align
    return {"grid": grid, "rectify": align.rectify, "eta": align.eta}


def alarms(setting: Setting, seen: Seen) -> dict:
    """Shares of maps that mean nothing: flat maps agree, and rank no cell."""
    metrics, config = {}, setting.config
    if config.cpe.weight > 0:
        metrics["cpe_constant_maps"] = is_flat(relevance(setting, seen)).mean()
    names = config.align.maps if seen.maps else ()
    for name, z in zip(names, seen.maps, strict=True):
        p = alignment.spatial_distribution(z, **map_shape(setting, seen))
        metrics[f"entropy/{name}"] = alignment.normalised_entropy(p).mean()
        metrics[f"empty/{name}"] = alignment.empty_fraction(z)
    return jax.lax.stop_gradient(metrics)
