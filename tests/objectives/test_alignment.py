"""Golden values and properties of the alignment loss (float64 NumPy is the oracle)."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest

from cxai_jax.objectives import alignment

U = np.arange(32.0).reshape(2, 4, 4)
LITERAL = [  # Non-negative maps, for rectify="zero".
    np.maximum(np.sin(0.7 * U + 0.1), 0),
    np.maximum(np.cos(0.5 * U - 0.3), 0) ** 2,
    1e-3 * np.abs(np.sin(0.3 * U**2)),
]
SIGNED = [
    np.sin(0.7 * U + 0.1),
    np.cos(0.5 * U - 0.3),
    1e-3 * np.abs(np.sin(0.3 * U**2)),
]
MAPS = {"zero": LITERAL, "mean": SIGNED}


def float64():
    """The context that admits float64; jax.enable_x64 is newer than jax 0.7."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64()


def arrays(maps):
    return [jnp.asarray(z, jnp.float32) for z in maps]


def distributions(maps, rectify):
    return jnp.stack(
        [
            alignment.spatial_distribution(z, grid=4, rectify=rectify)
            for z in arrays(maps)
        ]
    )


def oracle_p(z, rectify, eta=0.05, eps=1e-8):
    z = np.asarray(z, np.float64).reshape(len(z), -1)
    s = np.maximum(z - z.mean(1, keepdims=True) if rectify == "mean" else z, 0)
    q = s / (s.sum(1, keepdims=True) + eps)
    return (1 - eta) * q + (1 - (1 - eta) * q.sum(1, keepdims=True)) / z.shape[1]


def oracle_loss(maps, rectify, distance):
    p = np.stack([oracle_p(z, rectify) for z in maps])
    if distance == "js":
        terms = p * (np.log(p) - np.log(p.mean(0)))
        return terms.sum(-1).mean(0) / np.log(len(p))
    values = []
    for i in range(len(p)):
        for j in range(i):
            a, b = p[i], p[j]
            if distance == "symkl":
                value = 0.5 * ((a - b) * np.log(a / b)).sum(-1)
            elif distance == "cosine":
                norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
                value = 1 - (a * b).sum(-1) / norms
            elif distance == "mse":
                value = ((a - b) ** 2).sum(-1)
            elif distance == "tv":
                value = np.abs(a - b).sum(-1) / 2
            else:
                r = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
                value = (1 - np.asarray(r)) / 2
            values.append(value)
    return np.mean(values, axis=0)


def oracle_gradient(maps, rectify, eta=0.05, eps=1e-8):
    """Closed form of d mean_i JS / d s_m and / d z_m, m maps of B images each."""
    p = np.stack([oracle_p(z, rectify, eta, eps) for z in maps])
    m, batch, _ = p.shape
    by_s, by_z = [], []
    for z, p_m in zip(maps, p, strict=True):
        z = z.reshape(batch, -1)
        shifted = z - z.mean(1, keepdims=True) if rectify == "mean" else z
        s = np.maximum(shifted, 0)
        gp = np.log(p_m / p.mean(0)) / (m * np.log(m)) / batch
        gq = (1 - eta) * (gp - gp.mean(1, keepdims=True))
        total = s.sum(1, keepdims=True) + eps
        g = gq / total - (gq * s).sum(1, keepdims=True) / total**2
        by_s.append(g.reshape(batch, 4, 4))
        g = g * (shifted > 0)
        if rectify == "mean":
            g = g - g.mean(1, keepdims=True)
        by_z.append(g.reshape(batch, 4, 4))
    return by_s, by_z


def mean_loss(maps, **options):
    return alignment.saliency_alignment(maps, grid=4, **options).mean()


@pytest.mark.parametrize(
    ("rectify", "index", "image", "expected"),
    [
        ("zero", 0, 0, [0.01968295, 0.12210263, 0.16856528, 0.13721878]),
        ("zero", 1, 0, [0.15510239, 0.16307248, 0.10053643, 0.02498959]),
        ("zero", 2, 1, [0.0920522, 0.08914151, 0.02010691, 0.09301243]),
        ("mean", 0, 0, [0.00458453, 0.12671782, 0.18212353, 0.1447435]),
        ("mean", 1, 0, [0.14314896, 0.14762766, 0.10864978, 0.03575845]),
        ("mean", 2, 1, [0.14065719, 0.12711123, 0.00312526, 0.145126]),
    ],
)
def test_golden_distribution(rectify, index, image, expected):
    p = distributions(MAPS[rectify], rectify)
    np.testing.assert_allclose(p[index, image, :4], expected, atol=2e-7)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("rectify", "count", "distance", "expected"),
    [
        ("zero", 3, "js", [0.26929287, 0.41127568]),
        ("zero", 2, "js", [0.30462901, 0.72947745]),
        ("zero", 3, "symkl", [1.12909031, 1.88629582]),
        ("zero", 3, "cosine", [0.42388997, 0.59234828]),
        ("zero", 3, "mse", [0.09692578, 0.18515572]),
        ("zero", 3, "tv", [0.52267981, 0.68564751]),
        ("zero", 3, "pearson", [0.55162472, 0.57901411]),
        ("mean", 3, "js", [0.36295801, 0.46541898]),
        ("mean", 2, "js", [0.30806993, 0.70232377]),
        ("mean", 3, "symkl", [1.68624702, 2.21447629]),
        ("mean", 3, "cosine", [0.52259324, 0.65065223]),
        ("mean", 3, "tv", [0.58114351, 0.69336682]),
    ],
)
def test_golden_distance(rectify, count, distance, expected):
    maps = MAPS[rectify][:count]
    loss = alignment.saliency_alignment(
        arrays(maps), grid=4, rectify=rectify, distance=distance
    )
    assert loss.shape == (2,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, atol=1e-6)
    np.testing.assert_allclose(loss, oracle_loss(maps, rectify, distance), atol=1e-6)


def test_golden_entropy():
    entropy = [alignment.normalised_entropy(p) for p in distributions(SIGNED, "mean")]
    expected = [
        [0.75314897, 0.76205331],
        [0.80113827, 0.71618715],
        [0.81983834, 0.78553623],
    ]
    np.testing.assert_allclose(entropy, expected, atol=1e-6)


def test_golden_energy_outside():
    centre = np.zeros((2, 8, 8))
    centre[:, 2:6, 2:6] = 1  # The centre 2 x 2 of the 4 x 4 grid.
    expected = np.array(
        [[0.84726593, 0.8227729], [0.9875, 0.43133509], [0.68291924, 0.73445868]]
    )
    options = {"grid": 4, "rectify": "zero", "dilate": 0}
    maps, mask = arrays(LITERAL), jnp.asarray(centre, bool)
    for z, value in zip(maps, expected, strict=True):
        outside = alignment.energy_outside([z], mask, **options)
        np.testing.assert_allclose(outside, value, atol=1e-6)
    together = alignment.energy_outside(maps, mask, **options)
    np.testing.assert_allclose(together, expected.mean(0), atol=1e-6)


def test_dilation_grows_the_mask_by_one_cell():
    z = arrays(SIGNED)[:1]
    corner = jnp.zeros((2, 4, 4)).at[:, 0, 0].set(1)
    square = jnp.zeros((2, 4, 4)).at[:, :2, :2].set(1)
    grown = alignment.energy_outside(z, corner, grid=4, dilate=1)
    plain = alignment.energy_outside(z, square, grid=4, dilate=0)
    np.testing.assert_array_equal(grown, plain)
    nothing = alignment.energy_outside(z, jnp.ones((2, 4, 4)), grid=4)
    np.testing.assert_allclose(nothing, 0, atol=1e-6)


@pytest.mark.parametrize("rectify", ["zero", "mean"])
def test_gradient_is_the_closed_form(rectify):
    _, expected = oracle_gradient(MAPS[rectify], rectify)
    gradient = jax.jit(jax.grad(lambda z: mean_loss(z, rectify=rectify)))
    for got, want in zip(gradient(arrays(MAPS[rectify])), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6)
    with float64():
        exact = [
            np.asarray(g) for g in gradient([jnp.asarray(z) for z in MAPS[rectify]])
        ]
    for got, want in zip(exact, expected, strict=True):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-13)
    if rectify == "mean":
        np.testing.assert_allclose(exact[0].sum(), 0, atol=1e-12)


def test_golden_gradient():
    by_s, _ = oracle_gradient(LITERAL, "zero")
    assert by_s[0][1, 2, 1] == pytest.approx(-0.10643902, abs=1e-8)
    got = jax.jit(jax.grad(mean_loss))(arrays(SIGNED))[0]
    assert float(got[1, 2, 1]) == pytest.approx(0.00466659, abs=1e-6)
    assert float(got[0, 1, 3]) == pytest.approx(0.00925593, abs=1e-6)


def test_closed_form_gradient_agrees_with_finite_differences():
    gradient = oracle_gradient(SIGNED, "mean")[1][1][0, 2, 2]
    ends = []
    for h in (1e-6, -1e-6):
        moved = [z.copy() for z in SIGNED]
        moved[1][0, 2, 2] += h
        ends.append(oracle_loss(moved, "mean", "js").mean())
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gradient, abs=1e-9)


def test_extreme_distributions():
    empty = alignment.spatial_distribution(jnp.zeros((1, 4, 4)), grid=4)
    np.testing.assert_array_equal(empty, np.full((1, 16), 1 / 16))
    hot = [jnp.zeros((1, 4, 4)).at[0, 0, i].set(1.0) for i in range(2)]
    p = alignment.spatial_distribution(hot[0], grid=4, rectify="zero")
    np.testing.assert_allclose([p.max(), p.min()], [0.953125, 0.003125], rtol=1e-6)
    ceiling = alignment.saliency_alignment(hot, grid=4, rectify="zero")
    np.testing.assert_allclose(ceiling, 0.9259446, atol=1e-6)


@pytest.mark.parametrize("distance", sorted(alignment.DISTANCES))
def test_zero_iff_equal_and_symmetric(distance):
    a, b, c = arrays(SIGNED)

    def loss(*maps):
        return alignment.saliency_alignment(maps, grid=4, distance=distance)

    np.testing.assert_allclose(loss(a, a, 2 * a + 1), 0, atol=1e-6)
    assert (loss(a, b) > 1e-3).all() and (loss(a, a, b) > 1e-3).all()
    np.testing.assert_allclose(loss(a, b, c), loss(c, a, b), rtol=1e-5)
    if distance in ("js", "cosine", "tv", "pearson"):
        opposite = loss(a, -a)
        assert ((opposite > 0) & (opposite <= 1)).all()


def test_scale_and_offset_free():
    moved = [3 * SIGNED[0] + 7, SIGNED[1] - 2, 1e3 * SIGNED[2] + 5]
    after = distributions(moved, "mean")
    np.testing.assert_allclose(after[0], distributions(SIGNED, "mean")[0], atol=1e-6)
    with float64():  # An offset of 5 on a map of 1e-3 leaves few digits in float32.
        after = [alignment.spatial_distribution(jnp.asarray(z), grid=4) for z in moved]
        after = np.asarray(after)
    exact = [oracle_p(z, "mean") for z in SIGNED]
    np.testing.assert_allclose(after, exact, atol=4e-7)
    literal = distributions([5 * z for z in LITERAL], "zero")
    np.testing.assert_allclose(literal, distributions(LITERAL, "zero"), atol=1e-6)


def test_stopped_mixture_leaves_the_gradient_unchanged():
    def stopped(maps):
        p = jnp.stack([alignment.spatial_distribution(z, grid=4) for z in maps])
        centre = jnp.log(jax.lax.stop_gradient(p.mean(0, keepdims=True)))
        return (p * (jnp.log(p) - centre)).sum(-1).mean() / np.log(len(p))

    maps = arrays(SIGNED)
    both = jax.jit(lambda z: (jax.grad(mean_loss)(z), jax.grad(stopped)(z)))
    full, constant = both(maps)
    for a, b in zip(full, constant, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rectify", "distance"),
    [("zero", "js"), *(("mean", name) for name in alignment.DISTANCES)],
)
def test_degenerate_maps_have_finite_loss_and_gradient(rectify, distance):
    wave = jnp.asarray(SIGNED[0], jnp.float32)
    flat = jnp.zeros((2, 4, 4))
    pixel = flat.at[0, 1, 1].set(1e-6).at[1, 0, 3].set(1e6)
    broken = wave.at[0, 2, 2].set(jnp.nan).at[1, 0, 0].set(jnp.inf)
    loss_and_gradient = jax.jit(
        jax.value_and_grad(
            lambda maps: mean_loss(maps, rectify=rectify, distance=distance)
        )
    )
    for other in (flat, pixel, -jnp.ones((2, 4, 4)), broken):
        loss, gradient = loss_and_gradient([wave, other])
        assert np.isfinite(loss)
        assert all(np.isfinite(g).all() for g in gradient)


def test_maps_of_one_pixel_agree():
    pixel = [jnp.full((2, 1, 1), value) for value in (3.0, -1.0)]
    for distance in alignment.DISTANCES:

        def loss(maps, distance=distance):
            values = alignment.saliency_alignment(maps, grid=1, distance=distance)
            return values.mean()

        value, gradient = jax.value_and_grad(loss)(pixel)
        assert np.isfinite(value) and not np.any(gradient)
        assert distance == "pearson" or value == pytest.approx(0, abs=1e-6)
    entropy = alignment.normalised_entropy(jnp.ones((2, 1)))
    np.testing.assert_array_equal(entropy, 0)


def test_a_map_with_nan_counts_as_empty():
    wave = jnp.asarray(SIGNED[0], jnp.float32)
    broken = wave.at[0, 2, 2].set(jnp.nan)
    got = alignment.saliency_alignment([broken, wave], grid=4)
    empty = alignment.saliency_alignment([jnp.zeros((2, 4, 4)), wave], grid=4)
    assert got[0] == empty[0] and got[1] == pytest.approx(0, abs=1e-6)


def test_common_grid_is_reached_by_block_means():
    fine = np.random.default_rng(0).normal(size=(2, 8, 12)).astype(np.float32)
    expected = fine.reshape(2, 4, 2, 4, 3).mean((2, 4))
    np.testing.assert_allclose(alignment.block_mean(fine, 4), expected, atol=1e-6)
    coarse = jnp.asarray(SIGNED[0], jnp.float32)
    finer = jnp.repeat(jnp.repeat(coarse, 2, 1), 2, 2)
    loss = alignment.saliency_alignment([coarse, finer], grid=4)
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_bfloat16_maps_are_compared_in_float32():
    maps = [z.astype(jnp.bfloat16) for z in arrays(SIGNED)]
    loss = alignment.saliency_alignment(maps, grid=4)
    same = alignment.saliency_alignment([z.astype(jnp.float32) for z in maps], grid=4)
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, same)


def test_subbatch_compares_every_kth_image_by_all_maps():
    maps = [jnp.asarray(np.tile(z, (2, 1, 1)), jnp.float32) for z in SIGNED]
    partial = [maps[0], maps[1], maps[2][::2]]
    loss = alignment.subbatch_alignment(partial, grid=4)
    by_all = alignment.saliency_alignment(maps, grid=4)
    by_two = alignment.saliency_alignment(maps[:2], grid=4)
    np.testing.assert_array_equal(loss, [by_all[0], by_two[1], by_all[2], by_two[3]])
    alone = alignment.subbatch_alignment(partial[1:], grid=4)
    np.testing.assert_array_equal(alone[1::2], 0)
    whole = alignment.subbatch_alignment(maps, grid=4)
    np.testing.assert_array_equal(whole, by_all)
    with pytest.raises(ValueError, match="one equal part"):
        alignment.subbatch_alignment([maps[0], maps[1][:3]], grid=4)


def test_empty_fraction_counts_maps_without_evidence():
    maps = jnp.zeros((4, 3, 3)).at[0, 1, 1].set(2).at[1].set(-1).at[2].set(jnp.nan)
    assert float(alignment.empty_fraction(maps)) == 0.75


def test_ramp_grows_over_its_share_of_the_steps():
    values = [float(alignment.ramp(step, 100, 0.3)) for step in (0, 15, 30, 99)]
    assert values == pytest.approx([0, 0.5, 1, 1])
    assert float(alignment.ramp(0, 100, 0.0)) == 1
    assert float(jax.jit(lambda s: alignment.ramp(s, 10, 1.0))(5)) == 0.5


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(2, 4, 4)], {}, "at least two maps, got 1"),
        ([], {}, "at least two maps, got 0"),
        ([(2, 4, 4), (2, 16)], {}, r"\[B, H, W\], got shapes"),
        ([(2, 4, 4), (2, 4, 4, 1)], {}, r"\[B, H, W\], got shapes"),
        ([(2, 4, 4), (3, 4, 4)], {}, "the same images"),
        ([(2, 8, 8), (2, 8, 4)], {}, "share one aspect"),
        ([(2, 4, 4), (2, 7, 7)], {}, "map of 7 x 7 .* grid of 4"),
        ([(2, 4, 4), (2, 2, 2)], {}, "map of 2 x 2 .* grid of 4"),
        ([(2, 4, 4)] * 2, {"distance": "l2"}, "unknown distance 'l2'; known: .*'js'"),
        ([(2, 4, 4)] * 2, {"rectify": "abs"}, "unknown rectify 'abs'; known: .*'mean'"),
        ([(2, 4, 4)] * 2, {"eta": 0.0}, "eta must lie strictly between 0 and 1"),
    ],
)
def test_bad_maps_are_named_at_trace_time(shapes, options, message):
    maps = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda z: alignment.saliency_alignment(z, grid=4, **options), maps
        )


def test_mask_of_another_size_is_refused():
    z = arrays(SIGNED)
    with pytest.raises(ValueError, match="map of 6 x 6 .* grid of 4"):
        alignment.energy_outside(z, jnp.ones((2, 6, 6)), grid=4)
    with pytest.raises(ValueError, match="share one aspect"):
        alignment.energy_outside(z, jnp.ones((2, 8, 4)), grid=4)
    with pytest.raises(ValueError, match="the same images"):
        alignment.energy_outside(z, jnp.ones((1, 4, 4)), grid=4)
    with pytest.raises(ValueError, match="at least one map"):
        alignment.energy_outside([], jnp.ones((2, 4, 4)), grid=4)
