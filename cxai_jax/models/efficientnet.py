"""EfficientNet-B0 and the Lite networks (Tan and Le 2019; Lite: 2020).

Lite0, Lite1 and Lite2 differ in width and depth. They have no squeeze-excite, ReLU6 and
TensorFlow's conventions: SAME padding, batch norm epsilon 1e-3, input (x - 127) / 128.
B0 follows torchvision: symmetric padding, epsilon 1e-5, ImageNet's mean and deviation.
Weights of timm whose names start with `tf_efficientnet` have TensorFlow's conventions
and are B0's in name only. Dropout and drop-connect of the original training are left
out, so that a forward pass is a function of its input alone.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cxai_jax.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BackboneSpec,
)
from cxai_jax.models.lowering import Lowering
from cxai_jax.models.norm import Conv, ConvNorm
from cxai_jax.types import Array, Mode

# (side of the depthwise window, stride, expansion, width, blocks) of each stage, before
# scaling.
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
SQUEEZE = 4  # A block's input channels over the channels of its squeeze-excite.


class Family(NamedTuple):
    """What tells B networks from Lite ones."""

    activation: Callable[[Array], Array]
    eps: float  # Of the batch norms.
    same: bool  # TensorFlow's SAME padding instead of symmetric.
    squeeze_excite: bool


B = Family(nn.silu, 1e-5, same=False, squeeze_excite=True)
LITE = Family(jax.nn.relu6, 1e-3, same=True, squeeze_excite=False)


class Variant(NamedTuple):
    """A family and the factors of its stages' widths and depths.

    The stem, the last convolution, and the depth of the first and the last stage stay
    as they are, which is how Lite networks grow.
    """

    family: Family
    width: float = 1.0
    depth: float = 1.0

    def stages(self) -> list[tuple[int, int, int, int, int]]:
        """STAGES, scaled."""
        return [
            (k, stride, expansion, self._wide(width), blocks)
            for (k, stride, expansion, width, _), blocks in zip(
                STAGES, self.blocks(), strict=True
            )
        ]

    def blocks(self) -> list[int]:
        """Blocks of every stage."""
        first, *middle, last = (blocks for *_, blocks in STAGES)
        return [first, *(math.ceil(n * self.depth) for n in middle), last]

    def _wide(self, width: int) -> int:
        """The multiple of 8 nearest to the scaled width, at most a tenth below it."""
        scaled = width * self.width
        rounded = int(scaled + 4) // 8 * 8
        return rounded if rounded >= 0.9 * scaled else rounded + 8


class SqueezeExcite(nn.Module):
    """`x * sigmoid(W2 silu(W1 mean(x) + b1) + b2)` (Hu et al. 2018), in float32.

    Attributes:
      squeezed: channels between the two convolutions.
      lowering: as in `Backbone`.
    """

    squeezed: int
    lowering: Lowering

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)

        def conv(features: int, name: str) -> Conv:
            return Conv(
                features, 1, bias=True, dtype=wide, lowering=self.lowering, name=name
            )

        y = x.astype(wide).mean((1, 2), keepdims=True)
        y = nn.silu(conv(self.squeezed, "reduce")(y))
        return x * nn.sigmoid(conv(x.shape[-1], "expand")(y)).astype(x.dtype)


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise, linear 1x1 projection.

    Attributes:
      k: side of the depthwise window.
      stride: of the depthwise convolution.
      expansion: factor of the inner width; 1 leaves the expansion out.
      width: output channels.
      family: B or LITE.
      dtype, lowering, norm: as in `Backbone`.
    """

    k: int
    stride: int
    expansion: int
    width: int
    family: Family
    dtype: type
    lowering: Lowering
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        def conv(features: int, k: int, name: str, **kind) -> ConvNorm:
            return ConvNorm(
                features,
                k,
                padding=_padding(self.family, k),
                eps=self.family.eps,
                dtype=self.dtype,
                lowering=self.lowering,
                norm=self.norm,
                name=name,
                **kind,
            )

        activation, inner, y = self.family.activation, self.expansion * x.shape[-1], x
        if self.expansion > 1:
            y = activation(conv(inner, 1, "expand")(y, mode, site))
        depthwise = conv(inner, self.k, "depthwise", stride=self.stride, depthwise=True)
        y = activation(depthwise(y, mode, site))
        if self.family.squeeze_excite:
            squeezed = x.shape[-1] // SQUEEZE
            y = SqueezeExcite(squeezed, self.lowering, name="excite")(y)
        y = conv(self.width, 1, "project")(y, mode, site)
        return x + y if x.shape == y.shape else y


class EfficientNet(Backbone):
    """Stride 32; `lower` ends before the last stride, `features` after the top conv.

    Attributes:
      variant: its family and size.
    """

    variant: Variant = Variant(LITE)

    def setup(self) -> None:
        super().setup()
        family = self.variant.family
        common = self.shared()
        block = self.rematerialised(Block)
        self.stem = ConvNorm(
            32, 3, 2, _padding(family, 3), eps=family.eps, name="stem", **common
        )
        self.stages = [
            [
                block(
                    k,
                    stride if j == 0 else 1,
                    expansion,
                    width,
                    family,
                    name=f"stage{i}_{j}",
                    **common,
                )
                for j in range(blocks)
            ]
            for i, (k, stride, expansion, width, blocks) in enumerate(
                self.variant.stages()
            )
        ]
        self.last = ConvNorm(1280, 1, eps=family.eps, name="last", **common)

    def lower(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        x = self.variant.family.activation(self.stem(x, mode, site))
        return self._run(self.stages[:LOWER_STAGES], x, mode, site)

    def upper(self, lower: Array, mode: Mode, site: Array | None = None) -> Array:
        x = self._run(self.stages[LOWER_STAGES:], lower, mode, site)
        return self.variant.family.activation(self.last(x, mode, site))

    def _run(self, stages: list, x: Array, mode: Mode, site: Array | None) -> Array:
        for stage in stages:
            for block in stage:
                x = block(x, mode, site)
        return x


def _padding(family: Family, k: int) -> str | int:
    return "SAME" if family.same else k // 2


def _numbered(blocks: list[int]) -> tuple:
    """Names of the PyTorch port behind lite0-imagenet, which numbers blocks flatly."""
    names = [f"stage{s}_{b}" for s, n in enumerate(blocks) for b in range(n)]
    number = "|".join(map(str, range(len(names))))

    def block(layers: dict[str, str]) -> Callable[[re.Match], str]:
        return lambda m: f"{names[int(m[1])]}/{layers[m[2]]}"

    convs = {name: name for name in ("expand", "depthwise", "project")}
    norms = {f"bn{i}": f"{name}/norm" for i, name in enumerate(convs)}
    return (
        (r"_conv_stem", r"stem"),
        (r"_bn0", r"stem/norm"),
        (rf"_blocks\.({number})\._(expand|depthwise|project)_conv", block(convs)),
        (rf"_blocks\.({number})\._(bn[012])", block(norms)),
        (r"_conv_head", r"last"),
        (r"_bn1", r"last/norm"),
        (r"_fc", r"head"),
    )


_TIMM = (
    # The first stage has no expansion, which shifts its names.
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
    (r"blocks\.(\d)\.(\d)\.se\.conv_(reduce|expand)", r"stage\1_\2/excite/\3"),
    (r"blocks\.(\d)\.(\d)\.conv_pwl", r"stage\1_\2/project"),
    (r"blocks\.(\d)\.(\d)\.bn3", r"stage\1_\2/project/norm"),
    (r"conv_head", r"last"),
    (r"bn2", r"last/norm"),
    (r"classifier", r"head"),
)


def _torchvision() -> tuple:
    """A stage is `features.1` to `features.7`; layers of a block are numbered."""
    layers = ("expand", "depthwise", "excite", "project")
    rules = [
        (r"features\.0\.0", r"stem"),
        (r"features\.0\.1", r"stem/norm"),
        (r"features\.8\.0", r"last"),
        (r"features\.8\.1", r"last/norm"),
        (r"classifier\.1", r"head"),
    ]
    for i in range(len(STAGES)):
        for j, layer in enumerate(layers if i else layers[1:]):
            theirs, ours = rf"features\.{i + 1}\.(\d)\.block\.{j}", rf"stage{i}_\1"
            if layer == "excite":
                rules.append((rf"{theirs}\.fc1", rf"{ours}/excite/reduce"))
                rules.append((rf"{theirs}\.fc2", rf"{ours}/excite/expand"))
            else:
                rules.append((rf"{theirs}\.0", rf"{ours}/{layer}"))
                rules.append((rf"{theirs}\.1", rf"{ours}/{layer}/norm"))
    return tuple(rules)


def _spec(variant: Variant, golden: int) -> BackboneSpec:
    lite = variant.family is LITE
    return BackboneSpec(
        functools.partial(EfficientNet, variant=variant),
        *(((127.0,) * 3, (128.0,) * 3) if lite else (IMAGENET_MEAN, IMAGENET_STD)),
        golden=golden,
        rules=(_numbered(variant.blocks()) if lite else _torchvision()) + _TIMM,
    )


SPECS = {
    "efficientnet_b0": _spec(Variant(B), golden=5_288_548),
    "efficientnet_lite0": _spec(Variant(LITE), golden=4_652_008),
    "efficientnet_lite1": _spec(Variant(LITE, depth=1.1), golden=5_416_680),
    "efficientnet_lite2": _spec(Variant(LITE, width=1.1, depth=1.2), golden=6_092_072),
}
