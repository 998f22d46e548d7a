"""Closed forms, invariances, double backpropagation and cost of the saliency maps."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest

from cxai_jax.maps import saliency
from cxai_jax.objectives import alignment
from cxai_jax.types import Outputs

LABELS = jnp.array([0, 2, 1])


def float64():
    """The context that admits float64; jax.enable_x64 is newer than jax 0.7."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64()


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def init(seed, *, width=8, symmetric=False):
    """Parameters of a three-layer convolutional net with a linear head."""
    kernels = []
    for layer, channels in enumerate((3, width, width)):
        kernel = normal([seed, layer], 3, 3, channels, width) / (4.5 * channels) ** 0.5
        kernels.append((kernel + kernel[:, ::-1]) / 2 if symmetric else kernel)
    head, bias = normal([seed, 3], width, 3), normal([seed, 4], 3)
    return {"kernels": kernels, "head": head, "bias": bias}


def convolve(x, kernel, stride):
    # Padding 1 on both sides of an odd size is symmetric under a flip at stride 2.
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def lower(params, x):
    x = jax.nn.relu(convolve(x, params["kernels"][0], 2))
    return jax.nn.relu(convolve(x, params["kernels"][1], 1))


def upper(params, a3):
    return jax.nn.relu(convolve(a3, params["kernels"][2], 2))


def head(params, features):
    return features.mean((1, 2)) @ params["head"] + params["bias"][None]


def network(params):
    return saliency.Explained(
        lambda x, site: lower(params, x),
        lambda a, site: upper(params, a),
        lambda f, site: head(params, f),
    )


def forward(params, x):
    a3 = lower(params, x)
    features = upper(params, a3)
    class_maps = jnp.einsum("bhwd,dk->bhwk", features, params["head"])
    return head(params, features), Outputs(a3, features, class_maps)


def all_maps(params, x, **options):
    _, outputs = forward(params, x)
    names = ("cam", "gradcam_lower", "input_gradient")
    return saliency.signed_maps(names, network(params), x, outputs, LABELS, **options)


explain = jax.jit(all_maps)
forward_jit = jax.jit(forward)


@pytest.fixture(scope="module")
def params():
    return init(0)


@pytest.fixture(scope="module")
def images():
    return normal(1, 3, 16, 16, 3)


@pytest.fixture(scope="module")
def maps(params, images):
    return explain(params, images)


def test_shapes_and_dtype(maps):
    assert [z.shape for z in maps] == [(3, 4, 4), (3, 8, 8), (3, 16, 16)]
    assert all(z.dtype == jnp.float32 for z in maps)
    assert (maps[2] > 0).all()


@pytest.mark.parametrize("target", ["centred", "logit"])
def test_cam_sums_to_the_target(params, images, target):
    logits, outputs = forward_jit(params, images)
    z = saliency.class_map(outputs.class_maps, LABELS, target=target)
    bias = saliency.explained(
        jnp.tile(params["bias"][None], (3, 1)), LABELS, target=target
    )
    score = saliency.explained(logits, LABELS, target=target)
    np.testing.assert_allclose(z.mean((1, 2)) + bias, score, rtol=1e-5, atol=1e-5)
    expected = np.asarray(logits)[np.arange(3), np.asarray(LABELS)]
    if target == "centred":
        expected = expected - np.asarray(logits).mean(1)
    np.testing.assert_allclose(score, expected, rtol=1e-6)


@pytest.mark.parametrize("form", ["gradcam", "hires"])
def test_gradcam_at_the_last_stage_is_cam(params, images, form):
    _, outputs = forward_jit(params, images)
    cam = saliency.class_map(outputs.class_maps, LABELS)
    last = saliency.gradcam_lower(
        lambda f: head(params, f), outputs.features, LABELS, form=form
    )
    np.testing.assert_allclose(last * cam[0].size, cam, rtol=1e-4, atol=1e-5)
    loss = alignment.saliency_alignment([cam, last], grid=4)
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_input_gradient_of_a_linear_model_is_its_weights():
    weights = np.random.default_rng(0).normal(size=(4, 4, 2, 3))

    def apply(x):
        return jnp.einsum("bhwc,hwck->bk", x, weights.astype(np.float32))

    x = jnp.ones((3, 4, 4, 2))
    centred = weights - weights.mean(-1, keepdims=True)
    expected = np.linalg.norm(centred, axis=2)[..., np.asarray(LABELS)]
    got = saliency.input_gradient(apply, x, LABELS)
    np.testing.assert_allclose(got, expected.transpose(2, 0, 1), rtol=1e-5)
    total = saliency.integrated_gradients(apply, x, LABELS, steps=2).sum((1, 2))
    score = saliency.explained(apply(x), LABELS)
    np.testing.assert_allclose(total, score, rtol=1e-4, atol=1e-5)


def test_head_gauge_moves_only_the_logit_maps(params, images, maps):
    shift = normal(3, 8, 1)
    moved = {**params, "head": params["head"] + shift}
    for a, b in zip(maps, explain(moved, images), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    raw = [
        saliency.class_map(forward_jit(p, images)[1].class_maps, LABELS, target="logit")
        for p in (params, moved)
    ]
    assert np.abs(raw[0] - raw[1]).max() > 0.1


def test_horizontal_flip_flips_every_map():
    params = init(4, symmetric=True)
    x = normal(5, 3, 17, 17, 3)
    for a, b in zip(explain(params, x), explain(params, x[:, :, ::-1]), strict=True):
        np.testing.assert_allclose(a[:, :, ::-1], b, rtol=1e-4, atol=1e-5)


def test_maps_of_one_image_ignore_the_others(params, images, maps):
    other = images * np.array([1, -3, 1], np.float32)[:, None, None, None]
    changed = explain(params, other)
    for a, b in zip(maps, changed, strict=True):
        np.testing.assert_allclose(a[::2], b[::2], rtol=1e-5, atol=1e-6)
        assert np.abs(a[1] - b[1]).max() > 1e-3


def test_grey_repeated_inside_sums_the_channels(params, images):
    grey = images[..., :1]

    def apply(x):
        return network(params).logits(jnp.repeat(x, 3, axis=3))

    def score(x):
        return saliency.explained(network(params).logits(x), LABELS).sum()

    expected = jnp.abs(jax.grad(score)(jnp.repeat(grey, 3, axis=3)).sum(-1))
    got = saliency.input_gradient(apply, grey, LABELS)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_stopped_alpha_keeps_the_map_and_loses_second_order(params, images, maps):
    def loss(params, alpha_grad):
        z = all_maps(params, images, alpha_grad=alpha_grad)[1]
        return (z**2).sum()

    value = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    full, full_gradient = value(params, "full")
    stopped, stopped_gradient = value(params, "stop")
    np.testing.assert_allclose(full, (maps[1] ** 2).sum(), rtol=1e-4)
    np.testing.assert_allclose(full, stopped, rtol=1e-5)
    assert float(jnp.abs(stopped_gradient["head"]).max()) == 0
    assert float(jnp.abs(full_gradient["head"]).max()) > 1e-3


def test_subbatch_takes_every_kth_image(params, images):
    x = np.concatenate([images, images + 1])[:4]
    labels = jnp.array([0, 2, 1, 1])
    names = ("input_gradient", "cam")

    @jax.jit
    def half_and_whole(params, x):
        net, (_, outputs) = network(params), forward(params, x)
        half, cam = saliency.signed_maps(
            names, net, x, outputs, labels, input_grad_fraction=0.5
        )
        return half, cam, saliency.input_gradient(net.logits, x, labels)

    half, cam, whole = half_and_whole(params, x)
    np.testing.assert_allclose(half, whole[::2], rtol=1e-4, atol=1e-6)
    assert cam.shape == (4, 4, 4)


def test_double_backpropagation_in_float64():
    """Two-layer ReLU net, S = |W1^T (w2 1[W1 x > 0])|: NumPy central differences."""
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(6, 16)), rng.normal(size=(6, 2))
    x, reference = rng.normal(size=16), rng.random((1, 4, 4))

    def oracle(w1):
        difference = (w2[:, 0] - w2[:, 1]) / 2  # Centred logit of class 0 of two.
        s = np.abs(w1.T @ (difference * (w1 @ x > 0))).reshape(1, 4, 4)
        p = []
        for z in (s, reference):
            r = np.maximum(z - z.mean(), 0).reshape(-1)
            q = r / (r.sum() + 1e-8)
            p.append(0.95 * q + (1 - 0.95 * q.sum()) / 16)
        return np.sum(p * (np.log(p) - np.log(np.mean(p, 0)))) / 2 / np.log(2)

    def loss(w1):
        def apply(images):
            return jax.nn.relu(images.reshape(1, 16) @ w1.T) @ jnp.asarray(w2)

        image = jnp.asarray(x).reshape(1, 4, 4, 1)
        s = saliency.input_gradient(apply, image, jnp.array([0]))
        return alignment.saliency_alignment([s, jnp.asarray(reference)], grid=4)[0]

    with float64():
        value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(w1))
        value, gradient = float(value), np.asarray(gradient)
    assert gradient.dtype == np.float64
    assert value == pytest.approx(oracle(w1), abs=1e-12)
    expected = np.zeros_like(w1)
    for index in np.ndindex(w1.shape):
        step = np.zeros_like(w1)
        step[index] = 1e-6
        expected[index] = (oracle(w1 + step) - oracle(w1 - step)) / 2e-6
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(gradient, expected, atol=1e-8)


def test_occlusion_finds_the_only_cell_that_counts():
    def apply(x):  # Class 1 counts the light of the cell (1, 2) of a 4 x 4 grid.
        light = x[:, 2:4, 4:6].sum((1, 2, 3))
        return jnp.stack([jnp.zeros_like(light), light], axis=1)

    x = jnp.ones((2, 8, 8, 1))
    expected = np.zeros((2, 4, 4))
    expected[0, 1, 2], expected[1, 1, 2] = -2, 2  # Centred: half of four pixels.
    for chunk in (1, 5):
        got = saliency.occlusion(apply, x, jnp.array([0, 1]), grid=4, chunk=chunk)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_occlusion_of_a_net_is_the_difference_of_two_forwards(params, images):
    apply = network(params).logits
    got = saliency.occlusion(apply, images, LABELS, grid=2, fill=0.5, chunk=2)
    covered = np.asarray(images).copy()
    covered[:, 8:, :8] = 0.5
    before = saliency.explained(apply(images), LABELS)
    after = saliency.explained(apply(jnp.asarray(covered)), LABELS)
    np.testing.assert_allclose(got[:, 1, 0], before - after, rtol=1e-4, atol=1e-5)


def test_integrated_gradients_are_complete():
    weights = normal(7, 32, 3)

    def apply(x):
        return jnp.tanh(x.reshape(x.shape[0], -1) @ weights)

    x = normal(8, 3, 4, 4, 2) / 4
    z = saliency.integrated_gradients(apply, x, LABELS, steps=200, baseline=0.1)
    ends = [saliency.explained(apply(v), LABELS) for v in (x, jnp.full_like(x, 0.1))]
    np.testing.assert_allclose(z.sum((1, 2)), ends[0] - ends[1], atol=1e-3)


def test_bad_input_is_named(params, images):
    logits, outputs = forward_jit(params, images)
    net = network(params)

    def explain(names, outputs=outputs, **options):
        return saliency.signed_maps(names, net, images, outputs, LABELS, **options)

    with pytest.raises(ValueError, match="unknown maps .'lime'.; known: .'cam'"):
        explain(["cam", "lime"])
    with pytest.raises(ValueError, match="Outputs.lower is None"):
        explain(["cam", "gradcam_lower"], outputs._replace(lower=None))
    with pytest.raises(ValueError, match="must be 1, 1/2, 1/3, ..., got 0.4"):
        explain(["cam"], input_grad_fraction=0.4)
    with pytest.raises(ValueError, match="got 0"):
        explain(["cam"], input_grad_fraction=0)
    with pytest.raises(ValueError, match="3 images has no 2 equal parts"):
        explain(["input_gradient"], input_grad_fraction=0.5)
    with pytest.raises(ValueError, match="unknown target 'raw'"):
        saliency.explained(logits, LABELS, target="raw")
    with pytest.raises(ValueError, match="K >= 2 classes, got shape"):
        saliency.explained(logits[:, :1], LABELS)
    with pytest.raises(ValueError, match="unknown form 'layer'"):
        explain(["gradcam_lower"], form="layer")
    with pytest.raises(ValueError, match="unknown alpha_grad 'none'"):
        explain(["gradcam_lower"], alpha_grad="none")
    with pytest.raises(ValueError, match="float images, got uint8"):
        saliency.input_gradient(net.logits, images.astype(np.uint8), LABELS)
    with pytest.raises(ValueError, match="16 x 16 do not divide into 5 x 5"):
        saliency.occlusion(net.logits, images, LABELS, grid=5)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        saliency.integrated_gradients(net.logits, images, LABELS, steps=0)
