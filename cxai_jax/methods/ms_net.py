"""MS-Net (Liu et al. 2020): heads of each site teach one universal head.

    auxiliary step  CE(h_s(z), y)                                 -> h_s and trunk
    universal step  (1 - d) CE(h(z), y) + d CE(h(z), argmax h_s(z))  -> h and trunk

z are the features of the trunk with norms of each site, d is config.ms_net.distill. The
universal step begins after the share config.ms_net.warmup of all steps, sees the trunk
and the heads that the auxiliary step of the same batch has left, and the labels that it
takes from them carry no gradient. Both steps have an optimiser of their own. Scored is
the universal head, on the norms of the image's site.

Deviations: the original segments prostates, with Dice losses, decoders for heads and a
batch of each site, whose losses it adds; here the loss is the mean over one batch of
all sites. The heads of the sites start as the universal one does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from cxai_jax.data.augment import Scale
from cxai_jax.methods import parts
from cxai_jax.methods.method import Method, Network, variables_of
from cxai_jax.objectives import losses
from cxai_jax.types import Array, Batch, PyTree


class Setting(NamedTuple):
    """What stays the same over all steps of a run."""

    config: object
    model: nn.Module
    scale: Scale
    optimizer: optax.GradientTransformation
    warmup_steps: int


@struct.dataclass
class State:
    """The network with its universal head, and the heads of the sites."""

    step: Array  # int32 scalar, optimiser steps taken
    params: PyTree
    site_heads: PyTree  # As params["head"], with S in front of every shape.
    batch_stats: PyTree
    opt_state: dict[str, PyTree]  # Of the auxiliary and of the universal step.


def make(
    config,
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    total_steps: int,
    groups: int = 1,
) -> Method:
    """The method of a config; arguments as in `methods.build`.

    Raises:
      ValueError: for fields that this method does not read, or a network without
        norms of each site.
    """
    parts.check_plain(config)
    if config.model.norm != "per_site":
        raise ValueError(
            "config.method=ms_net has norms of each site, and config.model.norm is "
            f"{config.model.norm!r}; set it to 'per_site'"
        )
    if "head" in network.variables.get("batch_stats", {}):
        raise ValueError(
            "config.method=ms_net needs a head without norms; set config.model.head="
            "linear"
        )
    warmup_steps = round(config.ms_net.warmup * total_steps)
    setting = Setting(config, network.model, network.scale, optimizer, warmup_steps)
    return Method(
        streams=("labelled",),
        init=functools.partial(init, optimizer, network.num_sites),
        step=functools.partial(train_step, setting),
        scored=variables_of,
    )


def init(optimizer, num_sites: int, _: Array, variables: PyTree) -> State:
    """The state that a run starts from."""
    params = variables["params"]
    site_heads = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (num_sites, *leaf.shape)), params["head"]
    )
    opt_state = {
        "auxiliary": optimizer.init(params | {"head": site_heads}),
        "universal": optimizer.init(params),
    }
    step = jnp.zeros((), jnp.int32)
    return State(step, params, site_heads, variables["batch_stats"], opt_state)


def train_step(
    setting: Setting, state: State, batches: dict[str, Batch], key: Array
) -> tuple[State, dict]:
    """One step; the metrics are float32 scalars that stay on the device."""
    batch = batches["labelled"]
    key = jax.random.fold_in(key, state.step)
    images = parts.prepare(key, batch, setting.config, setting.scale)[..., :3]
    taught, auxiliary, metrics = auxiliary_step(setting, state, images, batch)
    learnt, universal, others = universal_step(setting, taught, images, batch)
    started = state.step >= setting.warmup_steps
    after = jax.tree.map(lambda new, old: jnp.where(started, new, old), learnt, taught)
    metrics |= others | {"loss": auxiliary + universal}
    metrics = jax.tree.map(lambda m: m.astype(jnp.float32), metrics)
    return after.replace(step=state.step + 1), metrics


def auxiliary_step(
    setting: Setting, state: State, images: Array, batch: Batch
) -> tuple[State, Array, dict]:
    """Every site's head and the trunk learn the labels: (state, loss, metrics)."""

    def loss_fn(params):
        network = params | {"head": state.params["head"]}
        (_, outputs), stats = parts.forward(
            setting.model, network, state.batch_stats, images, "train", batch.sites
        )
        logits = of_site(setting, params, outputs.features, batch.sites)
        return cross_entropy(setting, logits, batch.labels), stats

    before = state.params | {"head": state.site_heads}
    (loss, stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(before)
    after, opt_state = updated(setting, "auxiliary", state, before, gradient)
    state = state.replace(
        params=after | {"head": state.params["head"]},
        site_heads=after["head"],
        batch_stats=stats,
        opt_state=opt_state,
    )
    return state, loss, {"auxiliary": loss}


def universal_step(
    setting: Setting, state: State, images: Array, batch: Batch
) -> tuple[State, Array, dict]:
    """The universal head and the trunk learn labels and the site heads' answers."""
    distill = setting.config.ms_net.distill

    def loss_fn(params):
        (logits, outputs), stats = parts.forward(
            setting.model, params, state.batch_stats, images, "train", batch.sites
        )
        heads = params | {"head": state.site_heads}
        taught = of_site(setting, heads, outputs.features, batch.sites)
        answers = taught.argmax(-1)
        hard = cross_entropy(setting, logits, batch.labels)
        soft = cross_entropy(setting, logits, answers)
        accuracy = (logits.argmax(-1) == batch.labels).mean()
        agreement = (logits.argmax(-1) == answers).mean()
        metrics = {"accuracy": accuracy, "cross_entropy": hard, "agreement": agreement}
        return (1 - distill) * hard + distill * soft, (stats, metrics)

    (loss, (stats, metrics)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params
    )
    params, opt_state = updated(setting, "universal", state, state.params, gradient)
    state = state.replace(params=params, batch_stats=stats, opt_state=opt_state)
    return state, loss, metrics | {"gradient_norm": parts.norm(gradient)}


def of_site(setting: Setting, params: PyTree, features: Array, site: Array) -> Array:
    """Logits [B, K] of each image by its own site's of the heads in params["head"]."""

    def answer(head):
        variables = {"params": params | {"head": head}}
        return setting.model.apply(variables, features, "train", method="head")

    logits = jax.vmap(answer)(params["head"])
    own = jax.nn.one_hot(site, len(logits), axis=0, dtype=logits.dtype)
    return (own[..., None] * logits).sum(0)


def cross_entropy(setting: Setting, logits: Array, labels: Array) -> Array:
    """Mean cross-entropy of what config.loss.scores makes of the logits."""
    scores = losses.SCORES[setting.config.loss.scores](logits)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def updated(
    setting: Setting, which: str, state: State, params: PyTree, gradient: PyTree
) -> tuple[PyTree, dict[str, PyTree]]:
    """(parameters, states of both optimisers) after a step of one of them."""
    changes, own = setting.optimizer.update(gradient, state.opt_state[which], params)
    return optax.apply_updates(params, changes), state.opt_state | {which: own}
