"""EfficientNet-Lite0 (Tan and Le 2019, Lite variant 2020): no squeeze-excite, ReLU6.

TensorFlow's conventions: SAME padding, batch norm epsilon 1e-3, input (x - 127) / 128.
Dropout and drop-connect of the original training are left out, so that a forward pass
is a function of its input alone.
"""

import re
from collections.abc import Callable

import jax
from flax import linen as nn

from cxai_jax.models.backbone import Backbone, BackboneSpec
from cxai_jax.models.lowering import Lowering
from cxai_jax.models.norm import ConvNorm
from cxai_jax.types import Array, Mode

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
# Its blocks in the flat numbering of the PyTorch port.
_FLAT = [
    f"stage{i}_{j}" for i, (*_, blocks) in enumerate(STAGES) for j in range(blocks)
]


def _flat_block(layers: dict[str, str]) -> Callable[[re.Match], str]:
    return lambda m: f"{_FLAT[int(m[1])]}/{layers[m[2]]}"


RULES = (
    # The PyTorch port behind lite0-imagenet.
    (r"_conv_stem", r"stem"),
    (r"_bn0", r"stem/norm"),
    (
        r"_blocks\.(\d|1[0-5])\._(expand|depthwise|project)_conv",
        _flat_block({n: n for n in ("expand", "depthwise", "project")}),
    ),
    (
        r"_blocks\.(\d|1[0-5])\._(bn[012])",
        _flat_block(
            {"bn0": "expand/norm", "bn1": "depthwise/norm", "bn2": "project/norm"}
        ),
    ),
    (r"_conv_head", r"last"),
    (r"_bn1", r"last/norm"),
    (r"_fc", r"head"),
    # timm: the first stage has no expansion, which shifts its names.
    (r"conv_stem", r"stem"),
    (r"bn1", r"stem/norm"),
    (r"blocks\.0\.0\.conv_dw", r"stage0_0/depthwise"),
    (r"blocks\.0\.0\.bn1", r"stage0_0/depthwise/norm"),
    (r"blocks\.0\.0\.conv_pw", r"stage0_0/project"),
    (r"blocks\.0\.0\.bn2", r"stage0_0/project/norm"),
    (r"blocks\.(\d)\.(\d)\.conv_pw", r"stage\1_\2/expand"),
    (r"blocks\.(\d)\.(\d)\.bn1", r"stage\1_\2/expand/norm"),
    (r"blocks\.(\d)\.(\d)\.conv_dw", r"stage\1_\2/depthwise"),
    (r"blocks\.(\d)\.(\d)\.bn2", r"stage\1_\2/depthwise/norm"),
    (r"blocks\.(\d)\.(\d)\.conv_pwl", r"stage\1_\2/project"),
    (r"blocks\.(\d)\.(\d)\.bn3", r"stage\1_\2/project/norm"),
    (r"conv_head", r"last"),
    (r"bn2", r"last/norm"),
    (r"classifier", r"head"),
)


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise, linear 1x1 projection.

    Attributes:
      k: side of the depthwise window.
      stride: of the depthwise convolution.
      expansion: factor of the inner width; 1 leaves the expansion out.
      width: output channels.
      dtype, lowering, norm: as in `Backbone`.
    """

    k: int
    stride: int
    expansion: int
    width: int
    dtype: type
    lowering: Lowering
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        common = {
            "eps": EPS,
            "dtype": self.dtype,
            "lowering": self.lowering,
            "norm": self.norm,
        }
        inner, y = self.expansion * x.shape[-1], x
        if self.expansion > 1:
            y = jax.nn.relu6(ConvNorm(inner, 1, name="expand", **common)(y, mode, site))
        y = ConvNorm(
            inner, self.k, self.stride, depthwise=True, name="depthwise", **common
        )(y, mode, site)
        y = ConvNorm(self.width, 1, name="project", **common)(
            jax.nn.relu6(y), mode, site
        )
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(Backbone):
    """Stride 32; `lower` ends before the last stride, `features` after the top conv."""

    def setup(self) -> None:
        super().setup()
        common = self.shared()
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

    def lower(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        x = jax.nn.relu6(self.stem(x, mode, site))
        for stage in self.stages[:LOWER_STAGES]:
            for block in stage:
                x = block(x, mode, site)
        return x

    def upper(self, lower: Array, mode: Mode, site: Array | None = None) -> Array:
        x = lower
        for stage in self.stages[LOWER_STAGES:]:
            for block in stage:
                x = block(x, mode, site)
        return jax.nn.relu6(self.last(x, mode, site))


SPEC = BackboneSpec(
    EfficientNetLite0, (127.0,) * 3, (128.0,) * 3, golden=4_652_008, rules=RULES
)
