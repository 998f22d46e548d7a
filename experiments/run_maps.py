"""The network of a finished run, and its maps of any images, for the figures."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax.data.augment import normalise
from cxai_jax.inference import predictor
from cxai_jax.inference.predictor import Trained
from cxai_jax.maps import attribution, saliency
from cxai_jax.models import needs_site

BATCH = 4  # Images at once: one compiled program for any number.
CELLS = 28  # A side at most, on which an attribution is drawn.


def load(workdir: Path) -> Trained:
    """The network that a run selected.

    Raises:
      FileNotFoundError, ValueError: as `predictor.load`.
    """
    return predictor.load(workdir)


def prepared(trained: Trained, images: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, C] -> the network's input, float32 [N, S, S, 3]."""
    scale = trained.scale
    return np.asarray(normalise(jnp.asarray(images), scale.mean, scale.std))


def look(trained: Trained, images: np.ndarray, sites: np.ndarray):
    """Probabilities [N, K] and class maps [N, h, w, K] of prepared images."""

    def step(variables, images, labels, site):
        logits, out = trained.model.apply(variables, images, "eval", site)
        return jax.nn.softmax(logits.astype(jnp.float32)), out.class_maps

    return _batched(step, trained, images, np.zeros(len(images), np.int32), sites)


def guided_factorization(
    trained: Trained, images: np.ndarray, labels: np.ndarray, sites: np.ndarray
) -> np.ndarray:
    """Attribution of Gur et al. (2021) of each label, its mean over cells [N, g, g].

    Args:
      trained: a run.
      images: prepared [N, S, S, 3].
      labels: the classes explained, int [N].
      sites: int [N].
    """
    plain = trained.model.clone(lowering="xla", dtype=jnp.float32)
    side = images.shape[1]
    cells = max(n for n in range(1, min(CELLS, side) + 1) if side % n == 0)

    def step(variables, images, labels, site):
        network = saliency.stages(plain, variables, "eval", site)
        return attribution.guided_factorization(network.logits, images, labels)

    maps = _batched(step, trained, images, labels, sites)
    block = side // cells
    return maps.reshape(-1, cells, block, cells, block).mean((2, 4))


def gradcam(
    trained: Trained, images: np.ndarray, labels: np.ndarray, sites: np.ndarray
) -> np.ndarray:
    """Grad-CAM one stage before the last, signed [N, 2h, 2w]."""

    def step(variables, images, labels, site):
        network = saliency.stages(trained.model, variables, "eval", site)
        lower = network.lower(images, site)
        return saliency.gradcam_lower(network.upper_head, lower, labels)

    return _batched(step, trained, images, labels, sites)


def _batched(step: Callable, trained: Trained, images, labels, sites):
    """`step(variables, images, labels, site)` of all images, some at a time."""
    run, parts = jax.jit(step), []
    arrays = (images, labels.astype(np.int32), sites.astype(np.int32))
    if not needs_site(trained.config.model):
        arrays = (*arrays[:2], np.zeros_like(arrays[2]))
    for start in range(0, len(images), BATCH):
        rows = np.minimum(np.arange(start, start + BATCH), len(images) - 1)
        filled = [one[rows] for one in arrays]
        parts.append(jax.device_get(run(trained.variables, *filled)))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(images)], *parts)
