"""Domain-adversarial training (DANN, Ganin et al. 2016).

    loss = CE(task(source), labels) + CE(domain(reversed(features)), domain)

The gradient of the domain classifier is reversed, and multiplied by lambda, on its way
into the network, whose features so lose what tells the domains apart. Each domain is
normalised by its own batch statistics, as target_statistics.py does, and the running
ones are the target's. The domain classifier reads the whole last map, one layer before
the pooling of the head. Deviation: the network has norms.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from cxai_jax.methods import parts
from cxai_jax.methods.method import Method, Network, TrainState, create_state
from cxai_jax.models.discriminators import DomainClassifier
from cxai_jax.objectives import adversarial
from cxai_jax.types import Array, Batch, PyTree


class Setting(NamedTuple):
    """What stays the same over all steps of a run."""

    config: object
    network: Network
    domain: nn.Module
    optimizer: optax.GradientTransformation
    total_steps: int


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
      ValueError: for mixing, a guided loss or accumulation, which DANN has none of.
    """
    parts.check_plain(config)
    domain = DomainClassifier(config.adapt.hidden)
    setting = Setting(config, network, domain, optimizer, total_steps)
    return Method(
        streams=("source", "target"),
        init=functools.partial(init, setting),
        step=functools.partial(train_step, setting),
        scored=lambda state: {
            "params": state.params["task"],
            "batch_stats": state.batch_stats,
        },
    )


def init(setting: Setting, key: Array, variables: PyTree) -> TrainState:
    """A state of both networks, under one optimiser as in the paper."""
    side = setting.config.data.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    seen = jax.eval_shape(
        lambda v, x: setting.network.model.apply(v, x, "eval")[1].features,
        variables,
        images,
    )
    flat = jnp.zeros((1, math.prod(seen.shape)))
    domain = setting.domain.init(key, flat)["params"]
    both = {**variables, "params": {"task": variables["params"], "domain": domain}}
    return create_state(both, setting.optimizer)


def train_step(
    setting: Setting, state: TrainState, batches: dict[str, Batch], key: Array
) -> tuple[TrainState, dict]:
    """One step; the metrics are float32 scalars that stay on the device."""
    config, network = setting.config, setting.network
    key_source, key_target = jax.random.split(jax.random.fold_in(key, state.step))
    labels = batches["source"].labels
    images, stats = {}, state.batch_stats
    for name, own in (("source", key_source), ("target", key_target)):
        images[name] = parts.prepare(own, batches[name], config, network.scale)[..., :3]
    progress = state.step / setting.total_steps
    weight = config.adapt.weight * adversarial.domain_ramp(progress)

    def loss_fn(params):
        def see(name):
            (logits, outputs), after = parts.forward(
                network.model, params["task"], stats, images[name], "train"
            )
            flat = outputs.features.reshape(len(logits), -1)
            hidden = adversarial.reverse_gradient(flat, weight)
            domains = setting.domain.apply({"params": params["domain"]}, hidden)
            return logits, domains, after

        logits, of_source, _ = see("source")
        _, of_target, after = see("target")
        terms = {
            "cross_entropy": optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean(),
            "domain_cross_entropy": adversarial.domain_cross_entropy(
                of_source, of_target
            ).mean(),
        }
        loss = terms["cross_entropy"] + terms["domain_cross_entropy"]
        terms |= {
            "loss": loss,
            "accuracy": (logits.argmax(-1) == labels).mean(),
            "domain_accuracy": adversarial.domain_accuracy(of_source, of_target),
            "lambda": weight,
        }
        return loss, (terms, after)

    gradient, (metrics, after) = jax.grad(loss_fn, has_aux=True)(state.params)
    metrics["gradient_norm"] = parts.norm(gradient)
    state = parts.update(state, setting.optimizer, gradient, after)
    return state, jax.tree.map(lambda m: m.astype(jnp.float32), metrics)
