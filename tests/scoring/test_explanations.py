"""Explanations of a trained network: maps against NumPy, metrics, gate, pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cxai_jax import mesh as meshes
from cxai_jax import models
from cxai_jax.data import phantom
from cxai_jax.data.augment import PER_IMAGE, Scale
from cxai_jax.data.records import Records
from cxai_jax.maps.grid import interpolation_matrix
from cxai_jax.models import tiny
from cxai_jax.report import pictures
from cxai_jax.scoring import explanations

SIZE, GRID, NUMBER = 32, 4, 6
SCALE = Scale(*models.normalisation("tiny"))


def records():
    patient = np.arange(NUMBER)
    images, lungs, lesions = phantom.draw(
        np.random.default_rng(0), SIZE, patient, patient % 2, patient % 2, patient > 2
    )
    lungs[1] = None
    names = np.array([f"{i}.png" for i in patient])
    labels = (patient % 2).astype(np.int32)
    return Records(images, labels, labels, patient.astype(str), names, lungs)


@pytest.fixture(scope="module")
def network():
    """A tiny model whose head is random, and its logits of gray images."""
    model = tiny.Tiny(2)
    variables = model.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)), "eval")

    @jax.jit
    def apply(gray):
        x = (jnp.repeat(gray, 3, -1) - jnp.array(SCALE.mean)) / jnp.array(SCALE.std)
        return model.apply(variables, x, "eval")

    return model, variables, apply


@pytest.fixture(scope="module")
def found(network):
    model, variables, _ = network
    config = ConfigDict(
        {
            "data": {"image_size": SIZE},
            "eval": {"batch_size": 4},
            "augment": {"crop": "none"},
        }
    )
    return explanations.explain(
        model, SCALE, config, meshes.make_mesh(1), variables, records()
    )


@pytest.fixture(scope="module")
def gray():
    squash = explanations.transforms.squash
    return np.stack([squash(i, SIZE) for i in records().images]).astype(np.float32)


def test_maps_of_images_normalised_by_themselves_ignore_brightness(network):
    model, variables, _ = network
    config = ConfigDict({"data": {"image_size": SIZE}, "eval": {"batch_size": 6}})
    config.augment = ConfigDict({"crop": "none"})
    own = records()
    squashed = [explanations.transforms.squash(image, SIZE) for image in own.images]
    dark = np.stack(squashed) // 2
    one, other = (
        explanations.explain(
            model,
            PER_IMAGE,
            config,
            meshes.make_mesh(1),
            variables,
            dataclasses.replace(own, images=images),
        )
        for images in (dark, 2 * dark + 1)
    )
    for name in ("cam", "gradcam_lower", "occlusion", "deletion", "probs"):
        assert np.isfinite(one[name]).all()
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-5)
    assert np.abs(one["occlusion"]).max() > 1e-4


def target(apply, gray, chosen):
    logits = np.asarray(apply(gray)[0], np.float64)
    return logits[np.arange(len(chosen)), chosen] - logits.mean(axis=1)


def test_every_image_has_its_row(found):
    assert found["names"].tolist() == [f"{i}.png" for i in range(NUMBER)]
    assert found["cam"].shape == (NUMBER, GRID, GRID)
    assert found["gradcam_lower"].shape == (NUMBER, 2 * GRID, 2 * GRID)
    assert found["input_gradient"].shape == (NUMBER, SIZE, SIZE)


def test_cam_is_the_centred_map_of_the_predicted_class(network, found, gray):
    logits, out = network[2](gray)
    chosen = np.asarray(logits).argmax(1)
    maps = np.asarray(out.class_maps)
    expected = maps[np.arange(NUMBER), :, :, chosen] - maps.mean(-1)
    np.testing.assert_allclose(found["cam"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["probs"], jax.nn.softmax(logits), atol=1e-5)


def test_input_gradient_is_that_of_the_gray_value(network, found, gray):
    """Central difference of one pixel, all three channels moving together."""
    chosen = found["probs"].argmax(1)
    row, column = 13, 9
    step = np.zeros_like(gray)
    step[:, row, column] = 2.0
    above, below = (target(network[2], gray + s * step, chosen) for s in (1, -1))
    expected = np.abs(above - below) / 4
    np.testing.assert_allclose(
        found["input_gradient"][:, row, column], expected, rtol=0.1, atol=1e-5
    )


def test_occlusion_is_the_drop_under_a_covered_cell(network, found, gray):
    chosen = found["probs"].argmax(1)
    covered = gray.copy()
    covered[:, 8:16, 24:32] = np.mean(SCALE.mean)
    drop = target(network[2], gray, chosen) - target(network[2], covered, chosen)
    np.testing.assert_allclose(found["occlusion"][:, 1, 3], drop, atol=1e-4)


def test_deletion_follows_the_map(network, found, gray):
    matrix = interpolation_matrix(SIZE, GRID)
    chosen = found["probs"].argmax(1)
    curves = []
    for image, cam, label in zip(gray, found["cam"], chosen, strict=True):
        smooth = (matrix @ cam @ matrix.T).astype(np.float32).ravel()
        order = np.argsort(-smooth, kind="stable")
        step = -(-SIZE * SIZE // explanations.POINTS)
        stack = []
        for count in range(0, SIZE * SIZE + 1, step):
            x = image.reshape(-1).copy()
            x[order[:count]] = np.mean(SCALE.mean)
            stack.append(x.reshape(SIZE, SIZE, 1))
        stack = np.stack(stack)[: NUMBER * 3]
        parts = [stack[i : i + NUMBER] for i in range(0, len(stack), NUMBER)]
        parts[-1] = np.pad(parts[-1], [(0, NUMBER - len(parts[-1]))] + [(0, 0)] * 3)
        probs = np.concatenate([jax.nn.softmax(network[2](p)[0]) for p in parts])
        y = np.asarray(probs[: len(stack), label], np.float64)
        curves.append((y.sum() - (y[0] + y[-1]) / 2) / (len(y) - 1))
    np.testing.assert_allclose(found["deletion"], curves, atol=2e-3)


def same_maps(flat=()):
    """Found maps that all show one pattern, at three resolutions."""
    pattern = np.random.default_rng(1).normal(size=(5, GRID, GRID))
    for i in flat:
        pattern[i] = -1.0
    zoom = {"cam": 1, "occlusion": 1, "gradcam_lower": 2, "input_gradient": 8}
    found = {n: pattern.repeat(k, 1).repeat(k, 2) for n, k in zoom.items()}
    return found | {"deletion": np.zeros(5), "insertion": np.ones(5)}


def test_equal_maps_agree_perfectly():
    values = explanations.measure(same_maps())
    np.testing.assert_allclose(values["agreement"], 1)
    np.testing.assert_allclose(values["alignment"], 0, atol=1e-6)
    np.testing.assert_allclose(values["js/cam~input_gradient"], 0, atol=1e-6)
    np.testing.assert_allclose(values["occlusion/gradcam_lower"], 1)
    assert not any(values[f"empty/{name}"].any() for name in explanations.MAPS)


def test_opposite_maps_disagree():
    found = same_maps()
    found["cam"] = -found["cam"]
    values = explanations.measure(found)
    np.testing.assert_allclose(values["spearman/cam~gradcam_lower"], -1)
    np.testing.assert_allclose(values["agreement"], (-1 - 1 + 1) / 3)
    np.testing.assert_allclose(explanations.agreement(found), values["agreement"])


def test_flat_maps_are_empty_flat_and_excluded():
    values = explanations.measure(same_maps(flat=[2]))
    summary = explanations.summarise(values)
    assert np.isnan(values["agreement"][2])
    assert summary["agreement"] == {"mean": pytest.approx(1), "excluded": 1}
    assert summary["empty/cam"]["mean"] == pytest.approx(1 / 5)
    assert values["entropy/cam"][2] == pytest.approx(1)
    assert values["entropy/cam"][0] < 1


def test_energy_in_the_lungs_counts_masked_images_only():
    found = same_maps()
    masks = np.zeros((5, SIZE, SIZE), bool)
    masks[:4] = True
    masks[0, :, SIZE // 2 :] = False
    values = explanations.measure(found, masks)
    np.testing.assert_allclose(values["lung/cam"][1:4], 1)
    np.testing.assert_allclose(values["pointing/input_gradient"][1:4], 1)
    assert 0 < values["lung/cam"][0] < 1
    assert np.isnan(values["lung/cam"][4])
    energy = np.maximum(found["input_gradient"][0], 0)
    expected = energy[:, : SIZE // 2].sum() / energy.sum()
    np.testing.assert_allclose(values["lung/input_gradient"][0], expected, rtol=1e-5)


def test_lung_masks_are_empty_where_absent():
    split = records()
    masks = explanations.lung_masks(split, SIZE)
    assert masks[0].any() and not masks[1].any()
    assert (
        explanations.lung_masks(dataclasses.replace(split, lung_masks=None), 8) is None
    )


def test_saved_maps_keep_their_pattern(tmp_path, found):
    explanations.save(tmp_path / "explanations_test.npz", found)
    with np.load(tmp_path / "explanations_test.npz") as file:
        saved = dict(file)
    peak = np.abs(saved["gradcam_lower"]).max(axis=(1, 2))
    np.testing.assert_allclose(peak, 1, rtol=1e-3)
    np.testing.assert_allclose(
        explanations.agreement(saved), explanations.agreement(found), atol=0.05
    )


def test_maps_stand_in_one_row_of_pictures(found, gray):
    maps = [found[name][0] for name in explanations.MAPS]
    picture = pictures.row(gray[0].astype(np.uint8), maps, [1.0] * 3)
    assert picture.dtype == np.uint8 and picture.shape == (
        SIZE,
        4 * SIZE + 3 * pictures.GAP,
        3,
    )
    np.testing.assert_array_equal(picture[:, :SIZE, 0], gray[0, ..., 0])
