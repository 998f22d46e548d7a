"""Batch norm with the three modes of `types.py`, alone or behind a convolution.

"train" and "explain" compute the same forward pass, operation for operation, so that
XLA merges the two when a step needs both; only their gradients differ. In "eval" the
norm of a `ConvNorm` is folded into the kernel inside the graph: a multiplication of
the small kernel instead of one of the large activation, and no second set of weights.
"""

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

    def __call__(self, x: Array, mode: Mode) -> Array:
        """Normalises x [B, H, W, C]; updates the statistics in mode "train" alone.

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


class ConvNorm(nn.Module):
    """A convolution without bias and its batch norm.

    Attributes:
      features: output channels.
      kernel: side of the window.
      stride: step in rows and columns.
      padding: zeros on each side, or "SAME".
      depthwise: one window per channel; `features` must equal the input's channels.
      eps: of the batch norm.
      dtype: type of the convolution; parameters are float32.
      lowering: "auto", "xla" or "tuned".
    """

    features: int
    kernel: int
    stride: int = 1
    padding: Padding = "SAME"
    depthwise: bool = False
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    lowering: Lowering = "auto"

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        """[B, H, W, C] -> [B, H', W', features] in `dtype`."""
        k, channels = self.kernel, x.shape[-1]
        fan_in, fan_out = (1, 1) if self.depthwise else (channels, self.features)
        # He et al. (2015), by the fan-out: what torchvision and TF start from.
        init = nn.initializers.normal((2 / (k * k * fan_out)) ** 0.5)
        kernel = self.param("kernel", init, (k, k, fan_in, self.features))
        norm = BatchNorm(self.features, self.eps, self.lowering, name="norm")

        def convolve(kernel: Array) -> Array:
            return conv(
                x.astype(self.dtype),
                kernel.astype(self.dtype),
                stride=self.stride,
                padding=self.padding,
                lowering=self.lowering,
            )

        if mode == "eval":
            slope, shift = norm.folded()
            return convolve(kernel * slope) + shift.astype(self.dtype)
        return norm(convolve(kernel), mode)
