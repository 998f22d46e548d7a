"""Losses of the CT paper (Ali et al.): mixed cross-entropy, contrastive patches.

Also the supervised NT-Xent of the SepNorm baseline. All are float32, keyword-only in
their hyper-parameters, return one value per image and leave the mean to the caller.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import Precision

from cxai_jax.maps.cam import check_labels, is_flat
from cxai_jax.types import Array

# What config.loss.scores hands to the cross-entropy. "sigmoid" is a slip of Wang et al.
# (2020b): the softmax of two numbers in 0..1 stays in 0.27..0.73, the loss above 0.313.
SCORES: dict[str, Callable[[Array], Array]] = {
    "logits": lambda logits: logits,
    "sigmoid": jax.nn.sigmoid,
}
NEGATIVES = ("all4", "anchor2")

# Squared length below which a vector has no direction: its similarities are 0.
SHORTEST = 1e-12


def mixed_cross_entropy(
    logits: Array, labels_a: Array, labels_b: Array, weight_a: Array, weight_b: Array
) -> Array:
    """L_i = la_i CE(logits_i, a_i) + lb_i CE(logits_i, b_i), not renormalised.

    Huang et al. 2021 (SnapMix). A label outside 0..K-1 gives NaN.

    Args:
      logits: [B, K].
      labels_a: int [B], the receiving image's class.
      labels_b: int [B], the donor's class.
      weight_a: [B].
      weight_b: [B].

    Returns:
      Loss per image [B], float32.

    Raises:
      ValueError: if the labels are no class numbers, such as one-hot ones.
    """
    check_labels(labels_a)
    check_labels(labels_b)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))

    def cross_entropy(labels):
        return -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]

    return weight_a * cross_entropy(labels_a) + weight_b * cross_entropy(labels_b)


def uniform_cross_entropy(logits: Array) -> Array:
    """Mean over the classes of -ln p_k [B], float32: what label smoothing mixes in."""
    return -jax.nn.log_softmax(logits.astype(jnp.float32)).mean(-1)


def parse_class_weights(text: str) -> tuple[float, ...]:
    """ "1,3", "(1, 3)" or "[1, 3]" -> (1.0, 3.0); else a ValueError."""
    return tuple(map(float, text.strip("()[] ").rstrip(", ").split(",")))


def contrastive_patch_embedding(
    features: Array,
    relevance: Array,
    *,
    num_patches: int = 2,
    normalize: bool = False,
    temperature: float = 1.0,
    sqrt_d: bool = False,
    negatives: str = "all4",
) -> Array:
    """Pulls the n most relevant cells together and apart from the n least relevant.

    Ali et al., Eq. 1, with u the top and v the bottom cells, s(a, b) = a.b and
    N = sum_ij exp s(u_i, v_j):

        L = -ln[e^s(u1,u2) / (e^s(u1,u2) + N)] - ln[e^s(v1,v2) / (e^s(v1,v2) + N)]

    For n > 2 each term is the mean over the n(n-1)/2 pairs of its group. The groups
    never share a cell. A constant map ranks nothing, so its image's loss is 0; a map
    that is not finite gives NaN, which the loop's check of the loss finds. Deviation:
    the published code reads other cells than it ranked; we follow the equation.

    Args:
      features: last feature map [B, h, w, D], with gradient.
      relevance: class-map mass per cell [B, h, w] (`cam.patch_relevance`); only its
        order is used, ties go to the lowest free index, no gradient.
      num_patches: n, cells per group; 2 <= n and 2n <= hw.
      normalize: True divides every vector by its L2 norm (a zero vector stays zero).
      temperature: divides the similarities.
      sqrt_d: True divides them by sqrt(D) as well, so that raw products of features of
        another width stay alike (Vaswani et al. 2017; not in the paper).
      negatives: "all4" takes all n^2 cross pairs (Eq. 1); "anchor2" is the published
        code: one pair per group and only its anchor's n negatives, u1.v_j and v1.u_j.

    Returns:
      Loss per image [B], float32.

    Raises:
      ValueError: for shapes that disagree, n that does not fit the grid, a
        temperature that is not positive, or an unknown `negatives`.
    """
    n, (batch, height, width, depth) = num_patches, features.shape
    if relevance.shape != (batch, height, width):
        raise ValueError(
            f"relevance has shape {relevance.shape}, expected {(batch, height, width)} "
            f"to match features {features.shape}"
        )
    if n < 2 or 2 * n > height * width:
        raise ValueError(
            f"num_patches is {n}: it must be at least 2, and two groups of it must fit "
            f"into the {height}x{width} grid (at most {height * width // 2})"
        )
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, it must be positive")
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives is {negatives!r}; known: {', '.join(NEGATIVES)}")
    relevance = jax.lax.stop_gradient(relevance).astype(jnp.float32)
    ranked = relevance.reshape(batch, -1)
    highest = jax.lax.top_k(ranked, n)[1]
    # What ties at the top must not be taken again as the bottom.
    taken = (jnp.arange(height * width) == highest[..., None]).any(1)
    lowest = jax.lax.top_k(jnp.where(taken, -jnp.inf, -ranked), n)[1]
    cells = jnp.concatenate([highest, lowest], axis=1)
    picked = jnp.take_along_axis(
        features.reshape(batch, -1, depth), cells[..., None], axis=1
    ).astype(jnp.float32)
    if normalize:
        picked = unit_length(picked)
    gram = jnp.einsum("bid,bjd->bij", picked, picked, precision=Precision.HIGHEST)
    gram /= temperature * math.sqrt(depth) if sqrt_d else temperature
    cross = gram[:, :n, n:]
    if negatives == "all4":
        pairs = jnp.triu_indices(n, 1)
        against_u = against_v = jax.nn.logsumexp(cross, axis=(1, 2))[:, None]
    else:
        pairs = (jnp.array([0]), jnp.array([1]))
        against_u = jax.nn.logsumexp(cross[:, 0], axis=1)[:, None]
        against_v = jax.nn.logsumexp(cross[:, :, 0], axis=1)[:, None]
    within_u = gram[:, :n, :n][:, *pairs]
    within_v = gram[:, n:, n:][:, *pairs]
    # -ln[e^s / (e^s + N)] = softplus(ln N - s), finite however large s is.
    loss = jax.nn.softplus(against_u - within_u).mean(1) + jax.nn.softplus(
        against_v - within_v
    ).mean(1)
    loss = jnp.where(is_flat(relevance), 0.0, loss)
    return jnp.where(jnp.isfinite(ranked).all(1), loss, jnp.nan)


def supervised_nt_xent(
    embeddings: Array, labels: Array, *, temperature: float = 0.05
) -> Array:
    """Mean over ordered same-class pairs (i, p) of the normalised-temperature loss.

        L_ip = -ln[e^(s_ip/t) / (e^(s_ip/t) + sum_{n: y_n != y_i} e^(s_in/t))]

    with s the cosine. As in pytorch-metric-learning 0.9.86, used by Wang et al. 2020b:
    other positives are not in the denominator. Image i gets (B / pairs) sum_p L_ip, so
    that the mean over the batch is the mean over all pairs; 0 where none exist.

    Args:
      embeddings: [B, D].
      labels: int [B].
      temperature: t.

    Returns:
      Loss per image [B], float32.

    Raises:
      ValueError: if the temperature is not positive, or the labels are no class
        numbers, such as one-hot ones.
    """
    check_labels(labels)
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, it must be positive")
    count = embeddings.shape[0]
    unit = unit_length(embeddings.astype(jnp.float32))
    similarity = jnp.matmul(unit, unit.T, precision=Precision.HIGHEST) / temperature
    same = labels[:, None] == labels[None, :]
    positive = same & ~jnp.eye(count, dtype=bool)
    # Not -inf: the gradient of a logsumexp over nothing would be NaN.
    against = jax.nn.logsumexp(jnp.where(same, -1e30, similarity), axis=1)
    losses = jnp.where(positive, jax.nn.softplus(against[:, None] - similarity), 0.0)
    return losses.sum(1) * (count / jnp.maximum(positive.sum(), 1))


def unit_length(vectors: Array) -> Array:
    """x / |x| over the last axis; 0, with zero gradient, where |x| <= 1e-6."""
    squared = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    long_enough = squared > SHORTEST
    scale = jax.lax.rsqrt(jnp.where(long_enough, squared, 1.0))
    return jnp.where(long_enough, vectors * scale, 0.0)
