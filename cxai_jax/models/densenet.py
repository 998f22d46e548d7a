"""DenseNet-121 (Huang et al. 2017), with torchvision's conventions.

A layer reads all maps of its block so far and adds GROWTH of its own. Symmetric padding
and batch norm epsilon 1e-5. Names follow torchvision's: `block1_2/conv1/kernel` is
`features.denseblock1.denselayer2.conv1.weight`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from cxai_jax.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BackboneSpec,
)
from cxai_jax.models.lowering import Lowering, max_pool
from cxai_jax.models.norm import Conv, ConvNorm
from cxai_jax.types import Array, Mode

DEPTHS = (6, 12, 24, 16)  # Layers of the four blocks.
GROWTH = 32
STEM = 64
_LAYER = r"features\.denseblock(\d)\.denselayer(\d+)"
# A module path of a file -> ours. The oldest files of torchvision say norm.1, conv.1.
RULES = (
    (r"features\.conv0", r"stem"),
    (r"features\.norm0", r"stem/norm"),
    (rf"{_LAYER}\.norm\.?1", r"block\1_\2/norm"),
    (rf"{_LAYER}\.norm\.?2", r"block\1_\2/conv1/norm"),
    (rf"{_LAYER}\.conv\.?([12])", r"block\1_\2/conv\3"),
    (r"features\.transition(\d)\.norm", r"block\1_norm"),
    (r"features\.transition(\d)\.conv", r"transition\1"),
    (r"features\.norm5", r"block4_norm"),
    (r"classifier", r"head"),
)


class Layer(nn.Module):
    """Norm, ReLU, 1x1 to four times GROWTH, norm, ReLU, 3x3 to GROWTH.

    Attributes:
      dtype, lowering, norm: as in `Backbone`.
    """

    dtype: type
    lowering: Lowering
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        """All maps of the block so far -> the maps [B, H, W, GROWTH] to add."""
        common = {"dtype": self.dtype, "lowering": self.lowering}
        norm = self.norm(x.shape[-1], lowering=self.lowering, name="norm")
        narrow = ConvNorm(4 * GROWTH, 1, norm=self.norm, name="conv1", **common)
        y = nn.relu(narrow(nn.relu(norm(x, mode, site)), mode, site))
        return Conv(GROWTH, 3, name="conv2", **common)(y)


class DenseNet(Backbone):
    """DenseNet-121: stride 32; `lower` ends with the norm and ReLU that follow the
    third block, as `features` does with those of the fourth.
    """

    def setup(self) -> None:
        super().setup()
        layer, width = self.rematerialised(Layer), STEM
        self.stem = ConvNorm(STEM, 7, 2, padding=3, name="stem", **self.shared())
        blocks, norms, transitions = [], [], []
        for i, depth in enumerate(DEPTHS, 1):
            names = [f"block{i}_{j}" for j in range(1, depth + 1)]
            blocks.append([layer(name=name, **self.shared()) for name in names])
            width += depth * GROWTH
            norm = self.norm(width, lowering=self.lowering, name=f"block{i}_norm")
            norms.append(norm)
            if i < len(DEPTHS):
                width //= 2
                common = {"dtype": self.dtype, "lowering": self.lowering}
                transitions.append(Conv(width, 1, name=f"transition{i}", **common))
        self.blocks, self.norms, self.transitions = blocks, norms, transitions

    def lower(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        x = max_pool(nn.relu(self.stem(x, mode, site)), lowering=self.lowering)
        x = self._block(1, x, mode, site)
        x = self._block(2, self._halved(1, x), mode, site)
        return self._block(3, self._halved(2, x), mode, site)

    def upper(self, lower: Array, mode: Mode, site: Array | None = None) -> Array:
        return self._block(4, self._halved(3, lower), mode, site)

    def _block(self, block: int, x: Array, mode: Mode, site: Array | None) -> Array:
        """The layers of a block, its norm and ReLU."""
        for layer in self.blocks[block - 1]:
            x = jnp.concatenate([x, layer(x, mode, site)], -1)
        return nn.relu(self.norms[block - 1](x, mode, site))

    def _halved(self, block: int, x: Array) -> Array:
        """The transition behind a block: half the channels, half the side."""
        return nn.avg_pool(self.transitions[block - 1](x), (2, 2), (2, 2))


SPEC = BackboneSpec(
    DenseNet, IMAGENET_MEAN, IMAGENET_STD, golden=7_978_856, rules=RULES
)
