"""Networks that turn an image of one domain into one of another.

Images are float32 in -1..1 here, [B, H, W, 3], as tanh makes them.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cxai_jax.models.discriminators import INIT, instance_norm
from cxai_jax.types import Array


class ResNetGenerator(nn.Module):
    """CycleGAN's generator (Zhu et al. 2017, after Johnson et al. 2016).

    7x7 convolution, two 3x3 at stride 2, residual blocks, two transposed 3x3 at stride
    2, 7x7 and tanh; reflected borders, instance norm, ReLU.

    Attributes:
      width: channels of the first layer; CyCADA 64, the calibrator 8.
      blocks: residual blocks; 9 as published.
    """

    width: int = 64
    blocks: int = 9

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, 3] -> [B, H, W, 3] in -1..1; H and W are multiples of 4."""
        x = nn.relu(instance_norm(_reflected(x, self.width, 7)))
        for times in (2, 4):
            pads = ((1, 1), (1, 1))
            layer = nn.Conv(self.width * times, (3, 3), 2, pads, kernel_init=INIT)
            x = nn.relu(instance_norm(layer(x)))
        for _ in range(self.blocks):
            y = nn.relu(instance_norm(_reflected(x, 4 * self.width, 3)))
            x += instance_norm(_reflected(y, 4 * self.width, 3))
        for times in (2, 1):
            layer = nn.ConvTranspose(
                self.width * times, (3, 3), (2, 2), kernel_init=INIT
            )
            x = nn.relu(instance_norm(layer(x)))
        return jnp.tanh(_reflected(x, 3, 7))


class BatchInstanceNorm(nn.Module):
    """rho * batch norm + (1 - rho) * instance norm, then slope and shift per channel.

    Nam and Kim (2018); rho, a parameter per channel that starts at 1, is clipped to
    0..1. Batch statistics always: the generator is not run outside training.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1],)
        rho = jnp.clip(self.param("rho", nn.initializers.ones, shape), 0, 1)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        wide = x.astype(jnp.float32)
        mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
        batch = (wide - mean) * lax.rsqrt(var + 1e-5)
        mixed = rho * batch + (1 - rho) * instance_norm(wide)
        return (mixed * scale + bias).astype(x.dtype)


class ResidualBlock(nn.Module):
    """DRANet's block: two 3x3 convolutions with batch-instance norm, and a shortcut."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        features = x.shape[-1]
        y = nn.Conv(features, (3, 3), use_bias=False)(x)
        y = nn.relu(BatchInstanceNorm()(y))
        y = nn.Conv(features, (3, 3), use_bias=False)(y)
        return x + BatchInstanceNorm()(y)


class Encoder(nn.Module):
    """DRANet's encoder E, shared by all domains (Lee et al. 2021).

    Attributes:
      width: channels inside; twice as many leave. 32 as published.
    """

    width: int = 32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, 3] -> features [B, H/2, W/2, 2 width]."""
        x = nn.Conv(self.width, (4, 4), 2, ((1, 1), (1, 1)))(x)
        x = nn.relu(BatchInstanceNorm()(x))
        x = ResidualBlock()(ResidualBlock()(x))
        return nn.relu(nn.Conv(2 * self.width, (3, 3))(x))


class Separator(nn.Module):
    """DRANet's separator: features = content + style, style = S(features).

    The published code takes the convolutions as the style, the paper's eq. 2 as the
    content up to a scale; this is the code. Content that is to change its domain is
    multiplied by a learnt map per pair of domains, which starts at 1.

    Attributes:
      pairs: names of the translations, such as "source->target".
    """

    pairs: tuple[str, ...]

    @nn.compact
    def __call__(self, features: Array, update: bool) -> tuple[Array, Array, dict]:
        """[B, h, w, C] -> content, style, and the scale [1, h, w, C] of each pair."""
        style = features
        for _ in range(2):
            layer = nn.Conv(features.shape[-1], (3, 3))
            style = nn.relu(nn.SpectralNorm(layer)(style, update_stats=update))
        scales = {
            pair: self.param(f"scale {pair}", nn.initializers.ones, features.shape[1:])
            for pair in self.pairs
        }
        return features - style, style, scales


class Generator(nn.Module):
    """DRANet's generator G: content plus style -> image.

    Attributes:
      width: channels inside; 32 as published.
    """

    width: int = 32

    @nn.compact
    def __call__(self, features: Array, update: bool) -> Array:
        """[B, h, w, C] -> [B, 2h, 2w, 3] in -1..1; `update`: power iteration."""
        layer = nn.ConvTranspose(self.width, (3, 3))
        x = nn.relu(nn.SpectralNorm(layer)(features, update_stats=update))
        x = ResidualBlock()(ResidualBlock()(x))
        layer = nn.ConvTranspose(3, (4, 4), (2, 2))
        return jnp.tanh(nn.SpectralNorm(layer)(x, update_stats=update))


def _reflected(x: Array, features: int, kernel: int) -> Array:
    """A convolution inside a compact module, its border reflected."""
    rim = kernel // 2
    x = jnp.pad(x, ((0, 0), (rim, rim), (rim, rim), (0, 0)), mode="reflect")
    return nn.Conv(features, (kernel, kernel), padding="VALID", kernel_init=INIT)(x)
