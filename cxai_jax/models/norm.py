"""Batch norm with the three modes of `types.py`, alone or behind a convolution.

"train" and "explain" compute the same forward pass, operation for operation, so that
XLA merges the two when a step needs both; only their gradients differ. In "eval" the
norm of a `ConvNorm` is folded into the kernel inside the graph: a multiplication of
the small kernel instead of one of the large activation, and no second set of weights.

A norm is a constructor, `norm(features, eps, lowering, name=...)`, that a backbone has
as its field and hands to its parts; `NORMS` has them by the name in config.model.norm.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cxai_jax.models.lowering import (
    Lowering,
    Padding,
    batch_norm,
    conv,
    moments,
    normalise,
)
from cxai_jax.types import Array, Mode

MOMENTUM = 0.9  # Share of the old running statistics kept per step.


class BatchNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) * scale + bias` per channel (Ioffe, Szegedy 2015).

    Statistics and arithmetic are float32 whatever the type of `x`. The running
    variance is the unbiased one, as in torch; Flax keeps the biased one.

    Attributes:
      features: C.
      eps: added to the variance.
      lowering: "auto", "xla" or "tuned".
    """

    features: int
    eps: float = 1e-5
    lowering: Lowering = "auto"

    def setup(self) -> None:
        shape = (self.features,)
        self.scale = self.param("scale", nn.initializers.ones, shape)
        self.bias = self.param("bias", nn.initializers.zeros, shape)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        self.var = self.variable("batch_stats", "var", jnp.ones, shape)

    def folded(self) -> tuple[Array, Array]:
        """Slope and shift [C] of the eval form, `norm(x) = slope x + shift`."""
        slope = self.scale * lax.rsqrt(self.var.value + self.eps)
        return slope, self.bias - self.mean.value * slope

    def __call__(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        """Normalises x [B, H, W, C]; updates the statistics in mode "train" alone.

        `site` changes nothing: the norm is the same for every site.

        Raises:
          ValueError: unknown mode.
        """
        if mode == "eval":
            slope, shift = self.folded()
            return (x * slope + shift).astype(x.dtype)
        if mode == "explain":
            mean, var = moments(lax.stop_gradient(x), lowering=self.lowering)
            return normalise(x, mean, var, self.scale, self.bias, eps=self.eps)
        if mode != "train":
            raise ValueError(f"mode is {mode!r}; use train, explain or eval")
        y, mean, var = batch_norm(
            x, self.scale, self.bias, eps=self.eps, lowering=self.lowering
        )
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            count = x.size // x.shape[-1]
            unbiased = var * (count / max(count - 1, 1))
            self.mean.value = MOMENTUM * self.mean.value + (1 - MOMENTUM) * mean
            self.var.value = MOMENTUM * self.var.value + (1 - MOMENTUM) * unbiased
        return y


def check_site(site: Array | None, x: Array, num_sites: int) -> None:
    """Raises ValueError unless `site` is one for each row of x."""
    if site is None:
        raise ValueError(
            "this network has parts of its own for every site: pass site, int32 [B] in "
            f"0..{num_sites - 1}, beside mode"
        )
    if site.shape != x.shape[:1]:
        raise ValueError(f"site has shape {site.shape}, expected {x.shape[:1]}")


class PerSiteBatchNorm(nn.Module):
    """A `BatchNorm` for every site: each normalises the rows of its own site alone.

    Scale, bias and statistics are [S, C] (Wang et al. 2020b). The batch is never split:
    a sum over a site is one over the whole batch with weights 0 and 1, so that shapes
    do not depend on who is in it.

    A site without a row in the batch keeps its running statistics. Rows and pixels
    count together, so one row of H x W pixels has a variance; of one single value, one
    row of one pixel, it is 0, and so is what enters the running one.

    Attributes:
      features, eps, lowering: as in `BatchNorm`; there is one lowering.
      num_sites: S.
    """

    features: int
    eps: float = 1e-5
    lowering: Lowering = "auto"
    num_sites: int = 1

    def setup(self) -> None:
        shape = (self.num_sites, self.features)
        self.scale = self.param("scale", nn.initializers.ones, shape)
        self.bias = self.param("bias", nn.initializers.zeros, shape)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        self.var = self.variable("batch_stats", "var", jnp.ones, shape)

    def __call__(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        """Normalises each row of x [B, H, W, C] by its `site`, int32 [B] in 0..S-1.

        Raises:
          ValueError: unknown mode, no site, or not one for each row.
        """
        check_site(site, x, self.num_sites)
        if mode not in ("train", "explain", "eval"):
            raise ValueError(f"mode is {mode!r}; use train, explain or eval")
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # [B, S]. A product with it, not an index: the gradient of an index is a
        # scatter, which has no deterministic form on GPUs.
        own = jax.nn.one_hot(site, self.num_sites, dtype=wide.dtype)

        def of_rows(table: Array) -> Array:
            """What each row has in a table [S, C]: [B, 1, 1, C]."""
            return _einsum("bs,sc->bc", own, table)[:, None, None]

        if mode == "eval":
            mean, var = self.mean.value, self.var.value
        else:
            source = lax.stop_gradient(wide) if mode == "explain" else wide
            count = own.sum(0)[:, None] * (x.shape[1] * x.shape[2])  # [S, 1]

            def averages(values: Array) -> Array:
                """Means over the rows and pixels of each site: [S, C]."""
                sums = _einsum("bs,bc->sc", own, values.sum((1, 2)))
                return sums / jnp.maximum(count, 1)

            mean = averages(source)
            var = averages((source - of_rows(mean)) ** 2)
            if mode == "train":
                self._update(mean, var, count)
        slope = lax.rsqrt(var + self.eps) * self.scale
        y = (wide - of_rows(mean)) * of_rows(slope) + of_rows(self.bias)
        return y.astype(x.dtype)

    def _update(self, mean: Array, var: Array, count: Array) -> None:
        if not self.is_mutable_collection("batch_stats") or self.is_initializing():
            return
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            moved = MOMENTUM * running.value + (1 - MOMENTUM) * new
            running.value = jnp.where(count > 0, moved, running.value)


# Full float32: the default on GPUs and TPUs rounds the factors to fewer bits.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

# Name in config.model.norm -> function of the number of sites that gives the norm.
NORMS: dict[str, Callable[[int], Callable[..., nn.Module]]] = {
    "plain": lambda num_sites: BatchNorm,
    "per_site": lambda num_sites: functools.partial(
        PerSiteBatchNorm, num_sites=num_sites
    ),
}


class Conv(nn.Module):
    """A convolution with no norm behind it and "SAME" padding.

    Attributes:
      bias: whether it has one.
      The others are those of `ConvNorm`.
    """

    features: int
    kernel: int
    stride: int = 1
    depthwise: bool = False
    bias: bool = False
    dtype: jnp.dtype = jnp.float32
    lowering: Lowering = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H', W', features] in `dtype`."""
        y = conv(
            x.astype(self.dtype),
            _kernel(self, x.shape[-1]).astype(self.dtype),
            stride=self.stride,
            lowering=self.lowering,
        )
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + bias.astype(self.dtype)


class ConvNorm(nn.Module):
    """A convolution without bias and its batch norm.

    Attributes:
      features: output channels.
      kernel: side of the window.
      stride: step in rows and columns.
      padding: zeros on each side, or "SAME".
      depthwise: one window per channel; `features` must equal the input's channels.
      eps: of the norm.
      dtype: type of the convolution; parameters are float32.
      lowering: "auto", "xla" or "tuned".
      norm: its constructor, of NORMS.
      adapter: constructor of what each site adds before the norm, of
        adapters.ADAPTERS; None adds nothing.
    """

    features: int
    kernel: int
    stride: int = 1
    padding: Padding = "SAME"
    depthwise: bool = False
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    lowering: Lowering = "auto"
    norm: Callable[..., nn.Module] = BatchNorm
    adapter: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        """[B, H, W, C] -> [B, H', W', features] in `dtype`."""
        x = x.astype(self.dtype)
        kernel = _kernel(self, x.shape[-1])
        norm = self.norm(self.features, self.eps, self.lowering, name="norm")

        def convolve(kernel: Array) -> Array:
            return conv(
                x,
                kernel.astype(self.dtype),
                stride=self.stride,
                padding=self.padding,
                lowering=self.lowering,
            )

        # What differs from row to row cannot be folded into the one kernel.
        if mode == "eval" and isinstance(norm, BatchNorm) and not self.adapter:
            slope, shift = norm.folded()
            return convolve(kernel * slope) + shift.astype(self.dtype)
        y = convolve(kernel)
        if self.adapter:
            y = self.adapter(self.stride, name="adapter")(x, y, mode, site)
        return norm(y, mode, site)


def _kernel(module: Conv | ConvNorm, channels: int) -> Array:
    """The parameter [k, k, fan-in, features] of a module that reads `channels`."""
    k, features = module.kernel, module.features
    fan_in, fan_out = (1, 1) if module.depthwise else (channels, features)
    # He et al. (2015), by the fan-out: what torchvision and TF start from.
    init = nn.initializers.normal((2 / (k * k * fan_out)) ** 0.5)
    return module.param("kernel", init, (k, k, fan_in, features))
