"""The train step and the predict step: pure functions, one XLA graph each.

    augment -> clean forward (no gradient) -> class map of the true label
            -> mix(images, labels, maps) -> forward of the mixed batch
            -> mixed cross-entropy + CPE + NT-Xent + alignment -> optimiser

The clean forward runs once and serves both SnapMix and CPE (the published step runs it
twice); without mixing one forward serves everything. Randomness is
`fold_in(key, step)`, so nothing random is ever saved.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from cxai_jax import alignment, losses, saliency, tta, voting
from cxai_jax.augment import CROPS, NORMALISATIONS, Scale, augment, normalise
from cxai_jax.cam import is_flat, of_class, patch_relevance
from cxai_jax.mixing import MIXES
from cxai_jax.types import Array, Batch, PyTree


@struct.dataclass
class TrainState:
    """All that a step changes, and all that a checkpoint holds."""

    step: Array  # int32 scalar, optimiser steps taken
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree


def create_state(
    variables: PyTree, optimizer: optax.GradientTransformation
) -> TrainState:
    """A fresh state from a model's variables."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
    )


def check_config(config) -> None:
    """Raises ValueError for an unknown name among the step's choices."""
    known = {
        "config.data.normalisation": (config.data.normalisation, NORMALISATIONS),
        "config.mix.name": (config.mix.name, tuple(MIXES)),
        "config.augment.crop": (config.augment.crop, CROPS),
        "config.cam.mode": (config.cam.mode, ("train", "eval")),
        "config.cpe.cam_source": (config.cpe.cam_source, ("mixed", "clean")),
    }
    for field, (value, names) in known.items():
        if value not in names:
            raise ValueError(f"{field} is {value!r}; known: {', '.join(names)}")
    if config.contrastive.weight > 0 and not config.model.projection:
        raise ValueError(
            f"config.contrastive.weight is {config.contrastive.weight}, but "
            "config.model.projection is 0: give the embedding a width, such as 128"
        )


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config,
    *,
    scale: Scale,
    total_steps: int,
    groups: int = 1,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, dict]]:
    """Builds `train_step(state, batch, key) -> (state, metrics)`.

    Args:
      model: a backbone of `cxai_jax.models`.
      config: the whole run's config; read once, here.
      scale: the backbone's input normalisation.
      total_steps: optimiser steps of the run, for the alignment ramp.
      groups: mixing partners are drawn inside `groups` equal runs of the batch.

    Returns:
      A pure function; the metrics are float32 scalars that stay on the device.
    """
    check_config(config)
    mix, cpe, align = config.mix, config.cpe, config.align
    contrastive = config.contrastive
    mixed = mix.name != "none"
    use_clean_maps = mix.name == "snapmix" or (
        mixed and cpe.weight > 0 and cpe.cam_source == "clean"
    )
    use_alignment = align.weight > 0 or align.mask_weight > 0

    def forward(params, batch_stats, images, mode):
        variables = {"params": params, "batch_stats": batch_stats}
        if mode != "train":
            return model.apply(variables, images, mode), batch_stats
        out, updated = model.apply(variables, images, mode, mutable=["batch_stats"])
        return out, updated["batch_stats"]

    def prepare(key, batch):
        """Augmented, normalised images [B, H, W, 3 (+ 1 if there are masks)].

        A mask travels as one more channel, so that every crop, flip and mix of the
        image is its own too.
        """
        stack = [batch.images] if batch.masks is None else [batch.images, batch.masks]
        images = augment(
            key,
            jnp.concatenate(stack, axis=-1),
            batch.sizes,
            size=config.data.image_size,
            crop=config.augment.crop,
            hflip=config.augment.hflip,
            vflip=config.augment.vflip,
        )
        channels = batch.images.shape[-1]
        masks = images[..., channels:].astype(jnp.float32) / 255
        images = normalise(images[..., :channels], scale.mean, scale.std)
        return jnp.concatenate([images, masks], axis=-1)

    def loss_and_gradient(params, batch_stats, batch, key, step):
        key_augment, key_mix = jax.random.split(key)
        images = prepare(key_augment, batch)
        clean_map = jnp.zeros((images.shape[0], 1, 1))  # Not read unless it is made.
        if use_clean_maps:
            (_, clean), clean_stats = jax.lax.stop_gradient(
                forward(params, batch_stats, images[..., :3], config.cam.mode)
            )
            clean_map = of_class(clean.class_maps, batch.labels)
        pair = MIXES[mix.name](
            key_mix,
            images,
            batch.labels,
            clean_map,
            prob=mix.prob,
            beta=mix.beta,
            same_class=mix.same_class,
            boxes=mix.boxes,
            groups=groups,
        )
        if use_clean_maps:  # Images that no mix has changed count once (A5).
            changed = (pair.images != images).any()
            batch_stats = jax.tree.map(
                lambda new, old: jnp.where(changed, new, old), clean_stats, batch_stats
            )
        dominant = jnp.where(
            pair.weight_a >= pair.weight_b, pair.labels_a, pair.labels_b
        )

        inputs, masks = pair.images[..., :3], pair.images[..., 3:]

        def loss_fn(params):
            (logits, out), new_stats = forward(params, batch_stats, inputs, "train")
            terms = {
                "cross_entropy": losses.mixed_cross_entropy(
                    logits, pair.labels_a, pair.labels_b, pair.weight_a, pair.weight_b
                ).mean()
            }
            loss = terms["cross_entropy"]
            if cpe.weight > 0:
                ranked = of_class(out.class_maps, dominant)
                if use_clean_maps and cpe.cam_source == "clean":
                    ranked = clean_map
                relevance = jax.lax.stop_gradient(patch_relevance(ranked))
                terms["cpe_constant_maps"] = is_flat(relevance).mean()
                terms["cpe"] = losses.contrastive_patch_embedding(
                    out.features,
                    relevance,
                    num_patches=cpe.num_patches,
                    normalize=cpe.normalize,
                    temperature=cpe.temperature,
                    negatives=cpe.negatives,
                ).mean()
                loss += cpe.weight * terms["cpe"]
            if contrastive.weight > 0:
                embeddings = model.apply(
                    {"params": params}, out.features, method="project"
                )
                terms["contrastive"] = losses.supervised_nt_xent(
                    embeddings, dominant, temperature=contrastive.temperature
                ).mean()
                loss += contrastive.weight * terms["contrastive"]
            if use_alignment:
                variables = {"params": params, "batch_stats": batch_stats}
                value, extra = alignment_terms(
                    align,
                    explained(model, variables),
                    inputs,
                    out,
                    dominant,
                    masks[..., 0] if masks.shape[-1] else None,
                )
                terms |= extra
                loss += alignment.ramp(step, total_steps, align.ramp) * value
            terms["accuracy"] = (logits.argmax(-1) == dominant).mean()
            return loss, (terms | {"loss": loss}, new_stats)

        gradient, (metrics, new_stats) = jax.grad(loss_fn, has_aux=True)(params)
        return gradient, new_stats, metrics

    def train_step(state, batch, key):
        key = jax.random.fold_in(key, state.step)
        count = config.train.accumulate
        if count == 1:
            gradient, batch_stats, metrics = loss_and_gradient(
                state.params, state.batch_stats, batch, key, state.step
            )
        else:

            def micro_step(carry, given):
                total, batch_stats = carry
                rows, number = given
                gradient, batch_stats, metrics = loss_and_gradient(
                    state.params,
                    batch_stats,
                    rows,
                    jax.random.fold_in(key, number),
                    state.step,
                )
                return (jax.tree.map(jnp.add, total, gradient), batch_stats), metrics

            zero = jax.tree.map(jnp.zeros_like, state.params)
            (gradient, batch_stats), metrics = jax.lax.scan(
                micro_step,
                (zero, state.batch_stats),
                (micro_batches(batch, count), jnp.arange(count)),
            )
            gradient = jax.tree.map(lambda g: g / count, gradient)
            metrics = jax.tree.map(jnp.mean, metrics)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics["gradient_norm"] = norm(gradient)
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        return state, jax.tree.map(lambda m: m.astype(jnp.float32), metrics)

    return train_step


def explained(model: nn.Module, variables: PyTree) -> saliency.Explained:
    """The model's stages in `explain` mode, as functions of arrays."""

    def stage(method):
        return lambda x: model.apply(variables, x, "explain", method=method)

    return saliency.Explained(
        lower=stage("lower"),
        upper=stage("upper"),
        head=lambda features: model.apply(variables, features, method="head"),
    )


def alignment_terms(align, network, images, outputs, labels, masks):
    """Weighted alignment and mask terms of one batch, without the ramp.

    Args:
      align: `config.align`.
      network: the stages in `explain` mode.
      images: normalised images [B, H, W, 3].
      outputs: of the training forward of these images.
      labels: class to explain, int [B].
      masks: float32 [B, H, W] in 0..1, or None.

    Returns:
      (scalar, metrics).
    """
    maps = saliency.signed_maps(
        align.maps,
        network,
        images,
        outputs,
        labels,
        target=align.target,
        form=align.form,
        alpha_grad=align.alpha_grad,
        input_grad_fraction=align.input_grad_fraction,
    )
    shape = {
        "grid": outputs.class_maps.shape[1],
        "rectify": align.rectify,
        "eta": align.eta,
    }
    total, terms = 0.0, {}
    if align.weight > 0:
        terms["align"] = alignment.subbatch_alignment(
            maps, distance=align.distance, **shape
        ).mean()
        total += align.weight * terms["align"]
    if align.mask_weight > 0:
        covered = [z for z in maps if z.shape[0] == masks.shape[0]]
        terms["outside_mask"] = alignment.energy_outside(
            covered, masks, dilate=align.mask_dilate, **shape
        ).mean()
        total += align.mask_weight * terms["outside_mask"]
    for name, z in zip(align.maps, maps, strict=True):  # The collapse alarm.
        p = alignment.spatial_distribution(z, **shape)
        terms[f"entropy/{name}"] = alignment.normalised_entropy(p).mean()
        terms[f"empty/{name}"] = alignment.empty_fraction(z)
    return total, jax.lax.stop_gradient(terms)


def norm(tree: PyTree) -> Array:
    """L2 norm over all leaves, float32 scalar."""
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))


def micro_batches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B/count, ...]; every device keeps its own rows.

    Micro-batch a takes the rows a, a + count, ...: consecutive rows would sit on one
    device and the others would idle or fetch them.
    """

    def split(x):
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def resident(train_step: Callable) -> Callable:
    """Runs S steps in one dispatch on a split that lives on the device.

    Returns:
      `steps(state, split, rows, key) -> (state, metrics)` where `split` is a whole
      data split as a Batch [N, ...], `rows` int32 [S, B], and each metric is [S].
    """

    def steps(state, split, rows, key):
        def body(state, rows):
            return train_step(state, jax.tree.map(lambda x: x[rows], split), key)

        if rows.shape[0] == 1:  # A loop of one would only hide fusion from XLA.
            state, metrics = body(state, rows[0])
            return state, jax.tree.map(lambda m: m[None], metrics)
        return jax.lax.scan(body, state, rows)

    return steps


def make_predict_step(model: nn.Module, scale: Scale, tta_config) -> Callable:
    """Builds `predict(variables, images) -> {logits, probs, class_maps}`, one graph.

    As `voting.make_first_look`, but probs are p_0 .. p_k of the test-time masks,
    float32 [B, k+1, K]: [B, 1, K] where tta_config.k is 0. Every mask is run, so that
    any smaller k and any theta can be read off afterwards.
    """
    look = voting.make_first_look(model, scale, tta_config)
    forward = voting.make_vote_forward(model)

    def predict(variables, images):
        seen = look(variables, images)
        probs, reuse = seen["probs"][:, None], None
        if crops := voting.prefix_crops(model, images.shape[1], tta_config):
            reuse = voting.split_forward(model, variables, crops), seen["prefix"]
        if tta_config.k:
            probs = tta.masked_probs(
                lambda masked: forward(variables, masked),
                seen["images"],
                seen["cells"],
                seen["probs"],
                grid=images.shape[1] // tta_config.patch,
                fill=tta_config.fill,
                chunk=tta_config.chunk,
                reuse=reuse,
            )
        return {
            "logits": seen["logits"],
            "probs": probs,
            "class_maps": seen["class_maps"],
        }

    return predict


def make_voting_step(model: nn.Module, scale: Scale, tta_config) -> Callable:
    """As `make_predict_step` with the count of the votes, still one graph.

    With tta_config.k > 0 the dict also holds `votes`, a tta.Votes.
    """
    predict = make_predict_step(model, scale, tta_config)

    def vote(variables, images):
        out = predict(variables, images)
        if tta_config.k:
            votes = tta.votes_for(out["probs"], theta=tta_config.theta, k=tta_config.k)
            out["votes"] = votes
        return out

    return vote
