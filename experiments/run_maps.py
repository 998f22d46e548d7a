"""The network of a finished run, and its maps of any images, for the figures."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax.data.augment import normalise
from cxai_jax.inference.predictor import Trained
from cxai_jax.maps import attribution, saliency
from cxai_jax.models import needs_site

BATCH = 4  # Images at once: one compiled program for any number.
CELLS = 28  # A side at most, on which an attribution is drawn.


def prepared(trained: Trained, images: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, C] -> the network's input, float32 [N, S, S, 3]."""
    scale = trained.scale
    return np.asarray(normalise(jnp.asarray(images), scale.mean, scale.std))


def look(trained: Trained, images: np.ndarray, sites: np.ndarray):
    """Probabilities [N, K] and class maps [N, h, w, K] of prepared images."""
    return _batched(_look, trained, images, np.zeros(len(images)), sites)


def gradcam(
    trained: Trained, images: np.ndarray, labels: np.ndarray, sites: np.ndarray
) -> np.ndarray:
    """Grad-CAM one stage before the last, signed [N, 2h, 2w].

    Args:
      trained: a run.
      images: prepared [N, S, S, 3].
      labels: the classes explained, int [N].
      sites: int [N].
    """
    return _batched(_gradcam, trained, images, labels, sites)


def guided_factorization(
    trained: Trained, images: np.ndarray, labels: np.ndarray, sites: np.ndarray
) -> np.ndarray:
    """Attribution of Gur et al. (2021), its mean over cells [N, g, g]; as `gradcam`."""
    maps, side = _batched(_factorized, trained, images, labels, sites), images.shape[1]
    cells = max(n for n in range(1, min(CELLS, side) + 1) if side % n == 0)
    block = side // cells
    return maps.reshape(-1, cells, block, cells, block).mean((2, 4))


@functools.partial(jax.jit, static_argnums=0)
def _look(model, variables, images, labels, site):
    logits, out = model.apply(variables, images, "eval", site)
    return jax.nn.softmax(logits.astype(jnp.float32)), out.class_maps


@functools.partial(jax.jit, static_argnums=0)
def _gradcam(model, variables, images, labels, site):
    network = saliency.stages(model, variables, "eval", site)
    lower = network.lower(images, site)
    return saliency.gradcam_lower(network.upper_head, lower, labels)


@functools.partial(jax.jit, static_argnums=0)
def _factorized(model, variables, images, labels, site):
    plain = model.clone(lowering="xla", dtype=jnp.float32)
    network = saliency.stages(plain, variables, "eval", site)
    return attribution.guided_factorization(network.logits, images, labels)


def _batched(step: Callable, trained: Trained, images, labels, sites):
    """`step(model, variables, images, labels, site)` of all images, some at a time."""
    if not needs_site(trained.config.model):
        sites = np.zeros_like(sites)  # Those of another data set may be more.
    arrays = (images, labels.astype(np.int32), sites.astype(np.int32))
    parts = []
    for start in range(0, len(images), BATCH):
        rows = np.minimum(np.arange(start, start + BATCH), len(images) - 1)
        filled = [one[rows] for one in arrays]
        parts.append(jax.device_get(step(trained.model, trained.variables, *filled)))
    return jax.tree.map(lambda *xs: np.concatenate(xs)[: len(images)], *parts)
