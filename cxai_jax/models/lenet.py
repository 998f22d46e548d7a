"""LeNet for digits: two 5x5 convolutions of 20 and 50 channels and one 3x3.

After LeCun et al. (1998), with the widths that CyCADA's digit networks have. Strides
take the place of pooling, batch norm is added, and the head on the pooled last map,
which class maps need, that of the fully connected layers.
32-pixel images give an 8x8 grid (stride 4) and a 16x16 one below it.
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


class LeNet(Backbone):
    """Three convolutions, each with batch norm and ReLU; 56,000 parameters."""

    def setup(self) -> None:
        super().setup()
        block, common = self.rematerialised(ConvNorm), self.shared()
        self.conv1 = block(20, 5, 2, padding=2, name="conv1", **common)
        self.conv2 = block(50, 5, 2, padding=2, name="conv2", **common)
        self.conv3 = block(64, 3, 1, padding=1, name="conv3", **common)

    def lower(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        return nn.relu(self.conv1(x, mode, site))

    def upper(self, lower: Array, mode: Mode, site: Array | None = None) -> Array:
        x = nn.relu(self.conv2(lower, mode, site))
        return nn.relu(self.conv3(x, mode, site))


SPEC = BackboneSpec(LeNet, IMAGENET_MEAN, IMAGENET_STD, golden=120_568)
