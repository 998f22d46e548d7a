"""Terms of domain adaptation and of image translation, as pure functions.

Where nothing else is said a term is float32, one value per image, and the mean is the
caller's.
"""

import jax
import jax.numpy as jnp
import optax

from cxai_jax.types import Array

GAN_LOSSES = ("least_squares", "cross_entropy", "hinge")


@jax.custom_vjp
def reverse_gradient(x: Array, weight: Array) -> Array:
    """x itself; its gradient is multiplied by -weight (Ganin et al. 2016, eq. 21-22).

    Args:
      x: any shape.
      weight: scalar lambda, which gets no gradient.
    """
    return x


def _reverse_forward(x, weight):
    return x, weight


def _reverse_backward(weight, gradient):
    return -weight * gradient, jnp.zeros_like(weight)


reverse_gradient.defvjp(_reverse_forward, _reverse_backward)


def domain_ramp(progress: Array, *, gamma: float = 10.0) -> Array:
    """lambda_p = 2 / (1 + exp(-gamma p)) - 1 (Ganin et al. 2016, section 5.2.2).

    Args:
      progress: p, share of the steps taken, 0 to 1.
      gamma: steepness; 10 in the paper.
    """
    return 2 * jax.nn.sigmoid(gamma * jnp.asarray(progress, jnp.float32)) - 1


def group_cross_entropy(logits: Array, group: int) -> Array:
    """Cross-entropy of every row against one and the same class `group`.

    Args:
      logits: [B, ..., G]; all places but the first axis are averaged.
      group: which of the G the rows are (or, for a generator, shall be taken for).

    Returns:
      float32 [B].
    """
    loss = -jax.nn.log_softmax(logits.astype(jnp.float32))[..., group]
    return loss.reshape(loss.shape[0], -1).mean(1)


def domain_cross_entropy(of_source: Array, of_target: Array) -> Array:
    """Of a domain classifier that calls the source 0 and the target 1, per pair [B].

    Args:
      of_source: its logits [B, G] for source images.
      of_target: likewise for target images.
    """
    source = group_cross_entropy(of_source, 0)
    return (source + group_cross_entropy(of_target, 1)) / 2


def domain_accuracy(of_source: Array, of_target: Array) -> Array:
    """Share of the images whose domain is told, a scalar; arguments as above."""
    told = (of_source.argmax(-1) == 0), (of_target.argmax(-1) == 1)
    return jnp.stack(told).astype(jnp.float32).mean()


def gan(scores: Array, real: bool, *, kind: str) -> Array:
    """How far a discriminator's scores are from "real", or from "fake".

        least_squares  (s - t)^2, t = 1 or 0          (Mao et al. 2017)
        cross_entropy  softplus(-s) or softplus(s)    (Goodfellow et al. 2014)
        hinge          max(0, 1 - s) or max(0, 1 + s) (Lim and Ye 2017)

    A generator minimises it with real=True; with cross_entropy that is the form that
    does not saturate.

    Args:
      scores: [B, ...], before any sigmoid; averaged over all but the first axis.
      real: what the discriminator should say, or the generator wants it to.
      kind: one of GAN_LOSSES.

    Returns:
      float32 [B].

    Raises:
      ValueError: unknown kind.
    """
    scores = scores.astype(jnp.float32)
    sign = 1.0 if real else -1.0
    if kind == "least_squares":
        loss = (scores - float(real)) ** 2
    elif kind == "cross_entropy":
        loss = jax.nn.softplus(-sign * scores)
    elif kind == "hinge":
        loss = jax.nn.relu(1 - sign * scores)
    else:
        raise ValueError(f"kind is {kind!r}; known: {', '.join(GAN_LOSSES)}")
    return loss.reshape(loss.shape[0], -1).mean(1)


def absolute_difference(a: Array, b: Array) -> Array:
    """Mean |a - b| per image: cycle consistency, reconstruction; [B, ...] -> [B]."""
    difference = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))
    return difference.reshape(a.shape[0], -1).mean(1)


def squared_difference(a: Array, b: Array) -> Array:
    """Mean (a - b)^2 per image: content of a feature map; [B, ...] -> [B]."""
    difference = (a.astype(jnp.float32) - b.astype(jnp.float32)) ** 2
    return difference.reshape(a.shape[0], -1).mean(1)


def semantic_consistency(after: Array, before: Array) -> Array:
    """Cross-entropy of the translated image against the classifier's own verdict.

    Hoffman et al. (2018), eq. 4: the verdict argmax(before) carries no gradient.

    Args:
      after: logits of the translated image, [B, K].
      before: logits of the image before translation, [B, K].
    """
    verdict = jax.lax.stop_gradient(before.argmax(-1))
    return optax.softmax_cross_entropy_with_integer_labels(
        after.astype(jnp.float32), verdict
    )


def gram(features: Array) -> Array:
    """F F^T / (C h w) of a feature map [B, h, w, C]: float32 [B, C, C] (Gatys 2016)."""
    batch, height, width, channels = features.shape
    rows = features.astype(jnp.float32).reshape(batch, height * width, channels)
    product = jnp.einsum(
        "bnc,bnd->bcd", rows, rows, precision=jax.lax.Precision.HIGHEST
    )
    return product / (channels * height * width)


def style_difference(a: Array, b: Array) -> Array:
    """Mean squared difference of two maps' Gram matrices; [B, h, w, C] -> [B]."""
    return squared_difference(gram(a), gram(b))
