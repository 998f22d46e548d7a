"""A four-stage network for demonstrations and tests; no paper, no weights.

64-pixel images give an 8x8 grid (stride 8) and a 16x16 one below it.
"""

from flax import linen as nn

from cxai_jax.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BackboneSpec,
)
from cxai_jax.models.norm import ConvNorm
from cxai_jax.types import Array, Mode

STAGES = ((16, 2), (32, 2), (48, 1), (64, 2))  # (width, stride)


class Tiny(Backbone):
    """Four 3x3 convolutions, each with batch norm and ReLU; 47,000 parameters."""

    def setup(self) -> None:
        super().setup()
        block = self.rematerialised(ConvNorm)
        self.stages = [
            block(
                width,
                3,
                stride,
                padding=1,
                name=f"stage{index}",
                **self.shared(),
            )
            for index, (width, stride) in enumerate(STAGES, 1)
        ]

    def lower(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        for stage in self.stages[:-1]:
            x = nn.relu(stage(x, mode, site))
        return x

    def upper(self, lower: Array, mode: Mode, site: Array | None = None) -> Array:
        return nn.relu(self.stages[-1](lower, mode, site))


SPEC = BackboneSpec(Tiny, IMAGENET_MEAN, IMAGENET_STD, golden=111_832)
