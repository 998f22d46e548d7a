"""Terms of adaptation and translation against NumPy in float64; the image pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxai_jax.models.image_pool import empty_pool, exchange
from cxai_jax.objectives import adversarial

RANDOM = np.random.default_rng(0)


def soft(x):
    return np.log1p(np.exp(x))


GOLDEN = {
    "least_squares": lambda s, real: (s - real) ** 2,
    "cross_entropy": lambda s, real: soft(-s) if real else soft(s),
    "hinge": lambda s, real: np.maximum(0, 1 - s if real else 1 + s),
}


@pytest.mark.parametrize("kind", adversarial.GAN_LOSSES)
@pytest.mark.parametrize("real", [True, False])
def test_gan_losses(kind, real):
    scores = 3 * RANDOM.normal(size=(4, 2, 3, 1))
    got = adversarial.gan(jnp.asarray(scores, jnp.float32), real, kind=kind)
    expected = GOLDEN[kind](scores, real).mean((1, 2, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gan_losses_stay_finite_and_names_are_checked():
    far = jnp.array([1e4, -1e4])
    assert np.isfinite(adversarial.gan(far, True, kind="cross_entropy")).all()
    with pytest.raises(ValueError, match="known: least_squares, cross_entropy, hinge"):
        adversarial.gan(far, True, kind="wasserstein")


def test_reversed_gradient():
    """Forward the identity, backward -lambda times the gradient, none for lambda."""
    x, weight = jnp.array([1.0, -2.0, 3.0]), jnp.array(0.3)

    def value(x, weight):
        return (adversarial.reverse_gradient(x, weight) ** 2).sum()

    assert value(x, weight) == 14
    on_x, on_weight = jax.grad(value, (0, 1))(x, weight)
    np.testing.assert_allclose(on_x, -0.3 * 2 * x, rtol=1e-6)
    assert on_weight == 0


def test_ramp():
    p = np.linspace(0, 1, 7)
    got = adversarial.domain_ramp(jnp.asarray(p))
    np.testing.assert_allclose(got, 2 / (1 + np.exp(-10 * p)) - 1, atol=1e-6)
    assert got[0] == 0


def test_group_cross_entropy():
    logits = RANDOM.normal(size=(3, 2, 4))
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    got = adversarial.group_cross_entropy(jnp.asarray(logits, jnp.float32), 2)
    np.testing.assert_allclose(got, -logp[..., 2].mean(1), rtol=1e-5)


def test_domain_classifiers_call_the_source_0_and_the_target_1():
    of_source, of_target = RANDOM.normal(size=(2, 50, 2))

    def against(logits, group):
        return np.log(np.exp(logits).sum(-1)) - logits[:, group]

    expected = (against(of_source, 0) + against(of_target, 1)) / 2
    right = (of_source.argmax(1) == 0).mean() + (of_target.argmax(1) == 1).mean()
    both = jnp.asarray(of_source, jnp.float32), jnp.asarray(of_target, jnp.float32)
    got = adversarial.domain_cross_entropy(*both)
    np.testing.assert_allclose(got, expected, rtol=2e-5)
    assert adversarial.domain_accuracy(*both) == pytest.approx(right / 2)


def test_semantic_consistency_has_no_gradient_on_the_verdict():
    after, before = RANDOM.normal(size=(2, 5, 10))
    logp = after - np.log(np.exp(after).sum(-1, keepdims=True))
    expected = -logp[np.arange(5), before.argmax(-1)]
    after, before = jnp.asarray(after, jnp.float32), jnp.asarray(before, jnp.float32)
    got = adversarial.semantic_consistency(after, before)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    slope = jax.grad(lambda b: adversarial.semantic_consistency(after, b).sum())(before)
    assert not slope.any()


def test_differences():
    a, b = RANDOM.normal(size=(2, 3, 4, 5, 6))

    def gram(x):
        rows = x.reshape(3, 20, 6)
        return np.stack([r.T @ r for r in rows]) / 120

    golden = {
        adversarial.absolute_difference: np.abs(a - b).mean((1, 2, 3)),
        adversarial.squared_difference: ((a - b) ** 2).mean((1, 2, 3)),
        adversarial.style_difference: ((gram(a) - gram(b)) ** 2).mean((1, 2)),
    }
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    for function, expected in golden.items():
        np.testing.assert_allclose(function(a, b), expected, rtol=2e-5)
        assert not np.any(function(a, a))


def numbered(first, count):
    return jnp.broadcast_to(
        jnp.arange(first, first + count, dtype=jnp.float32)[:, None, None, None],
        (count, 2, 2, 3),
    )


def test_pool_fills_before_it_gives_back():
    pool = empty_pool(5, 2)
    pool, out = exchange(pool, numbered(1, 4), jax.random.key(0))
    np.testing.assert_array_equal(out, numbered(1, 4))
    np.testing.assert_array_equal(pool.images[:4], numbered(1, 4))
    assert pool.filled == 4


def test_pool_swaps_about_half_and_loses_no_image():
    """What went in is afterwards in the pool or came out, each exactly once."""
    pool, step = empty_pool(6, 2), jax.jit(exchange)
    inside, swapped, seen = [], 0, 0
    for i in range(40):
        new = numbered(1 + 4 * i, 4)
        pool, out = step(pool, new, jax.random.fold_in(jax.random.key(1), i))
        inside += [float(x) for x in new[:, 0, 0, 0]]
        old = [float(x) for x in out[:, 0, 0, 0] if x < 1 + 4 * i]
        swapped, seen = swapped + len(old), seen + 4 * (i > 1)
        for number in old:
            inside.remove(number)
        stored = [float(x) for x in pool.images[:, 0, 0, 0] if x]
        assert len(set(stored)) == len(stored) and set(stored) <= set(inside)
        inside = [n for n in inside if n in stored]
    assert pool.filled == 6
    assert 0.35 < swapped / seen < 0.65


def test_pool_must_hold_a_batch():
    with pytest.raises(ValueError, match="set config.adapt.pool to the batch size"):
        exchange(empty_pool(3, 2), numbered(0, 4), jax.random.key(0))
