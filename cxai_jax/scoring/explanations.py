"""Saliency maps of a trained network on a split: computed and measured.

Three maps that the alignment loss can train (CAM, Grad-CAM one stage earlier, input
gradient) and one that it cannot (occlusion), all of the predicted class, with running
batch statistics. Agreement of the three is the chest X-ray paper's aim (Purwita &
Qomariyah 2021); entropy, empty maps and the held-out map say whether it means anything.
"""

import functools
from itertools import combinations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from cxai_jax import disk
from cxai_jax import mesh as meshes
from cxai_jax.data import pipeline, transforms
from cxai_jax.data.augment import Scale, normalise
from cxai_jax.data.records import Records
from cxai_jax.maps import quality as em
from cxai_jax.maps import saliency
from cxai_jax.maps.grid import upsample
from cxai_jax.objectives import alignment
from cxai_jax.types import Array, PyTree

MAPS = {
    "cam": "CAM",
    "gradcam_lower": "Grad-CAM, one stage earlier",
    "input_gradient": "Input gradient",
}
POINTS = 16  # Of the deletion and insertion curves.


def explain_batch(
    model: nn.Module,
    scale: Scale,
    variables: PyTree,
    images: Array,
    site: Array | None = None,
) -> dict[str, Array]:
    """Maps of the predicted class, and how the probability follows the CAM.

    Args:
      model: a backbone of `cxai_jax.models`.
      scale: its input normalisation.
      variables: params and batch_stats.
      images: uint8 [B, H, W, C] at the network's size.
      site: int32 [B], for a network with parts of each site.

    Returns:
      probs float32 [B, K]; the signed maps cam, occlusion [B, h, w], gradcam_lower
      [B, 2h, 2w] and input_gradient [B, H, W] (of the gray values, so that the
      repetition to three channels is inside the derivative); deletion and insertion,
      the areas under the curves of the CAM [B].
    """

    network = saliency.stages(model, variables, "eval", site)
    lower = network.lower
    network = network._replace(
        lower=lambda gray, site: lower(normalise(gray, scale.mean, scale.std), site)
    )

    def probabilities(gray):
        return jax.nn.softmax(network.logits(gray).astype(jnp.float32))

    gray = images.astype(jnp.float32)
    logits, out = model.apply(
        variables, normalise(images, scale.mean, scale.std), "eval", site
    )
    labels = logits.argmax(-1)
    maps = saliency.signed_maps(list(MAPS), network, gray, out, labels)
    found = dict(zip(MAPS, maps, strict=True))
    # What a normalised image has 0 for.
    fill = sum(scale.mean) / 3 if scale.mean else gray.mean((1, 2, 3), keepdims=True)
    size = images.shape[1]
    smooth = upsample(found["cam"], size)
    curve = {"maps": smooth, "labels": labels, "step": -(-size * size // POINTS)}
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    curve["whole"] = probs.max(-1)
    return found | {
        "probs": probs,
        "occlusion": saliency.occlusion(
            network.logits, gray, labels, grid=out.class_maps.shape[1], fill=fill
        ),
        "deletion": em.area_under_curve(
            em.deletion_curve(probabilities, gray, fill=fill, **curve)
        ),
        "insertion": em.area_under_curve(
            em.insertion_curve(probabilities, gray, **curve)
        ),
    }


def explain(
    model: nn.Module,
    scale: Scale,
    config,
    mesh: Mesh,
    variables: PyTree,
    records: Records,
) -> dict[str, np.ndarray]:
    """`explain_batch` of a whole split as NumPy arrays, one row per image, in order.

    Args:
      model: a backbone of `cxai_jax.models`.
      scale: its input normalisation.
      config: of the run.
      mesh: the devices.
      variables: params and batch_stats.
      records: the split.

    Returns:
      names, patients str [N]; labels int32 [N], the true ones; and what
      `explain_batch` returns.
    """
    variables = jax.device_put(variables, meshes.replicated(mesh))
    # Every host needs the whole answer, so the outputs are replicated.
    step = jax.jit(
        meshes.side_by_side(functools.partial(explain_batch, model, scale), mesh),
        out_shardings=meshes.replicated(mesh),
    )
    size = config.data.image_size
    parts = []
    for batch, rows in pipeline.scoring_batches(
        records,
        pipeline.fit_for_scoring(config),
        (size, size, records.images[0].shape[-1]),
        config.eval.batch_size,
        mesh,
    ):
        found = jax.device_get(step(variables, batch.images, batch.sites))
        parts.append({name: value[: len(rows)] for name, value in found.items()})
    return {
        "names": np.asarray(records.names, str),
        "patients": np.asarray(records.patients, str),
        "labels": np.asarray(records.labels, np.int32),
        **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
    }


def measure(
    found: dict[str, np.ndarray], masks: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Every explanation metric of every image, name -> [N]; NaN where undefined.

    Args:
      found: what `explain` returned.
      masks: lungs, bool [N, H, W], empty where an image has none (`lung_masks`).

    Returns:
      agreement (mean Spearman over the pairs of maps, on the grid of the CAM) and its
      pairs; alignment (the training loss, 0 is agreement); per map spearman with
      occlusion, js with the other maps, entropy, empty (1 for a map without positive
      evidence), border, and with masks lung energy, energy over area and pointing
      game; deletion and insertion of the CAM.
    """
    grid, size = found["cam"].shape[1], found["input_gradient"].shape[1]
    coarse = {n: np.asarray(alignment.block_mean(found[n], grid)) for n in MAPS}
    loss = alignment.saliency_alignment([found[n] for n in MAPS], grid=grid)
    values = {"agreement": agreement(found), "alignment": np.asarray(loss)}
    for measure_name, function in (
        ("spearman", em.spearman),
        ("js", em.jensen_shannon),
    ):
        for pair, value in em.pairwise(coarse, function).items():
            values[f"{measure_name}/{'~'.join(pair)}"] = value
    for name, value in em.held_out_agreement(coarse, found["occlusion"]).items():
        values[f"occlusion/{name}"] = value
    for name in MAPS:
        values[f"entropy/{name}"] = em.normalised_entropy(coarse[name])
        values[f"empty/{name}"] = 1.0 - (coarse[name] > 0).any(axis=(1, 2))
        # Rectified before it is enlarged, as Grad-CAM is drawn.
        drawn = np.asarray(upsample(np.maximum(found[name], 0), size))
        values[f"border/{name}"] = em.border_mass(drawn)
        if masks is not None:
            values[f"lung/{name}"] = em.energy_pointing_game(drawn, masks)
            values[f"lung_over_area/{name}"] = em.energy_over_area(drawn, masks)
            values[f"pointing/{name}"] = em.pointing_game(drawn, masks)
    return values | {name: found[name] for name in ("deletion", "insertion")}


def agreement(found: dict[str, np.ndarray]) -> np.ndarray:
    """Mean Spearman correlation over the pairs of maps on the CAM's grid, [N].

    NaN where a map is flat.
    """
    grid = found["cam"].shape[1]
    coarse = [np.asarray(alignment.block_mean(found[name], grid)) for name in MAPS]
    return np.mean([em.spearman(a, b) for a, b in combinations(coarse, 2)], axis=0)


def summarise(values: dict[str, np.ndarray]) -> dict[str, dict]:
    """Name -> mean over the images for which it is defined, and how many are not."""
    keys = ("mean", "excluded")
    return {
        name: dict(zip(keys, em.mean_and_excluded(value), strict=True))
        for name, value in values.items()
    }


def lung_masks(records: Records, size: int) -> np.ndarray | None:
    """Masks as the network sees the images, bool [N, size, size]; empty where absent.

    None if the whole source has none.
    """
    if records.lung_masks is None:
        return None
    masks = np.zeros((len(records), size, size), bool)
    for place, mask in zip(masks, records.lung_masks, strict=True):
        if mask is not None:
            place[:] = (
                transforms.squash(np.where(mask, 255, 0).astype("u1"), size) > 127
            )
    return masks


def evenly(number: int, limit: int) -> np.ndarray:
    """At most `limit` of the rows 0 .. number - 1, evenly spread."""
    return np.unique(np.linspace(0, number - 1, min(number, limit)).round().astype(int))


def save(path: Path, found: dict[str, np.ndarray]) -> None:
    """Writes the explanations file (npz); maps are scaled to a maximum of 1."""
    small = dict(found)
    for name in (*MAPS, "occlusion"):
        peak = np.abs(found[name]).max(axis=(1, 2), keepdims=True)
        small[name] = (found[name] / np.where(peak > 0, peak, 1)).astype(np.float16)
    disk.write_arrays(path, small)


def load(path: Path) -> dict[str, np.ndarray]:
    """Reads an explanations file."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)
