"""EfficientNet-Lite0 (Tan and Le 2019, Lite variant 2020): no squeeze-excite, ReLU6.

TensorFlow's conventions: SAME padding, batch norm epsilon 1e-3, input (x - 127) / 128.
Dropout and drop-connect of the original training are left out, so that a forward pass
is a function of its input alone.
"""

import jax
from flax import linen as nn

from cxai_jax.models.backbone import Backbone
from cxai_jax.models.lowering import Lowering
from cxai_jax.models.norm import ConvNorm
from cxai_jax.types import Array, Mode

MEAN, STD = (127.0,) * 3, (128.0,) * 3
EPS = 1e-3
# (side of the depthwise window, stride, expansion, width, blocks) of each stage.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
LOWER_STAGES = 5  # The stages before the last stride.


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise, linear 1x1 projection.

    Attributes:
      k: side of the depthwise window.
      stride: of the depthwise convolution.
      expansion: factor of the inner width; 1 leaves the expansion out.
      width: output channels.
      dtype, lowering: as in `Backbone`.
    """

    k: int
    stride: int
    expansion: int
    width: int
    dtype: type
    lowering: Lowering

    @nn.compact
    def __call__(self, x: Array, mode: Mode) -> Array:
        common = {"eps": EPS, "dtype": self.dtype, "lowering": self.lowering}
        inner, y = self.expansion * x.shape[-1], x
        if self.expansion > 1:
            y = jax.nn.relu6(ConvNorm(inner, 1, name="expand", **common)(y, mode))
        y = ConvNorm(
            inner, self.k, self.stride, depthwise=True, name="depthwise", **common
        )(y, mode)
        y = ConvNorm(self.width, 1, name="project", **common)(jax.nn.relu6(y), mode)
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(Backbone):
    """Stride 32; `lower` ends before the last stride, `features` after the top conv."""

    def setup(self) -> None:
        super().setup()
        common = {"dtype": self.dtype, "lowering": self.lowering}
        block = self.rematerialised(Block)
        self.stem = ConvNorm(32, 3, 2, eps=EPS, name="stem", **common)
        self.stages = [
            [
                block(
                    k,
                    stride if j == 0 else 1,
                    expansion,
                    width,
                    name=f"stage{i}_{j}",
                    **common,
                )
                for j in range(blocks)
            ]
            for i, (k, stride, expansion, width, blocks) in enumerate(STAGES)
        ]
        self.last = ConvNorm(1280, 1, eps=EPS, name="last", **common)

    def lower(self, x: Array, mode: Mode) -> Array:
        x = jax.nn.relu6(self.stem(x, mode))
        for stage in self.stages[:LOWER_STAGES]:
            for block in stage:
                x = block(x, mode)
        return x

    def upper(self, lower: Array, mode: Mode) -> Array:
        x = lower
        for stage in self.stages[LOWER_STAGES:]:
            for block in stage:
                x = block(x, mode)
        return jax.nn.relu6(self.last(x, mode))
