"""LC + CycleGAN: the light-weight calibrator (Ye et al. 2020) on translated sources.

Two phases, of which `adapt.features_after` is the border. First cyclegan.py learns to
translate, and a classifier learns from translated source images. Then both stay as they
are, the translated images are the source, and a small generator learns what to add to
an image so that two judges take it for one of the source:

    judges      cross-entropy of source, target, calibrated target, calibrated source
    calibrator  cross-entropy of "source" for calibrated target + 0.1 calibrated source

One judge sees a random patch with its pixels shuffled, the other the classifier's
probabilities. Scored is the classifier behind the calibrator (models/calibrated.py).
Deviations: one run instead of three; the translation has CyCADA's semantics; classifier
and translation follow config.optim and adapt.lr; the frozen classifier is run with its
running statistics, as it is scored, not with those of the batch.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from cxai_jax.methods import cyclegan, parts, translation
from cxai_jax.methods.method import Method, Network
from cxai_jax.methods.translation import Setting, Several, to_input
from cxai_jax.models.discriminators import DomainClassifier, ShuffledPatchDiscriminator
from cxai_jax.objectives import adversarial
from cxai_jax.types import Array, Batch, PyTree

GROUPS = cyclegan.GROUPS | {
    "classifiers": ("task", "source"),
    "judges": ("of_pixels", "of_classes"),
    "calibrator": ("calibrator",),
}
KINDS = ("source", "target", "calibrated target", "calibrated source")
WANTED = {"calibrated target": 1.0, "calibrated source": 0.1}  # Weights, published.
DECAY = 5e-4  # Of the weights of judges and calibrator, published.
METRICS = (
    "accuracy",
    "cycle",
    "cross_entropy",
    "discriminators",
    "fool",
    "fool_judges",
)
METRICS += ("generators", "gradient_norm", "judges", "loss", "semantic")
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
      ValueError: for guided settings, a side that cannot be halved twice, a pool
        smaller than a batch, or a network without a calibrator.
    """
    parts.check_plain(config)
    translation.check_pictures(config)
    adapt = config.adapt
    nets = cyclegan.networks(adapt) | {
        "of_pixels": ShuffledPatchDiscriminator(groups=len(KINDS)),
        "of_classes": DomainClassifier(adapt.hidden, groups=len(KINDS)),
        "calibrator": network.model,
    }

    def decayed():
        decay = optax.add_decayed_weights(DECAY)
        return optax.chain(decay, translation.adam(adapt.calibrator_lr, b1=0.9))

    optimizers = {
        "classifiers": optimizer,
        "generators": translation.adam(adapt.lr),
        "discriminators": translation.adam(adapt.lr),
        "judges": decayed(),
        "calibrator": decayed(),
    }
    bare = network._replace(model=network.model.network)
    setting = Setting(config, bare, nets, optimizers, GROUPS, total_steps)
    return Method(
        streams=("source", "target"),
        init=functools.partial(init, setting),
        step=functools.partial(train_step, setting),
        scored=scored,
    )


def init(setting: Setting, key: Array, variables: PyTree) -> Several:
    """All networks; both classifiers start from the same weights."""
    side = setting.config.data.image_size
    image = jnp.zeros((1, side, side, 3))
    probabilities = jnp.zeros((1, setting.network.model.num_classes))
    given = {"of_pixels": (image, key), "of_classes": (probabilities,)}
    params = {
        name: translation.first_variables(
            net, jax.random.fold_in(key, number), *given.get(name, (image,))
        )["params"]
        for number, (name, net) in enumerate(setting.nets.items())
        if name != "calibrator"
    }
    own, stats = variables["params"], variables["batch_stats"]["network"]
    params |= {"task": own["network"], "calibrator": own["calibrator"]}
    # The state is donated, leaf by leaf.
    params["source"] = jax.tree.map(jnp.copy, own["network"])
    stats = {"task": stats, "source": jax.tree.map(jnp.copy, stats)}
    pools = cyclegan.pools(setting.config)
    return translation.first_state(setting, params, stats, pools)


def scored(state: Several) -> PyTree:
    """Variables of the classifier behind the calibrator."""
    own = {"calibrator": state.params["calibrator"], "network": state.params["task"]}
    return {"params": own, "batch_stats": {"network": state.batch_stats["task"]}}


def train_step(
    setting: Setting, state: Several, batches: dict[str, Batch], key: Array
) -> tuple[Several, dict]:
    """One step of the phase that the step is in; the metrics of the other are 0."""
    config, scale = setting.config, setting.network.scale
    keys = jax.random.split(jax.random.fold_in(key, state.step), 4)
    source = translation.pictures(keys[0], batches["source"], config, scale)
    target = translation.pictures(keys[1], batches["target"], config, scale)
    begun = state.step >= config.adapt.features_after * setting.total_steps
    state, metrics = jax.lax.cond(
        begun,
        functools.partial(calibration_step, setting),
        functools.partial(translation_step, setting),
        *(state, source, target, batches["source"].labels, keys[2:]),
    )
    return translation.finished(state, metrics)


def translation_step(setting, state, source, target, labels, keys):
    """Phase one; every gradient is that of the state before it."""
    gradients, pools, fakes, metrics = cyclegan.gradients(
        setting, state, source, target, labels, keys
    )
    gradients["classifiers"], (stats, seen) = translation.gradient(
        *(setting, state, "classifiers", classifier_loss),
        *(source, fakes["target"], labels),
    )
    for name, gradient in gradients.items():
        state = translation.updated(setting, state, name, gradient)
    metrics |= seen | {"gradient_norm": parts.norm(gradients)}
    metrics["loss"] = metrics["generators"] + metrics["cross_entropy"]
    return state.replace(batch_stats=stats, pools=pools), all_of(metrics)


def classifier_loss(setting, state, params, source, translated, labels):
    """The judge of the semantics on the source, the task on its translation."""
    loss, stats = 0.0, {}
    for name, images in (("source", source), ("task", translated)):
        (logits, _), stats[name] = parts.forward(
            setting.network.model,
            params[name],
            state.batch_stats[name],
            to_input(images, setting.network.scale),
            "train",
        )
        own = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        loss += own
    accuracy = (logits.argmax(-1) == labels).mean()
    return loss, (stats, {"cross_entropy": own, "accuracy": accuracy})


def calibration_step(setting, state, source, target, labels, keys):
    """Phase two: the judges, then the calibrator against them, as published."""
    translated = setting.nets["to_target"].apply(
        {"params": state.params["to_target"]}, source
    )
    judges, seen = translation.gradient(
        *(setting, state, "judges", judge_loss, translated, target, keys[0])
    )
    state = translation.updated(setting, state, "judges", judges)
    own, told = translation.gradient(
        *(setting, state, "calibrator", calibrator_loss, translated, target, keys[1])
    )
    state = translation.updated(setting, state, "calibrator", own)
    metrics = seen | told | {"gradient_norm": parts.norm((judges, own))}
    return state, all_of(metrics | {"loss": told["fool_judges"]})


def judged(setting, state, params, kind: str, images: Array, key: Array) -> Array:
    """Scores [B] of both judges, summed: cross-entropy against `kind`."""
    (logits, _), _ = parts.forward(
        setting.network.model,
        state.params["task"],
        state.batch_stats["task"],
        to_input(images, setting.network.scale),
        "eval",
    )
    given = {"of_pixels": (images, key), "of_classes": (jax.nn.softmax(logits),)}
    return sum(
        adversarial.group_cross_entropy(
            setting.nets[name].apply({"params": params[name]}, *arguments),
            KINDS.index(kind),
        )
        for name, arguments in given.items()
    )


def calibrate(setting: Setting, params: PyTree, pictures: Array) -> Array:
    """Pictures in -1..1, calibrated."""
    return setting.nets["calibrator"].apply(
        {"params": {"calibrator": params}}, pictures, method="calibrate"
    )


def judge_loss(setting, state, params, source, target, key):
    """Cross-entropy of both judges over the four kinds of images."""
    own = state.params["calibrator"]
    images = (source, target)
    images += tuple(calibrate(setting, own, x) for x in (target, source))
    loss = 0.0
    for kind, x, one in zip(KINDS, images, jax.random.split(key, 4), strict=True):
        loss += judged(setting, state, params, kind, x, one).mean()
    return loss, {"judges": loss}


def calibrator_loss(setting, state, params, source, target, key):
    """How far calibrated images are from being taken for the source."""
    loss = 0.0
    images = {"calibrated target": target, "calibrated source": source}
    for kind, one in zip(WANTED, jax.random.split(key), strict=True):
        made = calibrate(setting, params["calibrator"], images[kind])
        scores = judged(setting, state, state.params, "source", made, one)
        loss += setting.config.adapt.weight * WANTED[kind] * scores.mean()
    return loss, {"fool_judges": loss}


def all_of(metrics: dict) -> dict:
    """All metrics of both phases, float32; 0 for those of the other one."""
    full = dict.fromkeys(METRICS, 0.0) | metrics
    return {name: jnp.asarray(value, jnp.float32) for name, value in full.items()}
