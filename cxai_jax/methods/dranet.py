"""DRANet (Lee et al. 2021): one encoder, separator and generator for all domains.

Features are content plus style; content of one domain, scaled for another, with the
style of that makes a translation. A step updates, one after the other, as published,

    D        per domain: cross-entropy of real and translated images, weight 0.5
    E, S, G  twice: 5 |x - G(E(x))| + consistency of content and style
             + content and style seen by a fixed network + fooling D
    task     cross-entropy of source images and of their translations

Bi-directional between source and target. With the stream `other` it is tri-directional:
the source translates to and from both, which share all but discriminators and scales.
Deviations: no label of a target trains a classifier of the reverse direction; without
`config.adapt.perceptual` the fixed network has random weights, whose content differs
little between images, so that a weight of 1 lets style carry all; the discriminator of
USPS is as deep as the others; all pairs share one weight of style and one of fooling;
the last state is scored, not the best on test images.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from cxai_jax.methods import parts, translation
from cxai_jax.methods.method import Method, Network
from cxai_jax.methods.translation import Setting, Several, to_input
from cxai_jax.models import vgg
from cxai_jax.models.discriminators import SpectralDiscriminator
from cxai_jax.models.generators import Encoder, Generator, Separator
from cxai_jax.objectives import adversarial
from cxai_jax.types import Array, Batch, PyTree

WITH_STATISTICS = ("separator", "generator")
gan = functools.partial(adversarial.gan, kind="cross_entropy")


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
      ValueError: for guided settings or a side that cannot be halved four times.
    """
    parts.check_plain(config)
    translation.check_pictures(config)
    adapt = config.adapt
    others = ("target", "other") if config.data.other else ("target",)
    domains = ("source", *others)
    pairs = tuple(
        name for d in others for name in (pair("source", d), pair(d, "source"))
    )
    width = adapt.width
    nets = {
        "encoder": Encoder(width),
        "separator": Separator(pairs),
        "generator": Generator(width),
        "perceptual": vgg.VGG19(adapt.perceptual_width),
    }
    nets |= {f"real_{d}": SpectralDiscriminator(width) for d in domains}
    judges = tuple(f"real_{d}" for d in domains)
    groups_of = {
        "classifiers": ("task",),
        "generators": ("encoder", "separator", "generator"),
        "discriminators": judges,
    }
    optimizers = {
        "classifiers": optimizer,
        "generators": translation.adam(adapt.lr),
        "discriminators": translation.adam(adapt.lr),
    }
    setting = Setting(config, network, nets, optimizers, groups_of, total_steps)
    return Method(
        streams=domains,
        init=functools.partial(init, setting),
        step=functools.partial(train_step, setting),
        scored=translation.scored,
    )


def pair(source: str, target: str) -> str:
    """Name of the translation from one domain to another."""
    return f"{source} to {target}"


def ends(name: str) -> list[str]:
    """The two domains of a translation."""
    return name.split(" to ")


def init(setting: Setting, key: Array, variables: PyTree) -> Several:
    """All networks."""
    side, adapt = setting.config.data.image_size, setting.config.adapt
    image, nets = jnp.zeros((1, side, side, 3)), setting.nets
    features = jnp.zeros((1, side // 2, side // 2, 2 * adapt.width))
    inputs = {"encoder": (image,), "separator": (features, False)}
    inputs |= {"generator": (features, False)}
    params, stats = {"task": variables["params"]}, {"task": variables["batch_stats"]}
    for number, (name, net) in enumerate(nets.items()):
        own = jax.random.fold_in(key, number)
        if name == "perceptual":
            params[name] = vgg.weights(net, adapt.perceptual, own)
            continue
        made = translation.first_variables(net, own, *inputs.get(name, (image, False)))
        params[name] = made["params"]
        if "batch_stats" in made:
            stats[name] = made["batch_stats"]
    return translation.first_state(setting, params, stats, {})


def train_step(
    setting: Setting, state: Several, batches: dict[str, Batch], key: Array
) -> tuple[Several, dict]:
    """One step of all optimisers, one after the other."""
    config, scale = setting.config, setting.network.scale
    keys = jax.random.split(jax.random.fold_in(key, state.step), len(batches))
    images = {
        domain: translation.pictures(own, batches[domain], config, scale)
        for own, domain in zip(keys, sorted(batches), strict=True)
    }
    metrics = {}

    def advance(state, name, function, *arguments):
        gradient, (stats, seen) = translation.gradient(
            setting, state, name, function, *arguments
        )
        metrics.update(seen)
        metrics[f"gradient_norm/{name}"] = parts.norm(gradient)
        state = state.replace(batch_stats=state.batch_stats | stats)
        return translation.updated(setting, state, name, gradient)

    state = advance(state, "discriminators", discriminator_loss, images)
    for _ in range(config.adapt.generator_steps):
        state = advance(state, "generators", generator_loss, images)
    labels = batches["source"].labels
    state = advance(state, "classifiers", classifier_loss, images, labels)
    metrics["loss"] = metrics["generators"] + metrics["cross_entropy"]
    return translation.finished(state, metrics)


def translations(setting: Setting, state: Several, params: dict, images: dict) -> tuple:
    """All that E, S and G make of the images of a step.

    Returns:
      (content and style by domain, scaled content and picture by pair, features by
      domain, running statistics).
    """
    stats = {}

    def run(name, *arguments):
        variables = {"params": params[name], "batch_stats": state.batch_stats[name]}
        out, after = setting.nets[name].apply(
            variables, *arguments, True, mutable=["batch_stats"]
        )
        stats[name] = after["batch_stats"]
        return out

    features, contents, styles, scaled, made = {}, {}, {}, {}, {}
    for domain, x in images.items():
        features[domain] = setting.nets["encoder"].apply(
            {"params": params["encoder"]}, x
        )
        parted = run("separator", features[domain])
        contents[domain], styles[domain], scales = parted
    for name, factor in scales.items():
        source, target = ends(name)
        if not {source, target} <= images.keys():
            continue
        scaled[name] = factor * contents[source]
        made[name] = run("generator", scaled[name] + styles[target])
    return contents, styles, scaled, made, features, jax.lax.stop_gradient(stats)


def judge(setting: Setting, state: Several, params: dict, domain: str, images: Array):
    """(scores, statistics) of the discriminator of a domain."""
    name = f"real_{domain}"
    variables = {"params": params[name], "batch_stats": state.batch_stats[name]}
    scores, after = setting.nets[name].apply(
        variables, images, True, mutable=["batch_stats"]
    )
    return scores, {name: jax.lax.stop_gradient(after["batch_stats"])}


def discriminator_loss(setting, state, params, images):
    """Half the cross-entropy of real images and of every translation."""
    *_, made, _, _ = translations(setting, state, state.params, images)
    loss, stats = 0.0, {}
    for domain, real in images.items():
        scores, after = judge(setting, state, params, domain, real)
        loss += 0.5 * gan(scores, True).mean()
        stats |= after
    for name, fake in made.items():
        fake = jax.lax.stop_gradient(fake)
        scores, _ = judge(setting, state, params, ends(name)[1], fake)
        loss += 0.5 * gan(scores, False).mean()
    return loss, (stats, {"discriminators": loss})


def generator_loss(setting, state, params, images):
    """Reconstruction, consistency, content, style and adversaries."""
    adapt, nets = setting.config.adapt, setting.nets
    contents, styles, scaled, made, features, stats = translations(
        setting, state, params, images
    )

    def apply(name, *arguments):
        variables = {"params": params[name]}
        if name in WITH_STATISTICS:
            variables["batch_stats"] = state.batch_stats[name]
            arguments += (False,)
        return nets[name].apply(variables, *arguments)

    def maps(x):
        return nets["perceptual"].apply({"params": state.params["perceptual"]}, x)

    far = adversarial.absolute_difference
    looked = {domain: maps(x) for domain, x in images.items()}
    terms = dict.fromkeys(
        ("reconstruction", "consistency", "content", "style", "fool"), 0.0
    )
    for domain, x in images.items():
        rebuilt = apply("generator", features[domain])
        terms["reconstruction"] += 5 * far(rebuilt, x).mean()
    for name, fake in made.items():
        source, target = ends(name)
        content, style, _ = apply("separator", apply("encoder", fake))
        terms["consistency"] += far(content, scaled[name]).mean()
        terms["consistency"] += far(style, styles[target]).mean()
        seen = maps(fake)
        terms["content"] += (
            adapt.content_weight
            * adversarial.squared_difference(looked[source][-1], seen[-1]).mean()
        )
        terms["style"] += adapt.style_weight * sum(
            adversarial.style_difference(a, b).mean()
            for a, b in zip(looked[target][:-1], seen[:-1], strict=True)
        )
        scores, _ = judge(setting, state, state.params, target, fake)
        terms["fool"] += adapt.weight * gan(scores, True).mean()
    loss = sum(terms.values())
    return loss, (stats, terms | {"generators": loss})


def classifier_loss(setting, state, params, images, labels):
    """Cross-entropy of the source and of its translations into the scored target."""
    scale = setting.network.scale
    *_, made, _, _ = translations(setting, state, state.params, images)
    fake = jax.lax.stop_gradient(made[pair("source", "target")])
    model, before = setting.network.model, state.batch_stats["task"]
    loss = 0.0
    # The running statistics are those of the translations, as the target is scored.
    for x in (images["source"], fake):
        (logits, _), after = parts.forward(
            model, params["task"], before, to_input(x, scale), "train"
        )
        loss += optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    metrics = {
        "cross_entropy": loss / 2,
        "accuracy": (logits.argmax(-1) == labels).mean(),
    }
    return loss, ({"task": after}, metrics)


def translate(setting: Setting, state: Several, source, target) -> dict[str, Array]:
    """Pictures in -1..1 of both translations, for looking at."""
    images = {"source": source, "target": target}
    *_, made, _, _ = translations(setting, state, state.params, images)
    return {name.replace(" to ", " -> "): x for name, x in made.items()}
