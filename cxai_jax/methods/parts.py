"""The parts that train steps share: images, forward pass, accumulation, update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from cxai_jax.data.augment import Scale, augment, normalise, options
from cxai_jax.methods.method import TrainState
from cxai_jax.types import Array, Batch, Mode, Outputs, PyTree


def prepare(key: Array, batch: Batch, config, scale: Scale) -> Array:
    """Augmented, normalised images [B, H, W, 3 (+ 1 if there are masks)].

    A mask travels as one more channel, so that every crop, flip and mix of the image
    is its own too.
    """
    stack = [batch.images] if batch.masks is None else [batch.images, batch.masks]
    channels = batch.images.shape[-1]
    images = augment(
        key,
        jnp.concatenate(stack, axis=-1),
        batch.sizes,
        channels=channels,
        **options(config),
    )
    masks = images[..., channels:].astype(jnp.float32) / 255
    images = normalise(images[..., :channels], scale.mean, scale.std)
    return jnp.concatenate([images, masks], axis=-1)


def forward(
    model: nn.Module,
    params: PyTree,
    batch_stats: PyTree,
    images: Array,
    mode: Mode,
    site: Array | None = None,
) -> tuple[tuple[Array, Outputs], PyTree]:
    """((logits, outputs), running statistics after the pass)."""
    variables = {"params": params, "batch_stats": batch_stats}
    if mode != "train":
        return model.apply(variables, images, mode, site), batch_stats
    out, updated = model.apply(variables, images, mode, site, mutable=["batch_stats"])
    return out, updated.get("batch_stats", {})


def update(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    batch_stats: PyTree,
) -> TrainState:
    """The state after one step of its optimiser."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )


def accumulated(
    loss_and_gradient: Callable, params: PyTree, batch_stats: PyTree, batch, key, count
) -> tuple[PyTree, PyTree, dict]:
    """`loss_and_gradient(params, batch_stats, batch, key)` over `count` micro-batches.

    Returns:
      (mean gradient, running statistics, mean metrics).
    """
    if count == 1:
        return loss_and_gradient(params, batch_stats, batch, key)

    def micro_step(carry, given):
        total, batch_stats = carry
        rows, number = given
        gradient, batch_stats, metrics = loss_and_gradient(
            params, batch_stats, rows, jax.random.fold_in(key, number)
        )
        return (jax.tree.map(jnp.add, total, gradient), batch_stats), metrics

    zero = jax.tree.map(jnp.zeros_like, params)
    (gradient, batch_stats), metrics = jax.lax.scan(
        micro_step,
        (zero, batch_stats),
        (micro_batches(batch, count), jnp.arange(count)),
    )
    gradient = jax.tree.map(lambda g: g / count, gradient)
    return gradient, batch_stats, jax.tree.map(jnp.mean, metrics)


def micro_batches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B/count, ...]; every device keeps its own rows.

    Micro-batch a takes the rows a, a + count, ...: consecutive rows would sit on one
    device and the others would idle or fetch them.
    """

    def split(x):
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def norm(tree: PyTree) -> Array:
    """L2 norm over all leaves, float32 scalar."""
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))


def check_plain(config) -> None:
    """Raises ValueError for settings that only the guided method reads."""
    wanted = {
        "config.mix.name": (config.mix.name, "none"),
        "config.cpe.weight": (config.cpe.weight, 0),
        "config.contrastive.weight": (config.contrastive.weight, 0),
        "config.align.weight": (config.align.weight, 0),
        "config.align.mask_weight": (config.align.mask_weight, 0),
        "config.train.accumulate": (config.train.accumulate, 1),
    }
    for field, (value, plain) in wanted.items():
        if value != plain:
            raise ValueError(
                f"config.method={config.method} has no use for {field}={value!r}; set "
                f"it to {plain!r}"
            )
