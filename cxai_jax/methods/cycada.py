"""CyCADA (Hoffman et al. 2018): pixels and features of the target, cycle-consistent.

    translation     cyclegan.py
    source          cross-entropy of the source: the judge of the semantics
    task            cross-entropy of translated source images, and a feature adversary

Only `task` is scored. Deviations: everything is trained in one step, where the
published code trains translation, classifier and feature adversary one after the other,
so the adversary starts late (`adapt.features_after`); the classifiers follow
config.optim, not Adam.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from cxai_jax.methods import cyclegan, parts, translation
from cxai_jax.methods.method import Method, Network
from cxai_jax.methods.translation import Setting, Several, to_input
from cxai_jax.models.discriminators import DomainClassifier
from cxai_jax.objectives import adversarial
from cxai_jax.types import Array, Batch, PyTree

GROUPS = cyclegan.GROUPS | {"classifiers": ("task", "source"), "domain": ("domain",)}
translate = cyclegan.translate


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
      ValueError: for guided settings, a side that cannot be halved twice, or a pool
        smaller than a batch.
    """
    parts.check_plain(config)
    translation.check_pictures(config)
    adapt = config.adapt
    nets = cyclegan.networks(adapt) | {"domain": DomainClassifier(adapt.hidden)}
    optimizers = {
        "classifiers": optimizer,
        "generators": translation.adam(adapt.lr),
        "discriminators": translation.adam(adapt.lr),
        "domain": translation.adam(adapt.lr),
    }
    setting = Setting(config, network, nets, optimizers, GROUPS, total_steps)
    return Method(
        streams=("source", "target"),
        init=functools.partial(init, setting),
        step=functools.partial(train_step, setting),
        scored=translation.scored,
    )


def init(setting: Setting, key: Array, variables: PyTree) -> Several:
    """All networks; both classifiers start from the same weights."""
    side = setting.config.data.image_size
    image = jnp.zeros((1, side, side, 3))
    logits = jnp.zeros((1, setting.network.model.num_classes))
    params = {
        name: translation.first_variables(
            net, jax.random.fold_in(key, number), logits if name == "domain" else image
        )["params"]
        for number, (name, net) in enumerate(setting.nets.items())
    }
    copy = jax.tree.map(jnp.copy, variables)  # The state is donated, leaf by leaf.
    params |= {"task": variables["params"], "source": copy["params"]}
    stats = {"task": variables["batch_stats"], "source": copy["batch_stats"]}
    pools = cyclegan.pools(setting.config)
    return translation.first_state(setting, params, stats, pools)


def train_step(
    setting: Setting, state: Several, batches: dict[str, Batch], key: Array
) -> tuple[Several, dict]:
    """One step; every gradient is that of the state before it, as published."""
    config, scale = setting.config, setting.network.scale
    keys = jax.random.split(jax.random.fold_in(key, state.step), 4)
    source = translation.pictures(keys[0], batches["source"], config, scale)
    target = translation.pictures(keys[1], batches["target"], config, scale)
    labels = batches["source"].labels

    part = functools.partial(translation.gradient, setting, state)
    gradients, pools, fakes, metrics = cyclegan.gradients(
        setting, state, source, target, labels, keys[2:]
    )
    gradients["classifiers"], (stats, features, said) = part(
        "classifiers", classifier_loss, source, fakes["target"], target, labels
    )
    gradients["domain"], told = part("domain", domain_loss, features)
    for name, gradient in gradients.items():
        state = translation.updated(setting, state, name, gradient)
    metrics |= said | told
    metrics["gradient_norm"] = parts.norm(gradients)
    metrics["loss"] = metrics["generators"] + metrics["cross_entropy"]
    state = state.replace(batch_stats=stats, pools=pools)
    return translation.finished(state, metrics)


def classifier_loss(setting, state, params, source, fake_target, target, labels):
    """The judge on the source; the task on translated images and by its adversary."""
    adapt, scale = setting.config.adapt, setting.network.scale
    model, stats = setting.network.model, state.batch_stats
    (of_source, _), source_stats = parts.forward(
        model, params["source"], stats["source"], to_input(source, scale), "train"
    )
    # Each domain by its own statistics; the running ones are the target's.
    (translated, _), _ = parts.forward(
        model, params["task"], stats["task"], to_input(fake_target, scale), "train"
    )
    (real, _), task_stats = parts.forward(
        model, params["task"], stats["task"], to_input(target, scale), "train"
    )
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(
        translated, labels
    ).mean()
    domains = tell(setting, state.params["domain"], translated, real)
    # As published, only against an adversary that is right in more than 60 %.
    strong = adversarial.domain_accuracy(*domains) > 0.6
    begun = state.step >= adapt.features_after * setting.total_steps
    fool = adversarial.group_cross_entropy(domains[1], 0).mean()
    loss = (
        optax.softmax_cross_entropy_with_integer_labels(of_source, labels).mean()
        + cross_entropy
        + jnp.where(strong & begun, adapt.weight, 0.0) * fool
    )
    metrics = {
        "cross_entropy": cross_entropy,
        "accuracy": (translated.argmax(-1) == labels).mean(),
    }
    stats = {"task": task_stats, "source": source_stats}
    features = jax.lax.stop_gradient((translated, real))
    return loss, (stats, features, metrics)


def domain_loss(setting, state, params, features):
    """The feature adversary's own loss on the logits of both domains."""
    domains = tell(setting, params["domain"], *features)
    loss = adversarial.domain_cross_entropy(*domains).mean()
    accuracy = adversarial.domain_accuracy(*domains)
    return loss, {"domain_cross_entropy": loss, "domain_accuracy": accuracy}


def tell(setting, params, of_source, of_target):
    """The domain classifier's logits for the task's logits of both domains."""
    return tuple(
        setting.nets["domain"].apply({"params": params}, x)
        for x in (of_source, of_target)
    )
