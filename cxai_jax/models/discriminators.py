"""Networks that tell domains, or generated images from real ones.

All return scores before any sigmoid or softmax.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from cxai_jax.types import Array

# What the published GAN codes start from (Radford et al. 2016).
INIT = nn.initializers.normal(0.02)


class DomainClassifier(nn.Module):
    """A multilayer perceptron on feature vectors.

    Ganin et al. (2016) take one hidden layer of 100 on MNIST, ADDA and CyCADA two of
    500, the light-weight calibrator 1000 and 500 with four groups.

    Attributes:
      widths: of the hidden layers.
      groups: G, domains told apart.
    """

    widths: Sequence[int] = (100,)
    groups: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, D] -> logits float32 [B, groups]."""
        x = x.astype(jnp.float32)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.groups)(x)


class PatchDiscriminator(nn.Module):
    """CycleGAN's PatchGAN (Isola et al. 2017): one score per overlapping patch.

    4x4 convolutions, `layers` of them at stride 2, widths doubling up to 8 times the
    first, leaky ReLU 0.2, instance norm except in the first and last.

    Attributes:
      width: channels of the first layer; 64 as published.
      layers: at stride 2; 3 gives patches of 70 px.
    """

    width: int = 64
    layers: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Images in -1..1 [B, H, W, 3] -> scores [B, h, w, 1]."""

        def conv(x, features, stride):
            pads = ((1, 1), (1, 1))
            return nn.Conv(features, (4, 4), stride, pads, kernel_init=INIT)(x)

        x = nn.leaky_relu(conv(x, self.width, 2), 0.2)
        for layer in range(1, self.layers + 1):
            stride = 2 if layer < self.layers else 1
            x = conv(x, self.width * min(2**layer, 8), stride)
            x = nn.leaky_relu(instance_norm(x), 0.2)
        return conv(x, 1, 1)


class ShuffledPatchDiscriminator(nn.Module):
    """Groups of images by one random patch, its pixels shuffled (Ye et al. 2020).

    What is left of an image is the distribution of its colours, not its content.

    Attributes:
      patch: pixels, side; 4 as published.
      width: of the hidden layer; 128 as published.
      groups: G, groups told apart; 4 as published.
    """

    patch: int = 4
    width: int = 128
    groups: int = 4

    @nn.compact
    def __call__(self, x: Array, key: Array) -> Array:
        """Images [B, H, W, 3] -> logits [B, groups]; `key` draws patches and orders."""
        batch, height, width, channels = x.shape
        key_row, key_column, key_order = jax.random.split(key, 3)
        row = jax.random.randint(key_row, (batch,), 0, height - self.patch + 1)
        column = jax.random.randint(key_column, (batch,), 0, width - self.patch + 1)

        def cut(image, row, column, key):
            size = (self.patch, self.patch, channels)
            patch = jax.lax.dynamic_slice(image, (row, column, 0), size)
            return jax.random.permutation(key, patch.reshape(-1, channels)).reshape(-1)

        keys = jax.random.split(key_order, batch)
        x = nn.Dense(self.width)(jax.vmap(cut)(x, row, column, keys))
        return nn.Dense(self.groups)(nn.leaky_relu(x, 0.2))


class SpectralDiscriminator(nn.Module):
    """DRANet's DCGAN discriminator with spectral norm (Lee et al. 2021).

    Four 4x4 convolutions at stride 2, for MNIST and MNIST-M with 3x3 ones between, and
    a linear layer. The state of the power iteration lies in `batch_stats`.

    Attributes:
      width: channels of the first layer; 32 as published.
      between: a 3x3 convolution after each of the first three.
    """

    width: int = 32
    between: bool = True

    @nn.compact
    def __call__(self, x: Array, update: bool) -> Array:
        """Images in -1..1 [B, H, W, 3] -> scores [B]; `update`: iterate once more."""

        def conv(x, features, kernel, stride):
            pads = ((1, 1), (1, 1))
            layer = nn.Conv(features, (kernel, kernel), stride, pads)
            return nn.relu(nn.SpectralNorm(layer)(x, update_stats=update))

        for stage in range(4):
            x = conv(x, self.width * 2**stage, 4, 2)
            if self.between and stage < 3:
                x = conv(x, self.width * 2**stage, 3, 1)
        return nn.Dense(1)(x.reshape(x.shape[0], -1))[:, 0]


def instance_norm(x: Array, eps: float = 1e-5) -> Array:
    """(x - mean) / sqrt(var + eps) per image and channel, no parameters (Ulyanov 2016).

    Statistics are float32 whatever the type of x [B, H, W, C].
    """
    wide = x.astype(jnp.float32)
    mean = wide.mean((1, 2), keepdims=True)
    var = wide.var((1, 2), keepdims=True)
    return ((wide - mean) * jax.lax.rsqrt(var + eps)).astype(x.dtype)
