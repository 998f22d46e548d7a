"""Maps over images: one scale, contours, where evidence lies, and picture files."""

import io

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from cxai_jax.report import pictures

LEFT = np.array([[1.0, -1.0], [1.0, -1.0]])


def luminance(rgb):
    """Relative luminance of sRGB colours 0..255 (IEC 61966-2-1)."""
    linear = np.where(rgb <= 10.3, rgb / 3294.6, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


# What is left of a colour without red or green cones (Machado et al. 2009, severity 1).
DEFICIENT = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


@pytest.mark.parametrize("kind", [None, *DEFICIENT])
def test_the_colour_map_brightens_steadily_for_every_eye(kind):
    rgb = pictures.colours(np.linspace(0, 1, 33))
    if kind:
        rgb = np.clip(rgb @ np.transpose(DEFICIENT[kind]), 0, 255)
    light = np.cbrt(luminance(rgb))  # As CIE lightness, without its affine part.
    steps = np.diff(light)
    assert (steps > 0).all() and steps.max() < 3 * steps.mean()


def test_one_scale_serves_all_maps_and_outliers_do_not_set_it():
    maps = np.zeros((10, 20, 20))
    maps[:, :10] = 2.0
    maps[3, 0, 0] = 1000.0
    assert pictures.common_scale(maps) == pytest.approx(2.0)
    assert pictures.common_scale(-maps) == 0.0


def test_a_map_without_evidence_looks_empty():
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    plain = np.repeat(gray[..., None], 3, axis=2)
    for nothing in (np.zeros((2, 2)), np.full((2, 2), -3.0), 0.001 * LEFT):
        shown = pictures.overlay(gray, nothing, 1.0)
        np.testing.assert_array_equal(shown, plain)
    faint, strong = (pictures.overlay(gray, m * LEFT, 1.0) for m in (0.2, 1.0))
    change = [np.abs(x.astype(int) - plain).sum() for x in (faint, strong)]
    assert 0 < 3 * change[0] < change[1]
    np.testing.assert_array_equal(pictures.overlay(gray, 5 * LEFT, 5.0), strong)


def test_bright_tissue_carries_contours_and_no_haze():
    gray = np.full((80, 80), 255, np.uint8)
    peak = np.exp(-((np.arange(8)[:, None] - 4) ** 2 + (np.arange(8) - 4) ** 2) / 4.0)
    shown = pictures.overlay(gray, peak, 1.0)
    changed = (shown != 255).any(2)
    assert 0.02 < changed.mean() < 0.35
    dark = pictures.overlay(gray // 8, peak, 1.0)
    assert (dark != 31).any(2).mean() > changed.mean() + 0.1


def test_an_overlay_is_that_of_a_slow_drawing():
    """Pixel by pixel in float64, contours by SciPy's morphology."""
    random = np.random.default_rng(0)
    cells = Image.fromarray(random.integers(0, 256, (12, 16), np.uint8))
    gray = np.asarray(cells.resize((420, 310)))
    class_map, scale = random.normal(size=(7, 7)), 1.5
    heat = jax.image.resize(class_map / scale, gray.shape, "linear")
    heat = np.clip(np.asarray(heat, np.float64), 0, 1)
    haze = np.sqrt(heat) * (heat > 6 / 256) * (1 - (gray / 255) ** 2)
    alpha = 0.6 * haze[..., None]
    drawn = (1 - alpha) * gray[..., None] + alpha * pictures.colours(heat)
    for level in pictures.LEVELS:
        inside = heat >= level
        line = inside & ~ndimage.binary_erosion(inside, iterations=2)
        rim = ndimage.binary_dilation(inside, iterations=2) & ~inside
        drawn[rim] *= 0.5
        drawn[line] = pictures.colours(np.asarray(level))
    wrong = np.abs(pictures.overlay(gray, class_map, scale) - drawn).max(2)
    assert wrong.mean() < 0.7 and (wrong > 3).mean() < 0.01


def test_a_flood_from_the_corners_is_scipys_regions_there():
    random = np.random.default_rng(1)
    snake = np.ones((9, 12), bool)
    snake[1::4, :-1] = snake[3::4, 1:] = False
    images = [random.random((64, 64)) < share for share in (0.4, 0.55, 0.6, 0.7)]
    for free in (snake, snake[:, ::-1], ~snake, *images):
        regions, _ = ndimage.label(free)
        corners = regions[[0, 0, -1, -1], [0, -1, 0, -1]]
        expected = np.isin(regions, corners[corners > 0])
        np.testing.assert_array_equal(pictures.reached_from_corners(free), expected)


def test_evidence_is_centred_and_its_mean_is_the_logit():
    random = np.random.default_rng(0)
    maps, labels = random.normal(size=(3, 4, 5, 3)), np.array([2, 0, 1])
    found = pictures.evidence(maps, labels)
    logits = maps.mean((1, 2))
    expected = logits[np.arange(3), labels] - logits.mean(1)
    np.testing.assert_allclose(found.mean((1, 2)), expected)
    np.testing.assert_allclose(pictures.evidence(maps + 7, labels), found, atol=1e-12)


def test_the_body_is_told_from_the_air_around_it_but_keeps_its_lungs():
    gray = np.zeros((128, 128), np.uint8)
    gray[24:104, 16:112] = 120
    gray[48:80, 32:56] = 5  # A lung.
    inside = pictures.body(gray)
    assert inside.shape == (64, 64) and not inside[:10].any()
    assert inside[14:50, 10:54].all()
    assert pictures.body(np.full((50, 70), 90, np.uint8)).all()
    corner = np.zeros((4, 4))
    corner[0, 0] = 1.0
    assert pictures.share_outside(corner, inside, 1.0) > 0.8
    centre = np.zeros((4, 4))
    centre[1:3, 1:3] = 1.0
    centre[0, 0] = -50.0  # Evidence against counts nowhere.
    assert pictures.share_outside(centre, inside, 1.0) < 0.25
    for faint in (0 * corner, 0.2 * corner):
        assert pictures.share_outside(faint, inside, 1.0) == 0.0


@pytest.mark.parametrize("shape", [(20, 31), (300, 200)])
def test_a_panel_gives_back_its_halves(shape):
    random = np.random.default_rng(0)
    gray = random.integers(0, 255, shape, np.uint8)
    overlaid = random.integers(0, 255, (*shape, 3), np.uint8)
    drawn = pictures.panel(gray, overlaid, "CAM of sick, 0 to 3.1")
    panel = np.asarray(drawn)
    left, right = pictures.halves(panel)
    np.testing.assert_array_equal(left, np.repeat(gray[..., None], 3, axis=2))
    np.testing.assert_array_equal(right, overlaid)
    bar = panel[-pictures.STRIP // 2, 12 : 12 + min(80, panel.shape[1] // 3)]
    assert bar[-1].sum() > bar[0].sum()
    kept = Image.open(io.BytesIO(pictures.encode(drawn, "PNG")))
    np.testing.assert_array_equal(np.asarray(kept), panel)


def test_without_cells_blackens_exactly_the_cells():
    masked = pictures.without_cells(np.ones((8, 8, 1), np.uint8), [1, 2], patch=4)
    expected = np.ones((8, 8))
    expected[:4, 4:] = 0
    expected[4:, :4] = 0
    np.testing.assert_array_equal(masked, expected)


def test_shrink_keeps_small_images_and_the_aspect():
    small = np.zeros((10, 30), np.uint8)
    assert pictures.shrink(small, 10) is small
    assert pictures.shrink(np.zeros((40, 120, 3), np.uint8), 10).shape == (10, 30, 3)
