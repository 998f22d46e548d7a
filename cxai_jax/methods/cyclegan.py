"""CycleGAN (Zhu et al. 2017) with semantic consistency (Hoffman et al. 2018).

    generators      2 GAN(source->target) + GAN(target->source) + cycle + semantics
    discriminators  real against a history of generated images, per domain

with least-squares GAN losses and weights as published for digits by CyCADA. The judge
of the semantics is a classifier `source` among the networks of the method.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from cxai_jax.methods import parts, translation
from cxai_jax.methods.translation import Setting, Several, to_input
from cxai_jax.models.discriminators import PatchDiscriminator
from cxai_jax.models.generators import ResNetGenerator
from cxai_jax.models.image_pool import ImagePool, empty_pool, exchange
from cxai_jax.objectives import adversarial
from cxai_jax.types import Array

GROUPS = {
    "generators": ("to_target", "to_source"),
    "discriminators": ("real_target", "real_source"),
}
gan = functools.partial(adversarial.gan, kind="least_squares")


def networks(adapt) -> dict:
    """The modules by name, of `config.adapt`."""
    return {
        "to_target": ResNetGenerator(adapt.width, adapt.blocks),
        "to_source": ResNetGenerator(adapt.width, adapt.blocks),
        "real_target": PatchDiscriminator(adapt.width),
        "real_source": PatchDiscriminator(adapt.width),
    }


def pools(config) -> dict[str, ImagePool]:
    """Empty histories of generated images."""
    side = config.data.image_size
    return {name: empty_pool(config.adapt.pool, side) for name in ("target", "source")}


def gradients(
    setting: Setting, state: Several, source: Array, target: Array, labels, keys
) -> tuple[dict, dict, dict, dict]:
    """One step's gradients by optimiser, the pools after it, images made, metrics."""
    generators, (metrics, fakes) = translation.gradient(
        setting, state, "generators", generator_loss, source, target, labels
    )
    after, mixture = {}, {}
    for domain, key in zip(("target", "source"), keys, strict=True):
        after[domain], mixture[domain] = exchange(
            state.pools[domain], fakes[domain], key
        )
    discriminators, seen = translation.gradient(
        setting, state, "discriminators", discriminator_loss, source, target, mixture
    )
    found = {"generators": generators, "discriminators": discriminators}
    return found, after, fakes, metrics | seen


def classify(setting: Setting, state: Several, images: Array) -> Array:
    """Logits of the source classifier, by the statistics of the batch, unchanged."""
    (logits, _), _ = parts.forward(
        setting.network.model,
        state.params["source"],
        state.batch_stats["source"],
        to_input(images, setting.network.scale),
        "train",
    )
    return logits


def generator_loss(setting, state, params, source, target, labels):
    """Adversaries, cycles and semantics of both translations."""
    cycle_weight = setting.config.adapt.cycle_weight

    def go(name, images):
        return setting.nets[name].apply({"params": params[name]}, images)

    def judged(domain, images):
        name = f"real_{domain}"
        scores = setting.nets[name].apply({"params": state.params[name]}, images)
        return gan(scores, True).mean()

    fake_target, fake_source = go("to_target", source), go("to_source", target)
    cycle = adversarial.absolute_difference(go("to_source", fake_target), source)
    cycle += adversarial.absolute_difference(go("to_target", fake_source), target)
    before = classify(setting, state, source)
    certain = optax.softmax_cross_entropy_with_integer_labels(before, labels).mean()
    # The true label of the source, and the judge's verdict on the target.
    semantic = optax.softmax_cross_entropy_with_integer_labels(
        classify(setting, state, fake_target), labels
    ) + adversarial.semantic_consistency(
        classify(setting, state, fake_source), classify(setting, state, target)
    )
    terms = {
        "fool": 2 * judged("target", fake_target) + judged("source", fake_source),
        "cycle": cycle_weight * cycle.mean(),
        # Not before the judge knows its digits.
        "semantic": jnp.where(certain <= 1, 1.0, 0.0) * semantic.mean(),
    }
    loss = sum(terms.values())
    fakes = {"target": fake_target, "source": fake_source}
    return loss, (terms | {"generators": loss}, jax.lax.stop_gradient(fakes))


def discriminator_loss(setting, state, params, source, target, fakes):
    """Half of real and half of generated images, for both domains."""
    loss = 0.0
    for domain, real in (("source", source), ("target", target)):
        name = f"real_{domain}"

        def judge(images, name=name):
            return setting.nets[name].apply({"params": params[name]}, images)

        loss += gan(judge(real), True).mean() / 2
        loss += gan(judge(fakes[domain]), False).mean() / 2
    return loss, {"discriminators": loss}


def translate(setting: Setting, state: Several, source, target) -> dict[str, Array]:
    """Pictures in -1..1 of both translations, for looking at."""
    return {
        "source -> target": setting.nets["to_target"].apply(
            {"params": state.params["to_target"]}, source
        ),
        "target -> source": setting.nets["to_source"].apply(
            {"params": state.params["to_source"]}, target
        ),
    }
