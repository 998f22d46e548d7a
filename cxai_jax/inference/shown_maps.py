"""The map that is drawn over a predicted image, by name, all in one unit.

The unit is evidence by area: a map's mean over the image is what it attributes to the
label's logit above the mean of all classes. That is exact for CAM, of first order for
Grad-CAM and HiResCAM, the measured drop for occlusion; so the scale of the run's CAMs
serves all of them. The size of an input gradient has no such meaning: it is drawn in
multiples of its own mean.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cxai_jax import mesh as meshes
from cxai_jax.data.augment import normalise
from cxai_jax.inference.choices import CAM, MAPS
from cxai_jax.inference.predictor import Predicted, Trained
from cxai_jax.maps import saliency
from cxai_jax.report import page, pictures

FORMS = {"gradcam": "gradcam", "hirescam": "hires"}
MULTIPLE = 8  # Of its mean is the highest colour of an input gradient.


def make_maps(trained: Trained, kind: str, batch_size: int, mesh: Mesh) -> Callable:
    """Builds `maps(images, found, sites) -> [B, h, w]`, of the label before voting.

    Images are uint8 [B, S, S, C] of at most `batch_size`, `found` what a Predictor
    gave for them; `sites`, name -> index, averages over the maps as of each. Each
    device of the mesh makes those of its share.

    Raises:
      ValueError: for an unknown map, or one that the network cannot give.
    """
    if kind not in MAPS:
        raise ValueError(f"--map={kind} is unknown; known: {', '.join(MAPS)}")
    if kind == CAM:
        return lambda images, found, sites: pictures.evidence(
            found.class_maps, found.before
        )
    side = trained.config.data.image_size
    grid = side // trained.config.tta.patch
    place = np.zeros(1, np.int32)
    seen = jax.eval_shape(
        lambda v: trained.model.apply(v, jnp.zeros((1, side, side, 3)), "eval", place),
        trained.variables,
    )[1]
    if kind in FORMS and seen.lower is None:
        raise ValueError(
            f"--map={kind} needs the stage before the last, and the network of this "
            f"run, {trained.config.model.name}, gives none; take one of "
            + ", ".join(name for name in MAPS if name not in FORMS)
        )
    step = _step(trained, kind, seen.class_maps.shape[1], grid)
    step = jax.jit(meshes.side_by_side(step, mesh))
    variables = meshes.put_replicated(trained.variables, mesh)

    def maps(images: np.ndarray, found: Predicted, sites: Mapping[str, int]):
        number = len(images)
        filler = [(0, batch_size - number)] + [(0, 0)] * 3
        padded = np.pad(images, filler, mode="edge")
        labels = np.pad(found.before, filler[0], mode="edge").astype(np.int32)
        given = meshes.put_rows((padded, labels), mesh)
        every = [np.full(batch_size, s, np.int32) for s in sites.values() or [0]]
        answers = [step(variables, *given, meshes.put_rows(s, mesh)) for s in every]
        signed = np.mean([np.asarray(one)[:number] for one in answers], axis=0)
        if kind == "gradient":
            mean = np.maximum(signed.mean((1, 2), keepdims=True), 1e-30)
            return signed / mean * trained.map_scale / MULTIPLE
        return signed * signed[0].size

    return maps


def _step(trained: Trained, kind: str, cells: int, grid: int) -> Callable:
    """(variables, images, labels, site) -> signed map, summing to what it explains."""
    mean, std = trained.scale.mean, trained.scale.std

    def step(variables, images, labels, site):
        network = saliency.stages(trained.model, variables, "eval", site)
        gray = images.astype(jnp.float32)

        def logits(gray):
            return network.logits(normalise(gray, mean, std))

        if kind in FORMS:
            lower = network.lower(normalise(images, mean, std), site)
            return saliency.gradcam_lower(
                network.upper_head, lower, labels, form=FORMS[kind]
            )
        if kind == "gradient":
            found = saliency.input_gradient(logits, gray, labels)
            side = found.shape[1] // grid
            return found.reshape(-1, grid, side, grid, side).mean((2, 4))
        # What a normalised image has 0 for.
        fill = sum(mean) / 3 if mean else gray.mean((1, 2, 3), keepdims=True)
        return saliency.occlusion(logits, gray, labels, grid=cells, fill=fill)

    return step


def meaning(kind: str, scale: float) -> str:
    """What the highest colour stands for, in a sentence."""
    if kind == "gradient":
        return (
            f"The highest colour is {MULTIPLE} times the image's mean: pixels to which "
            "the network reacts, for or against the class."
        )
    return page.evidence(scale)
