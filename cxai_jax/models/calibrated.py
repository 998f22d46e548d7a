"""The light-weight calibrator (Ye et al. 2020) in front of a backbone.

    x' = clip(x + clip((G(x) + 1) / 2, 0, 0.4), -1, 1)

on images in -1..1: a small generator adds what makes images of another domain look like
those that the backbone has learnt, and the backbone stays as it is.
"""

import jax.numpy as jnp
from flax import linen as nn

from cxai_jax.models.backbone import Backbone
from cxai_jax.models.generators import ResNetGenerator
from cxai_jax.types import Array, Mode, Outputs

LIMIT = 0.4  # The most that is added, of the range -1..1, as published.


class Calibrated(Backbone):
    """A backbone that sees calibrated images; its maps are those of the backbone.

    Attributes:
      network: the backbone.
      width: channels of the first layer of G; 8 as published.
      mean, std: input normalisation of the backbone, gray levels 0..255.
    """

    network: nn.Module = None
    width: int = 8
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def setup(self) -> None:
        self.calibrator = ResNetGenerator(self.width)

    def calibrate(self, pictures: Array) -> Array:
        """Images in -1..1 [B, H, W, 3] -> the same, calibrated."""
        added = jnp.clip((self.calibrator(pictures) + 1) / 2, 0, LIMIT)
        return jnp.clip(pictures + added, -1, 1)

    def calibrated(self, x: Array) -> Array:
        """Images as the backbone takes them -> the same, calibrated."""
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        pictures = self.calibrate((x * std + mean) / 127.5 - 1)
        return ((pictures + 1) * 127.5 - mean) / std

    def lower(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        return self.network.lower(self.calibrated(x), mode, site)

    def upper(self, lower: Array, mode: Mode, site: Array | None = None) -> Array:
        return self.network.upper(lower, mode, site)

    def head(self, features: Array, mode: Mode, site: Array | None = None) -> Array:
        return self.network.head(features, mode, site)

    def project(self, features: Array, mode: Mode, site: Array | None = None) -> Array:
        return self.network.project(features, mode, site)

    def __call__(
        self, x: Array, mode: Mode, site: Array | None = None
    ) -> tuple[Array, Outputs]:
        return self.network(self.calibrated(x), mode, site)
