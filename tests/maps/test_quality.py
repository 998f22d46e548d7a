"""Explanation metrics against Quantus and pytorch-grad-cam, and in hard cases.

The golden file holds inputs, values and versions; it is written by
experiments/oracle_explanation_metrics.py.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from cxai_jax.maps import imputation
from cxai_jax.maps import quality as metrics
from experiments.road_cost import sparse_solution

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "explanation_metrics.json").read_text()
)
DATA = {name: np.asarray(value) for name, value in GOLDEN["inputs"].items()}
VALUES = {name: np.asarray(value) for name, value in GOLDEN["values"].items()}
MAPS, MASKS, LABELS = DATA["maps"], DATA["masks"], DATA["labels"]
IMAGES = DATA["images"][..., None].astype(np.float32)


def probabilities(images):
    """softmax(W2 relu(W1 x)), the model of the golden file."""
    x = jnp.asarray(images).reshape(len(images), -1)
    hidden = jnp.maximum(x @ DATA["first"].astype(np.float32), 0)
    scores = jnp.exp(hidden @ DATA["second"].astype(np.float32))
    return scores / scores.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    "name",
    [
        "pointing_game",
        "energy_pointing_game",
        "relevance_rank_accuracy",
        "localisation_auc",
    ],
)
def test_localisation_agrees_with_quantus(name):
    got = getattr(metrics, name)(MAPS, MASKS)
    np.testing.assert_allclose(got, VALUES[name], atol=1e-12)
    assert np.ptp(VALUES[name]) > 0.1


def test_spread_agrees_with_quantus():
    # Quantus adds 1e-7 to the map before the Gini index, 1e-12 inside the logarithm.
    np.testing.assert_allclose(metrics.gini(MAPS), VALUES["gini"], atol=1e-6)
    entropy = metrics.normalised_entropy(MAPS) * np.log(64)
    np.testing.assert_allclose(entropy, VALUES["entropy"], atol=1e-9)


def test_spearman_agrees_with_quantus():
    got = metrics.spearman(MAPS, DATA["other_maps"])
    np.testing.assert_allclose(got, VALUES["spearman"], atol=1e-12)


def test_deletion_agrees_with_quantus():
    curve = metrics.deletion_curve(
        probabilities, IMAGES, jnp.asarray(MAPS), LABELS, step=GOLDEN["step"]
    )
    assert curve.shape == (4, 9)
    np.testing.assert_allclose(curve[:, 1:], VALUES["deletion_curve"], atol=1e-6)
    whole = np.asarray(probabilities(IMAGES))[np.arange(4), LABELS]
    np.testing.assert_allclose(curve[:, 0], whole, atol=1e-6)
    area = metrics.area_under_curve(curve)
    expected = np.trapezoid(np.asarray(curve, np.float64), axis=1) / 8
    np.testing.assert_allclose(area, expected, atol=1e-6)


def test_confidence_agrees_with_pytorch_grad_cam():
    before, after = metrics.masked_confidence(
        probabilities, IMAGES, jnp.asarray(MAPS), LABELS
    )
    peak = MAPS.max((1, 2))[:, None, None, None]
    scaled = np.asarray(probabilities(IMAGES * MAPS[..., None] / peak))
    np.testing.assert_allclose(after, scaled[np.arange(4), LABELS], atol=1e-6)
    # The library multiplies by the map as it stands: so does a map whose maximum is 1.
    ones = np.concatenate([MAPS, np.ones((4, 8, 1))], axis=2)
    wide = np.concatenate([IMAGES, np.zeros((4, 8, 1, 1), np.float32)], axis=2)
    before, after = metrics.masked_confidence(
        lambda x: probabilities(x[:, :, :8]), wide, jnp.asarray(ones), LABELS
    )
    drop = metrics.average_drop(before, after) * before
    np.testing.assert_allclose(drop, VALUES["drop_in_confidence"], atol=1e-6)
    increase = metrics.average_increase(before, after)
    np.testing.assert_array_equal(increase, VALUES["increase_in_confidence"])
    assert 0 < np.sum(increase) < 4


def test_road_agrees_with_pytorch_grad_cam():
    got = metrics.road(
        probabilities, IMAGES, MAPS, LABELS, percentiles=GOLDEN["percentiles"], noise=0
    )
    np.testing.assert_allclose(got, VALUES["road"], atol=1e-6)


def test_imputation_agrees_with_quantus():
    keep = np.ones(64, bool)
    keep[DATA["removed"]] = False
    image = np.concatenate([IMAGES[0], 2 * IMAGES[0]], axis=2)
    got = imputation.impute(image[None], keep.reshape(1, 8, 8))[0]
    np.testing.assert_allclose(got[..., 0], VALUES["imputed"], atol=2e-6)
    np.testing.assert_allclose(got[..., 1], 2 * got[..., 0], atol=2e-6)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputation_is_the_sparse_solve(share):
    """Large holes and scattered pixels, sides that are odd, within 0.001 std."""
    random = np.random.default_rng(0)
    shape = (45, 70)
    smooth = jax.image.resize(random.normal(size=(2, 5, 5)), (2, *shape), "linear")
    order = np.stack([*np.asarray(smooth), random.normal(size=shape)])
    keep = order > np.quantile(order, 1 - share, axis=(1, 2), keepdims=True)
    images = random.normal(size=(3, *shape, 2)).astype(np.float32)
    got = np.asarray(imputation.impute(images, keep))
    np.testing.assert_array_equal(got[keep], images[keep])
    expected = [sparse_solution(*pair) for pair in zip(images, keep, strict=True)]
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_imputation_with_every_pixel_and_with_none():
    keep = np.stack([np.ones((8, 8), bool), np.zeros((8, 8), bool)])
    whole, none = imputation.impute(IMAGES[:2], keep)
    np.testing.assert_array_equal(whole, IMAGES[0])
    assert np.isnan(none).all()


def test_the_noise_of_road_lies_on_removed_pixels():
    seen = []

    def recorded(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return probabilities(x)

    at = {"percentiles": (50,), "at_once": 1}
    for noise in (0.0, 0.1):
        metrics.road(recorded, IMAGES, MAPS, LABELS, noise=noise, **at)
    jax.effects_barrier()
    plain, noisy = np.stack(seen).reshape(2, 2, *IMAGES.shape)
    removed = plain != IMAGES
    assert 0.4 < removed.mean() < 0.6
    np.testing.assert_array_equal(noisy[~removed], plain[~removed])
    assert 0.08 < (noisy - plain)[removed].std() < 0.12


@pytest.mark.parametrize("at_once", [1, 16])
def test_curves_do_not_depend_on_how_many_points_run_at_once(at_once):
    one, other = (
        metrics.deletion_curve(probabilities, IMAGES, MAPS, LABELS, step=9, at_once=n)
        for n in (4, at_once)
    )
    assert one.shape == (len(IMAGES), 9)
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("curve", [metrics.deletion_curve, metrics.insertion_curve])
def test_curves_take_what_is_known_of_the_whole_image(curve):
    """The same values from one point less, and no forward pass for it."""
    whole, seen = np.asarray(probabilities(IMAGES))[np.arange(4), LABELS], []

    def recorded(x):
        jax.debug.callback(lambda x: seen.append(len(x)), x)
        return probabilities(x)

    given = {"step": 9, "at_once": 4}
    full = curve(probabilities, IMAGES, MAPS, LABELS, **given)
    got = curve(recorded, IMAGES, MAPS, LABELS, **given, whole=whole)
    jax.effects_barrier()
    assert seen == [len(IMAGES)] * 8
    np.testing.assert_allclose(got, full, rtol=1e-6)


def test_an_empty_mask_is_excluded_and_counted():
    masks = MASKS.copy()
    masks[1] = 0
    broken = MAPS.copy()
    broken[3, 0, 0] = np.nan
    for metric in (
        metrics.pointing_game,
        metrics.energy_pointing_game,
        metrics.energy_over_area,
        metrics.relevance_rank_accuracy,
        metrics.intersection_over_union,
        metrics.localisation_auc,
    ):
        whole, part = metric(MAPS, MASKS), metric(broken, masks)
        np.testing.assert_array_equal(np.isnan(part), [False, True, False, True])
        np.testing.assert_array_equal(part[::2], whole[::2])
        mean, excluded = metrics.mean_and_excluded(part)
        assert mean == pytest.approx(whole[::2].mean()) and excluded == 2
    mean, excluded = metrics.mean_and_excluded(np.full(2, np.nan))
    assert np.isnan(mean) and excluded == 2


def test_an_empty_map_scores_as_a_uniform_one():
    area = MASKS.mean((1, 2))
    for flat in (np.zeros_like(MAPS), np.ones_like(MAPS), -np.ones_like(MAPS)):
        np.testing.assert_allclose(metrics.pointing_game(flat, MASKS), area)
        np.testing.assert_allclose(metrics.energy_pointing_game(flat, MASKS), area)
        np.testing.assert_allclose(metrics.energy_over_area(flat, MASKS), 1)
        np.testing.assert_allclose(metrics.relevance_rank_accuracy(flat, MASKS), area)
        np.testing.assert_allclose(metrics.localisation_auc(flat, MASKS), 0.5)
        np.testing.assert_allclose(metrics.normalised_entropy(flat), 1)
        np.testing.assert_allclose(metrics.gini(flat), 0, atol=1e-12)
        assert np.isnan(metrics.spearman(flat, MAPS)).all()
    assert metrics.intersection_over_union(np.zeros_like(MAPS), MASKS).max() == 0
    assert metrics.empty_fraction(np.stack([0 * MAPS[0], MAPS[0]])) == 0.5


def test_perfect_and_opposite_maps():
    good, bad = MASKS.astype(float), 1.0 - MASKS
    for metric, worst in (
        (metrics.pointing_game, 0),
        (metrics.energy_pointing_game, 0),
        (metrics.relevance_rank_accuracy, 0),
        (metrics.intersection_over_union, 0),
        (metrics.localisation_auc, 0),
    ):
        np.testing.assert_allclose(metric(good, MASKS), 1)
        np.testing.assert_allclose(metric(bad, MASKS), worst, atol=1e-12)
    np.testing.assert_allclose(metrics.jensen_shannon(good, good), 0, atol=1e-12)
    np.testing.assert_allclose(metrics.jensen_shannon(good, bad), 1)
    one = np.zeros((1, 4, 4))
    one[0, 1, 2] = 3
    assert metrics.gini(one)[0] == pytest.approx(15 / 16)
    assert metrics.normalised_entropy(one)[0] == pytest.approx(0)


def test_localisation_auc_with_ties_is_that_of_scikit_learn():
    coarse = np.round(MAPS * 4)
    expected = [
        roc_auc_score(m.ravel(), s.ravel()) for s, m in zip(coarse, MASKS, strict=True)
    ]
    got = metrics.localisation_auc(coarse, MASKS)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert np.isnan(metrics.localisation_auc(MAPS, np.ones_like(MASKS))).all()


def test_tolerance_is_a_disc_around_the_maximum():
    s, mask = np.zeros((1, 9, 9)), np.zeros((1, 9, 9))
    s[0, 4, 4] = mask[0, 7, 8] = 1  # Distance 5.
    assert metrics.pointing_game(s, mask)[0] == 0
    assert metrics.pointing_game(s, mask, tolerance=4.9)[0] == 0
    assert metrics.pointing_game(s, mask, tolerance=5)[0] == 1


def test_intersection_over_union_counts_cells():
    s = np.array([[[1.0, 0.6], [0.4, 0.0]]])
    mask = np.array([[[1, 0], [1, 0]]])
    assert metrics.intersection_over_union(s, mask)[0] == pytest.approx(1 / 3)
    lower = metrics.intersection_over_union(s, mask, fraction=0.3)
    assert lower[0] == pytest.approx(2 / 3)


def test_border_mass_is_the_frame():
    s = np.zeros((2, 20, 20))
    s[0, 1, 10] = s[0, 10, 10] = 1.0
    s[1] = 1
    np.testing.assert_allclose(metrics.border_mass(s), [0.5, 1 - 0.8**2])
    assert metrics.border_mass(np.ones((1, 7, 7)))[0] == pytest.approx(24 / 49)


def test_pairs_and_held_out_explainer():
    other = DATA["other_maps"]
    maps = {"cam": MAPS, "gradient": other, "cube": MAPS**3}
    result = metrics.pairwise(maps, metrics.spearman)
    assert list(result) == [("cam", "gradient"), ("cam", "cube"), ("gradient", "cube")]
    np.testing.assert_allclose(result["cam", "cube"], 1)
    expected = [
        spearmanr(a.ravel(), b.ravel())[0] for a, b in zip(MAPS, other, strict=True)
    ]
    np.testing.assert_allclose(result["cam", "gradient"], expected, atol=1e-12)
    held_out = metrics.held_out_agreement(maps, other)
    np.testing.assert_allclose(held_out["cam"], expected, atol=1e-12)
    np.testing.assert_allclose(held_out["gradient"], 1)


def test_jensen_shannon_is_the_entropy_of_the_mixture():
    p, q = (m.reshape(4, -1) for m in (MAPS, DATA["other_maps"]))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)

    def entropy(p):
        return -(p * np.log2(p)).sum(1)

    expected = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    got = metrics.jensen_shannon(MAPS, DATA["other_maps"])
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_insertion_runs_from_the_blur_to_the_image():
    curve = metrics.insertion_curve(
        probabilities, IMAGES, jnp.asarray(MAPS), LABELS, step=24
    )
    assert curve.shape == (4, 4)
    ends = [metrics.blurred(IMAGES), IMAGES]
    for end, x in zip((0, -1), ends, strict=True):
        expected = np.asarray(probabilities(x))[np.arange(4), LABELS]
        np.testing.assert_allclose(curve[:, end], expected, atol=1e-6)


def test_blur_keeps_constants_and_averages_neighbours():
    flat = np.full((1, 6, 7, 2), 3.0, np.float32)
    np.testing.assert_allclose(metrics.blurred(flat), flat, rtol=1e-6)
    point = np.zeros((1, 31, 31, 1), np.float32)
    point[0, 15, 15, 0] = 1
    got = np.asarray(metrics.blurred(point))[0, :, :, 0]
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / 5.0) ** 2)
    kernel /= kernel.sum()
    np.testing.assert_allclose(got[10:21, 10:21], np.outer(kernel, kernel), atol=1e-7)
    assert got.sum() == pytest.approx(1, abs=1e-5)


def test_parameter_randomisation_goes_from_the_top_down():
    rng = np.random.default_rng(0)
    names = ("stem", "body", "head")
    params = {name: rng.normal(size=(4, 8, 8)) for name in names}
    fresh = {name: rng.normal(size=(4, 8, 8)) for name in names}
    seen = []

    def explain(p):
        seen.append([name for name in names if p[name] is fresh[name]])
        return p["stem"] + 0.01 * p["head"]

    result = metrics.parameter_randomisation(
        explain, params, fresh, ["head", "body", "stem"]
    )
    assert seen == [[], ["head"], ["body", "head"], ["stem", "body", "head"]]
    assert list(result) == ["head", "body", "stem"]
    assert (result["body"] > 0.99).all() and (np.abs(result["stem"]) < 0.5).all()
    with pytest.raises(ValueError, match="no parameters named .'logits'.*'body'"):
        metrics.parameter_randomisation(explain, params, fresh, ["logits"])


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"masks \(4, 4, 4\) and maps \(4, 8, 8\)"):
        metrics.energy_pointing_game(MAPS, MASKS[:, ::2, ::2])
    with pytest.raises(ValueError, match=r"\[B, H, W\], got shape \(8, 8\)"):
        metrics.normalised_entropy(MAPS[0])
    with pytest.raises(ValueError, match="different grids"):
        metrics.spearman(MAPS, MAPS[:, ::2, ::2])
    with pytest.raises(ValueError, match="enlarge the maps first"):
        metrics.deletion_curve(probabilities, IMAGES, MAPS[:, ::2, ::2], LABELS)
    with pytest.raises(ValueError, match="inside .0, 100."):
        metrics.road(probabilities, IMAGES, MAPS, LABELS, percentiles=(0, 50))
