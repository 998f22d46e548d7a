"""ResNet v1.5 (He et al. 2016; stride in the 3x3), with torchvision's conventions.

Symmetric padding, batch norm epsilon 1e-5 and kernel names that follow torchvision's:
`layer1_0/conv1/kernel` is `layer1.0.conv1.weight`.
"""

import functools
from collections.abc import Callable

from flax import linen as nn

from cxai_jax.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BackboneSpec,
    Window,
)
from cxai_jax.models.lowering import Lowering, max_pool
from cxai_jax.models.norm import ConvNorm
from cxai_jax.types import Array, Mode

RULES = (
    (r"conv1", r"conv1"),
    (r"bn1", r"conv1/norm"),
    (r"layer(\d)\.(\d+)\.conv(\d)", r"layer\1_\2/conv\3"),
    (r"layer(\d)\.(\d+)\.bn(\d)", r"layer\1_\2/conv\3/norm"),
    (r"layer(\d)\.(\d+)\.downsample\.0", r"layer\1_\2/downsample"),
    (r"layer(\d)\.(\d+)\.downsample\.1", r"layer\1_\2/downsample/norm"),
    (r"fc", r"head"),
)


class Block(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the width, and a shortcut.

    Attributes:
      width: channels inside the block.
      stride: of the first 3x3 convolution.
      bottleneck: the second form.
      dtype, lowering, norm: as in `Backbone`.
      adapter: at the 3x3 of a bottleneck, at both 3x3 of the other form.
    """

    width: int
    stride: int
    bottleneck: bool
    dtype: type
    lowering: Lowering
    norm: Callable[..., nn.Module]
    adapter: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        def conv(features: int, k: int, stride: int, name: str) -> ConvNorm:
            return ConvNorm(
                features,
                k,
                stride,
                padding=k // 2,
                dtype=self.dtype,
                lowering=self.lowering,
                norm=self.norm,
                adapter=self.adapter if k == 3 else None,
                name=name,
            )

        if self.bottleneck:
            y = nn.relu(conv(self.width, 1, 1, "conv1")(x, mode, site))
            y = nn.relu(conv(self.width, 3, self.stride, "conv2")(y, mode, site))
            y = conv(4 * self.width, 1, 1, "conv3")(y, mode, site)
        else:
            y = nn.relu(conv(self.width, 3, self.stride, "conv1")(x, mode, site))
            y = conv(self.width, 3, 1, "conv2")(y, mode, site)
        if x.shape != y.shape:
            x = conv(y.shape[-1], 1, self.stride, "downsample")(x, mode, site)
        return nn.relu(x + y)


class ResNet(Backbone):
    """ResNet of one of SPECS: stride 32; `prefix` is the stem and layer1, and `lower`
    ends with layer3.

    Attributes:
      depths: blocks of the four layers.
      bottleneck: form of the blocks.
      extra_bn: batch norm and ReLU after layer2 and after layer4, which the published
        code of the CT paper adds and its text does not (A10).
      adapter: constructor of what each site adds at the 3x3 convolutions of the blocks,
        of adapters.ADAPTERS; None adds nothing.
    """

    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    bottleneck: bool = False
    extra_bn: bool = False
    adapter: Callable[..., nn.Module] | None = None

    def setup(self) -> None:
        super().setup()
        self.stem = ConvNorm(64, 7, 2, padding=3, name="conv1", **self.shared())
        block = self.rematerialised(Block)
        self.layers = [
            [
                block(
                    64 * 2**i,
                    stride=2 if i and not j else 1,
                    bottleneck=self.bottleneck,
                    adapter=self.adapter,
                    name=f"layer{i + 1}_{j}",
                    **self.shared(),
                )
                for j in range(depth)
            ]
            for i, depth in enumerate(self.depths)
        ]
        if self.extra_bn:
            expansion = 4 if self.bottleneck else 1
            self.extra = [
                self.norm(
                    width * expansion, lowering=self.lowering, name=f"extra_bn{layer}"
                )
                for width, layer in ((128, 2), (512, 4))
            ]

    def lower(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        return self.suffix(self.prefix(x, mode, site), mode, site)

    @nn.nowrap
    def prefix_windows(self) -> tuple[Window, ...]:
        convolutions = self.depths[0] * (1 if self.bottleneck else 2)
        return (Window(7, 2, 3), Window(3, 2, 1), *[Window(3, 1, 1)] * convolutions)

    def prefix(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        x = nn.relu(self.stem(x, mode, site))
        x = max_pool(x, lowering=self.lowering)
        return self._layer(1, x, mode, site)

    def suffix(self, prefix: Array, mode: Mode, site: Array | None = None) -> Array:
        return self._layer(3, self._layer(2, prefix, mode, site), mode, site)

    def upper(self, lower: Array, mode: Mode, site: Array | None = None) -> Array:
        return self._layer(4, lower, mode, site)

    def _layer(self, layer: int, x: Array, mode: Mode, site: Array | None) -> Array:
        for block in self.layers[layer - 1]:
            x = block(x, mode, site)
        if self.extra_bn and layer in (2, 4):
            x = nn.relu(self.extra[layer // 2 - 1](x, mode, site))
        return x


def _spec(depths: tuple[int, ...], bottleneck: bool, golden: int) -> BackboneSpec:
    return BackboneSpec(
        functools.partial(ResNet, depths=depths, bottleneck=bottleneck),
        IMAGENET_MEAN,
        IMAGENET_STD,
        golden=golden,
        rules=RULES,
        fresh=("extra_bn2", "extra_bn4", "adapter"),
        options=("extra_bn", "adapter"),
    )


# Blocks per layer, and whether a block is a bottleneck.
SPECS = {
    "resnet18": _spec((2, 2, 2, 2), False, golden=11_689_512),
    "resnet34": _spec((3, 4, 6, 3), False, golden=21_797_672),
    "resnet50": _spec((3, 4, 6, 3), True, golden=25_557_032),
    "resnet101": _spec((3, 4, 23, 3), True, golden=44_549_160),
}
