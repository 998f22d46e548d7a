"""An approximation of COVIDNet-CT (Gunraj et al. 2020), not the published network.

The published graph was found by machine and is given as a TensorFlow file only. This
network has its kind of block and its published size: 1.40 M parameters with 3 classes
and 4.18 G multiplications at 512 x 512 pixels. Widths and depths are chosen, by hand,
to meet both numbers; no published weights fit. Input 0..1.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from cxai_jax.models.backbone import Backbone, BackboneSpec
from cxai_jax.models.lowering import Lowering, max_pool
from cxai_jax.models.norm import ConvNorm
from cxai_jax.types import Array, Mode

STEM = 64
REPLICATION = 4
# (width, projected width, blocks) of each stage; all but the first halve the side.
STAGES = ((256, 64, 2), (256, 64, 3), (512, 80, 3), (512, 112, 2))


class Block(nn.Module):
    """Projection, replication, projection, expansion, and a shortcut around them.

    A replication copies every channel REPLICATION times and gives each copy a 3x3
    window of its own.

    Attributes:
      width: output channels.
      projected: channels of both projections.
      stride: of the 3x3 windows; 2 is the "PRPE-S" of the paper.
      dtype, lowering, norm: as in `Backbone`.
    """

    width: int
    projected: int
    stride: int
    dtype: type
    lowering: Lowering
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        def conv(features: int, k: int, name: str, **kind) -> ConvNorm:
            return ConvNorm(
                features,
                k,
                padding=k // 2,
                dtype=self.dtype,
                lowering=self.lowering,
                norm=self.norm,
                name=name,
                **kind,
            )

        copies, stride = REPLICATION * self.projected, self.stride
        y = nn.relu(conv(self.projected, 1, "project1")(x, mode, site))
        replicate = conv(copies, 3, "replicate", stride=stride, depthwise=True)
        y = nn.relu(replicate(jnp.repeat(y, REPLICATION, -1), mode, site))
        y = nn.relu(conv(self.projected, 1, "project2")(y, mode, site))
        y = conv(self.width, 1, "expand")(y, mode, site)
        if x.shape != y.shape:
            x = conv(self.width, 1, "shortcut", stride=stride)(x, mode, site)
        return nn.relu(x + y)


class COVIDNetCT(Backbone):
    """Stride 32: a 7x7 stem, a max pool and four stages; `lower` is the third's end."""

    def setup(self) -> None:
        super().setup()
        common = self.shared()
        block = self.rematerialised(Block)
        self.stem = ConvNorm(STEM, 7, 2, padding=3, name="stem", **common)
        self.stages = [
            [
                block(
                    width,
                    projected,
                    2 if i and not j else 1,
                    name=f"stage{i}_{j}",
                    **common,
                )
                for j in range(blocks)
            ]
            for i, (width, projected, blocks) in enumerate(STAGES)
        ]

    def lower(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        x = max_pool(nn.relu(self.stem(x, mode, site)), lowering=self.lowering)
        return self._run(self.stages[:-1], x, mode, site)

    def upper(self, lower: Array, mode: Mode, site: Array | None = None) -> Array:
        return self._run(self.stages[-1:], lower, mode, site)

    def _run(self, stages: list, x: Array, mode: Mode, site: Array | None) -> Array:
        for stage in stages:
            for block in stage:
                x = block(x, mode, site)
        return x


SPEC = BackboneSpec(COVIDNetCT, (0.0,) * 3, (255.0,) * 3, golden=1_911_336)
