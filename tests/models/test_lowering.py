"""The rewritten operations against plain ones, values and two gradients, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cxai_jax.models import lowering

pytestmark = pytest.mark.usefixtures("float64")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def agree(tuned, plain, *arguments):
    """Same values, same gradients, and same gradients of a function of the gradients.

    The last ones pass through every backward rule twice, as the alignment loss does.
    """
    every = tuple(range(len(arguments)))

    def all_three(function, *arguments):
        def loss(*arguments):
            leaves = jax.tree.leaves(function(*arguments))
            return sum((normal(9, *y.shape) * jnp.sin(y)).sum() for y in leaves)

        def of_gradients(*arguments):
            gradients = jax.grad(loss, every)(*arguments)
            return sum((jnp.cos(g) * g).sum() for g in gradients)

        return (
            function(*arguments),
            jax.grad(loss, every)(*arguments),
            jax.grad(of_gradients, every)(*arguments),
        )

    # Compiling is all the time these take; nothing here needs fast code.
    jit = functools.partial(
        jax.jit,
        static_argnums=0,
        compiler_options={"xla_backend_optimization_level": 0},
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11),
        jit(all_three)(tuned, *arguments),
        jit(all_three)(plain, *arguments),
    )


def both_forms(**options):
    return [
        functools.partial(lowering.conv, lowering=name, **options)
        for name in ("tuned", "xla")
    ]


@pytest.mark.parametrize("stride", [1, 2])
def test_conv1x1(stride):
    forms = both_forms(stride=stride)
    agree(*forms, normal(0, 2, 5, 4, 3), normal(1, 1, 1, 3, 6))


@pytest.mark.parametrize(
    "k,stride,padding,size",
    [
        (3, 1, "SAME", (5, 4)),
        (5, 2, "SAME", (7, 6)),
        (3, 2, 1, (6, 7)),
    ],
)
def test_depthwise(k, stride, padding, size):
    forms = both_forms(stride=stride, padding=padding)
    agree(*forms, normal(0, 2, *size, 3), normal(1, k, k, 1, 3))


@pytest.mark.parametrize(
    "k,stride,padding,size",
    [(3, 1, 1, (2, 3)), (3, 2, 1, (5, 4)), (5, 2, "SAME", (3, 4)), (3, 1, 1, (1, 1))],
)
def test_conv_on_a_small_map(monkeypatch, k, stride, padding, size):
    monkeypatch.setattr(lowering, "SMALL_MAP_CHANNELS", 2)
    forms = both_forms(stride=stride, padding=padding)
    agree(*forms, normal(0, 2, *size, 3), normal(1, k, k, 3, 4))


@pytest.mark.parametrize(
    "k,stride,padding,size,channels",
    [(7, 2, 3, (8, 10), 3), (7, 2, 3, (9, 7), 1), (3, 2, "SAME", (8, 7), 3)],
)
def test_stem(k, stride, padding, size, channels):
    forms = both_forms(stride=stride, padding=padding)
    x, kernel = normal(0, 2, *size, channels), normal(1, k, k, channels, 4)
    agree(*forms, x, kernel)
    strides = ["window_strides=(1, 1)", f"window_strides=({stride}, {stride})"]
    for form, expected in zip(forms, strides, strict=True):
        assert expected in str(jax.make_jaxpr(form)(x, kernel))


def test_only_wide_and_small_maps_are_cut_into_patches():
    def is_convolution(side, channels, form="tuned"):
        x, kernel = jnp.zeros((1, side, side, channels)), jnp.zeros((3, 3, channels, 4))
        conv = functools.partial(lowering.conv, padding=1, lowering=form)
        return "conv_general_dilated" in str(jax.make_jaxpr(conv)(x, kernel))

    assert not is_convolution(4, 128)
    assert is_convolution(5, 128)
    assert is_convolution(4, 64)
    assert is_convolution(4, 128, "xla")


@pytest.mark.parametrize("size", [(6, 6), (5, 4), (1, 1)])
def test_max_pool(size):
    forms = [
        functools.partial(lowering.max_pool, lowering=name) for name in ("tuned", "xla")
    ]
    agree(*forms, normal(0, 2, *size, 3))


def test_max_pool_gives_a_tie_to_the_first_place_as_torch_does():
    x = np.random.default_rng(0).integers(0, 3, (2, 7, 6, 4)).astype(float)
    dy = np.random.default_rng(1).normal(size=(2, 4, 3, 4))
    expected = np.zeros((2, 9, 8, 4))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    for b, i, j, c in np.ndindex(dy.shape):
        window = padded[b, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, c]
        u, v = np.unravel_index(window.argmax(), (3, 3))  # argmax takes the first.
        expected[b, 2 * i + u, 2 * j + v, c] += dy[b, i, j, c]
    pool = functools.partial(lowering.max_pool, lowering="tuned")
    gradient = jax.jit(lambda x, dy: jax.vjp(pool, x)[1](dy)[0])(x, dy)
    np.testing.assert_allclose(gradient, expected[:, 1:-1, 1:-1])


def plain_batch_norm(x, scale, bias):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / jnp.sqrt(var + 1e-3) * scale + bias, mean, var


@pytest.mark.parametrize("form", ["tuned", "xla"])
def test_batch_norm(form):
    tuned = functools.partial(lowering.batch_norm, eps=1e-3, lowering=form)
    x = 3 * normal(0, 3, 4, 5, 2) + 7
    agree(tuned, plain_batch_norm, x, normal(1, 2), normal(2, 2))


def test_batch_norm_keeps_its_digits_far_from_zero():
    x = np.random.default_rng(0).normal(1000, 0.1, (4, 8, 8, 2)).astype(np.float32)
    for form in ("tuned", "xla"):
        mean, var = lowering.moments(jnp.asarray(x), lowering=form)
        wide = x.astype(np.float64)
        np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(var, wide.var((0, 1, 2)), rtol=1e-3)


@pytest.mark.parametrize("form", ["tuned", "xla"])
def test_constant_channels_and_single_pixels_stay_finite(form):
    x = jnp.full((1, 1, 1, 3), 5.0, jnp.float32)
    norm = functools.partial(lowering.batch_norm, eps=1e-5, lowering=form)
    scale = jnp.ones(3, jnp.float32)
    y, vjp = jax.vjp(lambda x: norm(x, scale, scale)[0], x)
    np.testing.assert_array_equal(y, 1.0)
    np.testing.assert_array_equal(vjp(y)[0], 0.0)


@pytest.mark.parametrize("form", ["tuned", "xla"])
def test_bfloat16_is_kept_and_statistics_are_float32(form):
    x = normal(0, 2, 6, 6, 4).astype(jnp.bfloat16)
    kernel = normal(1, 3, 3, 1, 4).astype(jnp.bfloat16)
    y = lowering.conv(x, kernel, lowering=form)
    assert y.dtype == jnp.bfloat16
    assert lowering.max_pool(y, lowering=form).dtype == jnp.bfloat16
    ones = jnp.ones(4, jnp.float32)
    y, mean, var = lowering.batch_norm(y, ones, ones, eps=1e-5, lowering=form)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_tuned_forms_can_be_batched_by_vmap():
    x, kernel = normal(0, 3, 2, 5, 5, 2), normal(1, 3, 3, 1, 2)

    def conv(x):
        pooled = lowering.max_pool(x, lowering="tuned")
        return lowering.conv(pooled, kernel, lowering="tuned")

    gradient = jax.jit(jax.grad(lambda x: (conv(x) ** 2).sum()))
    together = jax.jit(jax.vmap(gradient))(x)
    np.testing.assert_allclose(together[1], gradient(x[1]), rtol=1e-9)


def test_no_scatter_in_the_tuned_pool_gradient():
    x = jnp.zeros((1, 8, 8, 2))

    def text(form):
        pool = functools.partial(lowering.max_pool, lowering=form)
        return jax.jit(jax.grad(lambda x: pool(x).sum())).lower(x).as_text()

    assert "select_and_scatter" in text("xla")
    assert "scatter" not in text("tuned").replace("max_pool", "")


def test_one_table_decides(monkeypatch):
    names = {"conv1x1", "small_map", "stem", "depthwise", "max_pool", "batch_norm"}
    assert all(set(row) == names for row in lowering.AUTO.values())
    for backend, row in lowering.AUTO.items():
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        for operation, form in row.items():
            assert lowering.is_tuned(operation, "auto") == (form == "tuned")
            assert lowering.is_tuned(operation, "tuned")
            assert not lowering.is_tuned(operation, "xla")


def test_unknown_lowering_names_the_known_ones():
    with pytest.raises(ValueError, match="'fast'; use auto, xla or tuned"):
        lowering.max_pool(jnp.zeros((1, 2, 2, 1)), lowering="fast")
