"""The saliency maps of a network, from its stages as plain functions.

Two uses. The maps of `signed_maps` go through the alignment loss and are therefore
differentiable in the parameters: CAM in closed form, Grad-CAM one stage before the
last, and the input gradient (nested `jax.grad`: reverse over reverse). The
held-out explainers, occlusion and integrated gradients, only measure.

By default a *centred* logit is explained: adding one vector to every class column of
the head changes no probability but shifts every map of the raw logit. Grey images
become three channels inside the functions given, never before them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cxai_jax.types import Array, Mode, Outputs, PyTree

MAPS = ("cam", "gradcam_lower", "input_gradient")
TARGETS = ("centred", "logit")
FORMS = ("gradcam", "hires")
ALPHA_GRADS = ("full", "stop")


class Explained(NamedTuple):
    """A network as three functions of arrays, and whose images it is given.

    In `explain` mode the batch statistics carry no gradient, so the gradient of a sum
    of scores is the gradient of each image's own score, and its forward is the training
    forward, which XLA therefore computes once.
    """

    lower: Callable[..., Array]  # images [B, H, W, C], site -> A3 [B, 2h, 2w, D3]
    upper: Callable[..., Array]  # A3, site -> F [B, h, w, D]
    head: Callable[..., Array]  # F, site -> logits [B, K]
    site: Array | None = None  # int32 [B], for a network with parts of each site.

    def upper_head(self, lower: Array) -> Array:
        return self.head(self.upper(lower, self.site), self.site)

    def logits(self, images: Array) -> Array:
        return self.upper_head(self.lower(images, self.site))

    def every_kth(self, k: int) -> "Explained":
        """The same network for images 0, k, 2k, ... of the batch."""
        return self._replace(
            site=None if self.site is None else every_kth(self.site, k)
        )


def stages(
    model: nn.Module, variables: PyTree, mode: Mode, site: Array | None = None
) -> Explained:
    """The stages of a backbone as functions of arrays.

    Args:
      model: a backbone of `cxai_jax.models`.
      variables: params and batch_stats.
      mode: "explain" in training, "eval" for a trained network.
      site: int32 [B], for a network with parts of each site.
    """

    def stage(method):
        return lambda x, site: model.apply(variables, x, mode, site, method=method)

    return Explained(
        lower=stage("lower"),
        upper=stage("upper"),
        head=stage("head"),
        site=site,
    )


def signed_maps(
    names: Sequence[str],
    network: Explained,
    images: Array,
    outputs: Outputs,
    labels: Array,
    *,
    target: str = "centred",
    form: str = "gradcam",
    alpha_grad: str = "full",
    input_grad_fraction: float = 1.0,
) -> list[Array]:
    """The signed maps named in config.align.maps, in that order.

    Args:
      names: of "cam", "gradcam_lower", "input_gradient".
      network: the stages in `explain` mode.
      images: normalised images [B, H, W, C], float.
      outputs: of the training forward of these images.
      labels: class to explain, int [B].
      target, form, alpha_grad: see `explained` and `gradcam_lower`.
      input_grad_fraction: 1/k; the input gradient is taken of images 0, k, 2k, ...
        only (their forward is then a second one, with batch statistics of its own).

    Returns:
      One float32 [B, *, *] per name, or [B/k, *, *] for the input gradient.

    Raises:
      ValueError: an unknown name, a backbone without a lower stage, or a fraction
        that is not one over a divisor of the batch.
    """
    every = round(1 / input_grad_fraction) if 0 < input_grad_fraction <= 1 else 0
    if abs(every * input_grad_fraction - 1) > 1e-2:
        raise ValueError(
            f"input_grad_fraction must be 1, 1/2, 1/3, ..., got {input_grad_fraction}"
        )
    if "gradcam_lower" in names and outputs.lower is None:
        raise ValueError(
            "gradcam_lower needs the stage before the last, and this backbone gives "
            "none (Outputs.lower is None); leave it out of config.align.maps"
        )
    table = {
        "cam": lambda: class_map(outputs.class_maps, labels, target=target),
        "gradcam_lower": lambda: gradcam_lower(
            network.upper_head,
            outputs.lower,
            labels,
            target=target,
            form=form,
            alpha_grad=alpha_grad,
        ),
        "input_gradient": lambda: input_gradient(
            network.every_kth(every).logits,
            every_kth(images, every),
            every_kth(labels, every),
            target=target,
        ),
    }
    unknown = [name for name in names if name not in table]
    if unknown:
        raise ValueError(f"unknown maps {unknown}; known: {sorted(table)}")
    return [table[name]() for name in names]


def explained(values: Array, labels: Array, *, target: str = "centred") -> Array:
    """The quantity that a map explains, of logits or of class maps.

    "centred": y_c - mean_k y_k, unmoved by what is added to every class alike (the
    cure of DiffGradCAM, 2025). "logit": y_c, as in Grad-CAM (Selvaraju et al. 2017).

    Args:
      values: [B, ..., K], K >= 2.
      labels: class c of each image, int [B].
      target: "centred" or "logit".

    Returns:
      [B, ...], at least float32.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known: {list(TARGETS)}")
    if values.ndim < 2 or values.shape[-1] < 2:
        raise ValueError(
            f"expected [B, ..., K] with K >= 2 classes, got shape {values.shape}"
        )
    values = _at_least_float32(values)
    index = labels.reshape(-1, *(1,) * (values.ndim - 1))
    chosen = jnp.take_along_axis(values, index, axis=-1)[..., 0]
    return chosen - values.mean(axis=-1) if target == "centred" else chosen


def every_kth(x: Array, k: int) -> Array:
    """Rows 0, k, 2k, ... of [B, ...] as [B/k, ...], local to each device's shard."""
    if x.shape[0] % k:
        raise ValueError(f"a batch of {x.shape[0]} images has no {k} equal parts")
    return x.reshape(x.shape[0] // k, k, *x.shape[1:])[:, 0]


def class_map(class_maps: Array, labels: Array, *, target: str = "centred") -> Array:
    """CAM (Zhou et al. 2016), in closed form: the head applied to the un-pooled map.

    For pooling and a linear head this is Grad-CAM of the last stage times h w, so the
    two are one map, not two.

    Args:
      class_maps: signed evidence per cell and class [B, h, w, K], without the bias.
      labels: class to explain, int [B].
      target: see `explained`.

    Returns:
      Signed map [B, h, w]; its spatial mean plus the (centred) bias is the target.
    """
    return explained(class_maps, labels, target=target)


def gradcam_lower(
    upper_head: Callable[[Array], Array],
    lower: Array,
    labels: Array,
    *,
    target: str = "centred",
    form: str = "gradcam",
    alpha_grad: str = "full",
) -> Array:
    """Grad-CAM at the stage before the last: S = sum_d alpha_d A3_d, signed.

    alpha_d = mean_u dt/dA3_d(u) (Selvaraju et al. 2017), or alpha_d(u) = dt/dA3_d(u)
    without the mean, which keeps locations (HiResCAM, Draelos & Carin 2020).

    Args:
      upper_head: A3 -> logits [B, K], in `explain` mode.
      lower: A3 [B, 2h, 2w, D3].
      labels: class to explain, int [B].
      target: see `explained`.
      form: "gradcam" or "hires".
      alpha_grad: "full" differentiates through alpha (second order); "stop" takes it
        as constant, as hook-based training code does.

    Returns:
      Signed map [B, 2h, 2w], before any ReLU, at least float32.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; known: {list(FORMS)}")
    if alpha_grad not in ALPHA_GRADS:
        raise ValueError(
            f"unknown alpha_grad {alpha_grad!r}; known: {list(ALPHA_GRADS)}"
        )

    def score(lower):
        return explained(upper_head(lower), labels, target=target).sum()

    alpha = _at_least_float32(jax.grad(score)(lower))
    if alpha_grad == "stop":
        alpha = jax.lax.stop_gradient(alpha)
    if form == "gradcam":
        alpha = alpha.mean(axis=(1, 2), keepdims=True)
    return (alpha * _at_least_float32(lower)).sum(axis=-1)


def input_gradient(
    apply: Callable[[Array], Array],
    images: Array,
    labels: Array,
    *,
    target: str = "centred",
) -> Array:
    """|dt/dx|, L2 over channels: sqrt(sum_c g_c^2 + 1e-20) (Simonyan et al. 2014).

    Not times the input: the background of an X-ray is near zero, and the product would
    hide attributions at the border, the very thing to expose.

    Args:
      apply: images -> logits [B, K], in `explain` mode.
      images: normalised images [B, H, W, C], float.
      labels: class to explain, int [B].
      target: see `explained`.

    Returns:
      Map [B, H, W] >= 0, at least float32.
    """
    gradient = _gradient(apply, images, labels, target)
    # The root of zero has no gradient: 1e-20 keeps that of a dead pixel finite.
    return jnp.sqrt(jnp.square(gradient).sum(axis=-1) + 1e-20)


def occlusion(
    apply: Callable[[Array], Array],
    images: Array,
    labels: Array,
    *,
    grid: int,
    fill: float = 0.0,
    target: str = "centred",
    chunk: int = 1,
) -> Array:
    """Drop of the target when one cell is covered (Zeiler & Fergus 2014).

    S(u) = t(x) - t(x with cell u filled). No gradient and no feature map: the held-out
    explainer of trained maps. Deviation: the cells tile the image, without overlap.

    Args:
      apply: images -> logits [B, K], in `eval` mode.
      images: normalised images [B, H, W, C], sides multiples of `grid`.
      labels: class to explain, int [B].
      grid: cells per side.
      fill: value of a covered pixel; 0 is the mean of normalised images.
      target: see `explained`.
      chunk: cells per forward pass, each of B images: bounds memory.

    Returns:
      Signed map [B, grid, grid].
    """
    _, height, width, _ = images.shape
    if height % grid or width % grid:
        raise ValueError(
            f"images of {height} x {width} do not divide into {grid} x {grid} cells"
        )
    rows = jnp.arange(height) // (height // grid)
    columns = jnp.arange(width) // (width // grid)
    cells = rows[:, None] * grid + columns[None, :]

    def covered(cell):
        hole = (cells == cell)[None, :, :, None]
        x = jnp.where(hole, jnp.asarray(fill, images.dtype), images)
        return explained(apply(x), labels, target=target)

    scores = jax.lax.map(covered, jnp.arange(grid * grid), batch_size=chunk)
    drop = explained(apply(images), labels, target=target)[:, None] - scores.T
    return drop.reshape(-1, grid, grid)


def integrated_gradients(
    apply: Callable[[Array], Array],
    images: Array,
    labels: Array,
    *,
    steps: int = 20,
    baseline: float = 0.0,
    target: str = "centred",
) -> Array:
    """(x - x0) . mean of dt/dx on the way from x0 to x (Sundararajan et al. 2017).

    Midpoint rule; the map sums to t(x) - t(x0) as `steps` grows. A held-out explainer.

    Args:
      apply: images -> logits [B, K], in `eval` mode.
      images: normalised images [B, H, W, C], float.
      labels: class to explain, int [B].
      steps: gradients along the way, computed one after the other.
      baseline: value of every pixel of x0; 0 is the mean of normalised images.
      target: see `explained`.

    Returns:
      Signed map [B, H, W], summed over channels.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    path = images - baseline

    def add(total, share):
        gradient = _gradient(apply, baseline + share * path, labels, target)
        return total + gradient, None

    shares = ((jnp.arange(steps) + 0.5) / steps).astype(images.dtype)
    total = jnp.zeros(images.shape, jnp.promote_types(images.dtype, jnp.float32))
    total, _ = jax.lax.scan(add, total, shares)
    return (total / steps * path).sum(axis=-1)


def _gradient(apply, images, labels, target):
    """dt/dx [B, H, W, C] of each image's own target, at least float32."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"a gradient needs normalised float images, got {images.dtype}"
        )

    def score(images):
        return explained(apply(images), labels, target=target).sum()

    return _at_least_float32(jax.grad(score)(images))


def _at_least_float32(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
