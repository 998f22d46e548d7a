"""LeNet for digits, with batch norm: two 5x5 convolutions, pooled, and one 3x3.

After LeCun et al. (1998) and the digit networks of Ganin et al. (2016) and Hoffman et
al. (2018). A head on the pooled last map, as class maps need it, takes the place of
their fully connected layers: a third convolution of 128 channels stands for them.
32-pixel images give an 8x8 grid and a 16x16 one below it.
"""

from flax import linen as nn

from cxai_jax.models.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone
from cxai_jax.models.lowering import max_pool
from cxai_jax.models.norm import ConvNorm
from cxai_jax.types import Array, Mode

MEAN, STD = IMAGENET_MEAN, IMAGENET_STD


class LeNet(Backbone):
    """20, 50 and 128 channels, stride 4 in all; 86,000 parameters."""

    def setup(self) -> None:
        super().setup()
        block = self.rematerialised(ConvNorm)
        common = {"dtype": self.dtype, "lowering": self.lowering}
        self.conv1 = block(20, 5, 1, name="conv1", **common)
        self.conv2 = block(50, 5, 1, name="conv2", **common)
        self.conv3 = block(128, 3, 1, name="conv3", **common)

    def lower(self, x: Array, mode: Mode) -> Array:
        x = max_pool(nn.relu(self.conv1(x, mode)), lowering=self.lowering)
        return nn.relu(self.conv2(x, mode))

    def upper(self, lower: Array, mode: Mode) -> Array:
        lower = max_pool(lower, lowering=self.lowering)
        return nn.relu(self.conv3(lower, mode))
