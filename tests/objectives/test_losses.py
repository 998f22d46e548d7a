"""Losses against float64 loops, at extremes, and where their gradient goes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxai_jax.maps import cam
from cxai_jax.objectives import losses


def naive_patch_embedding(features, relevance, n, normalize, temperature, negatives):
    """Eq. 1 of Ali et al. written out, float64."""
    out = []
    for image, score in zip(features, relevance, strict=True):
        cells = image.reshape(-1, image.shape[-1])
        if normalize:
            cells = cells / np.linalg.norm(cells, axis=1, keepdims=True)
        order = np.argsort(score.ravel(), kind="stable")
        u, v = cells[order[::-1][:n]], cells[order[:n]]
        total = 0.0
        for group, other in ((u, v), (v, u)):
            if negatives == "all4":
                noise = sum(np.exp(a @ b / temperature) for a in u for b in v)
                pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
            else:
                noise = sum(np.exp(group[0] @ b / temperature) for b in other)
                pairs = [(0, 1)]
            for i, j in pairs:
                hit = np.exp(group[i] @ group[j] / temperature)
                total -= np.log(hit / (hit + noise)) / len(pairs)
        out.append(total)
    return out


OPTIONS = ("num_patches", "normalize", "temperature", "negatives")
patch_embedding = jax.jit(losses.contrastive_patch_embedding, static_argnames=OPTIONS)
nt_xent = jax.jit(losses.supervised_nt_xent)


@pytest.fixture
def patches():
    random = np.random.default_rng(0)
    return random.normal(size=(3, 3, 4, 5)), random.normal(size=(3, 3, 4))


def test_mixed_cross_entropy_equals_a_float64_loop():
    random = np.random.default_rng(1)
    logits, weights = random.normal(size=(4, 3)), random.uniform(size=(2, 4))
    a, b = np.array([0, 1, 2, 2]), np.array([1, 1, 0, 2])
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = [
        -weights[0, i] * log_probs[i, a[i]] - weights[1, i] * log_probs[i, b[i]]
        for i in range(4)
    ]
    got = losses.mixed_cross_entropy(jnp.asarray(logits), a, b, *weights)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got.dtype == jnp.float32


def test_mixed_cross_entropy_of_bfloat16_is_float32_and_finite():
    logits = jnp.array([[1e4, -1e4]], jnp.bfloat16)
    got = losses.mixed_cross_entropy(logits, *np.array([[1], [0], [1], [1]]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 2e4, rtol=1e-2)


@pytest.mark.parametrize("negatives", losses.NEGATIVES)
@pytest.mark.parametrize(
    ("n", "normalize", "temperature"),
    [(2, False, 1.0), (3, True, 0.5), (6, False, 2.0)],
)
def test_patch_embedding_equals_a_float64_loop(
    patches, n, normalize, temperature, negatives
):
    features, relevance = patches
    got = patch_embedding(
        jnp.asarray(features, jnp.float32),
        jnp.asarray(relevance, jnp.float32),
        num_patches=n,
        normalize=normalize,
        temperature=temperature,
        negatives=negatives,
    )
    expected = naive_patch_embedding(*patches, n, normalize, temperature, negatives)
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_patch_embedding_of_equal_vectors_is_twice_ln_five():
    got = patch_embedding(jnp.ones((1, 2, 2, 3)), jnp.arange(4.0).reshape(1, 2, 2))
    np.testing.assert_allclose(got, 2 * np.log(5), rtol=1e-6)


@pytest.mark.parametrize("scale", [100.0, -100.0])
def test_patch_embedding_is_finite_at_similarities_of_ten_thousand(scale):
    signs = jnp.where(jnp.arange(4) < 2, 1.0, scale / 100.0)
    features = 100 * signs.reshape(1, 2, 2, 1)
    relevance = jnp.arange(4.0).reshape(1, 2, 2)

    def loss(f):
        return losses.contrastive_patch_embedding(f, relevance).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(features)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_gradient_reaches_only_the_ranked_cells_and_not_the_ranking(patches):
    features, relevance = (jnp.asarray(x, jnp.float32) for x in patches)

    def loss(f, r):
        return losses.contrastive_patch_embedding(f, r).sum()

    jit_loss = jax.jit(lambda f: loss(f, relevance))
    on_features, on_relevance = jax.jit(jax.grad(loss, (0, 1)))(features, relevance)
    reached = np.abs(on_features).sum(-1).reshape(3, 12) > 0
    order = np.argsort(patches[1].reshape(3, 12), axis=1)
    expected = np.zeros((3, 12), bool)
    np.put_along_axis(expected, order[:, [0, 1, 10, 11]], True, 1)
    np.testing.assert_array_equal(reached, expected)
    assert not np.any(on_relevance)
    direction = np.random.default_rng(3).normal(size=features.shape)
    step = jnp.asarray(1e-2 * direction, jnp.float32)
    slope = (jit_loss(features + step) - jit_loss(features - step)) / 2
    np.testing.assert_allclose((on_features * step).sum(), slope, rtol=1e-2)


@pytest.mark.parametrize("peak", [1.0, -1.0])
def test_groups_are_disjoint_on_tied_maps(peak):
    """One cell differs, eleven tie: the groups still share none."""
    features = jnp.eye(12).reshape(1, 3, 4, 12) * 3
    relevance = jnp.zeros((1, 3, 4)).at[0, 1, 1].set(peak)  # Cell 5.
    got, gradient = jax.jit(
        jax.value_and_grad(
            lambda f: losses.contrastive_patch_embedding(
                f, relevance, num_patches=3
            ).sum()
        )
    )(features)
    reached = set(np.flatnonzero(np.abs(gradient).sum(-1)))
    # 5, then the lowest free ones; upside down the top three are 0, 1, 2.
    assert reached == ({5, 0, 1, 2, 3, 4} if peak > 0 else {0, 1, 2, 5, 3, 4})
    # All six cells are orthogonal: ln((1 + 9) / 1) per group.
    assert got == pytest.approx(2 * np.log(10), rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, -7.1])
def test_a_constant_map_contributes_nothing(patches, value):
    features = jnp.asarray(patches[0], jnp.float32)
    relevance = jnp.asarray(patches[1], jnp.float32).at[1].set(value)
    relevance = relevance.at[1, 0, 0].multiply(1 + 2e-7)  # Rounding noise.

    def loss(f):
        return losses.contrastive_patch_embedding(100 * f, relevance)

    got = jax.jit(loss)(features)
    gradient = jax.jit(jax.grad(lambda f: loss(f).sum()))(features)
    assert got[1] == 0 and (np.delete(got, 1) > 0).all()
    assert not gradient[1].any() and gradient[0].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_that_is_not_finite_gives_nan(patches, value):
    features = jnp.asarray(patches[0], jnp.float32)
    relevance = jnp.asarray(patches[1], jnp.float32).at[1, 2, 2].set(value)
    got = patch_embedding(features, relevance)
    np.testing.assert_array_equal(np.isnan(got), [False, True, False])


def test_zero_vectors_have_no_direction_and_no_gradient():
    relevance = jnp.arange(4.0).reshape(1, 2, 2)

    def loss(f):
        return losses.contrastive_patch_embedding(f, relevance, normalize=True).sum()

    features = jnp.ones((1, 2, 2, 3)).at[0, 0, 0].set(0.0)
    gradient = jax.jit(jax.grad(loss))(features)
    assert np.isfinite(gradient).all()
    assert not np.any(gradient[0, 0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_patches": 3}, "two groups of it must fit into the 2x2 grid"),
        ({"num_patches": 1}, "at least 2"),
        ({"negatives": "some"}, "known: all4, anchor2"),
        ({"temperature": 0.0}, "must be positive"),
    ],
)
def test_patch_embedding_refuses_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        losses.contrastive_patch_embedding(
            jnp.ones((1, 2, 2, 3)), jnp.ones((1, 2, 2)), **options
        )


def test_patch_embedding_refuses_relevance_of_another_grid():
    with pytest.raises(ValueError, match=r"expected \(1, 2, 2\)"):
        losses.contrastive_patch_embedding(jnp.ones((1, 2, 2, 3)), jnp.ones((1, 4, 4)))


def test_nt_xent_mean_equals_the_mean_over_all_positive_pairs():
    random = np.random.default_rng(2)
    x, labels, t = random.normal(size=(6, 4)), np.array([0, 0, 1, 1, 0, 2]), 0.05
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = []
    for i in range(6):
        noise = sum(
            np.exp(unit[i] @ unit[j] / t) for j in range(6) if labels[j] != labels[i]
        )
        for p in range(6):
            if p != i and labels[p] == labels[i]:
                hit = np.exp(unit[i] @ unit[p] / t)
                pairs.append(-np.log(hit / (hit + noise)))
    got = nt_xent(jnp.asarray(x, jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(got.mean(), np.mean(pairs), rtol=1e-4)
    assert got[5] == 0  # The only image of its class has no pair.


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_nt_xent_without_negatives_or_positives_is_zero(labels):
    x = jax.random.normal(jax.random.key(0), (3, 4)).at[0].set(0.0)
    labels = jnp.array(labels)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda x: losses.supervised_nt_xent(x, labels).sum())
    )(x)
    assert value == 0
    assert not np.any(gradient)


def test_nt_xent_refuses_a_temperature_of_zero():
    with pytest.raises(ValueError, match="must be positive"):
        losses.supervised_nt_xent(jnp.ones((2, 2)), jnp.array([0, 1]), temperature=0.0)


@pytest.mark.parametrize(
    "labels", [jnp.eye(3), jnp.eye(3, dtype=jnp.int32), jnp.array([0.0, 1.0, 2.0])]
)
def test_one_hot_labels_are_told(labels):
    numbers, ones = jnp.arange(3), jnp.ones(3)
    said = re.escape(
        f"labels are {labels.dtype} {list(labels.shape)}, expected one integer class "
        "number per image, [B]; of one-hot labels give labels.argmax(-1)"
    )
    for a, b in ((labels, numbers), (numbers, labels)):
        with pytest.raises(ValueError, match=said):
            losses.mixed_cross_entropy(jnp.zeros((3, 3)), a, b, ones, ones)
    with pytest.raises(ValueError, match=said):
        losses.supervised_nt_xent(jnp.zeros((3, 4)), labels)
    with pytest.raises(ValueError, match=said):
        cam.class_activation_map(jnp.zeros((3, 2, 2, 4)), jnp.zeros((4, 3)), labels)
