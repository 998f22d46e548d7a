"""NASNet-A-Mobile, 4 @ 1056 (Zoph et al. 2018), as in Cadene's PyTorch port.

Every cell reads the two outputs before it. TensorFlow's SAME padding, but for the first
convolution, which has none; batch norm epsilon 1e-3; input (x - 127.5) / 127.5. The
port builds SAME padding by hand for even sides: images whose side is a multiple of 32
give its numbers. Dropout and the auxiliary head of the training are left out.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from cxai_jax.models.backbone import Backbone, BackboneSpec
from cxai_jax.models.lowering import Lowering, max_pool
from cxai_jax.models.norm import Conv, ConvNorm
from cxai_jax.types import Array, Mode

EPS = 1e-3
STEM = 32
WIDTH = 44  # Filters of the first cells; the last ones put 6 x 4 x 44 = 1056 together.
# (name, filters, whether it halves the side) of every cell, in the port's names.
CELLS = (
    ("cell_stem_0", WIDTH // 4, True),
    ("cell_stem_1", WIDTH // 2, True),
    *((f"cell_{i}", WIDTH, False) for i in range(4)),
    ("reduction_cell_0", 2 * WIDTH, True),
    *((f"cell_{i}", 2 * WIDTH, False) for i in range(6, 10)),
    ("reduction_cell_1", 4 * WIDTH, True),
    *((f"cell_{i}", 4 * WIDTH, False) for i in range(12, 16)),
)
LOWER_CELLS = 11  # The cells before the last that halves the side.
_BRANCH = r"(\w+)\.comb_iter_(\d)_(left|right)"
# A module path of a file -> ours.
RULES = (
    (r"conv0\.conv", r"stem"),
    (r"conv0\.bn", r"stem/norm"),
    (r"(\w+)\.conv_1x1\.conv", r"\1/current"),
    (r"(\w+)\.conv_1x1\.bn", r"\1/current/norm"),
    (r"(\w+)\.conv_prev_1x1\.conv", r"\1/previous"),
    (r"(\w+)\.conv_prev_1x1\.bn", r"\1/previous/norm"),
    (r"(\w+)\.path_([12])\.conv", r"\1/path\2"),
    (r"(\w+)\.final_path_bn", r"\1/path_norm"),
    (rf"{_BRANCH}\.separable_(\d)\.depthwise_conv2d", r"\1/branch\2_\3/depthwise\4"),
    (rf"{_BRANCH}\.separable_(\d)\.pointwise_conv2d", r"\1/branch\2_\3/pointwise\4"),
    (rf"{_BRANCH}\.bn_sep_(\d)", r"\1/branch\2_\3/pointwise\4/norm"),
    (r"last_linear", r"head"),
)


class Separable(nn.Module):
    """Twice ReLU, depthwise, pointwise and norm; the stride is the first's.

    Attributes:
      width: output channels.
      k: side of the windows.
      stride: of the first depthwise convolution.
      dtype, lowering, norm: as in `Backbone`.
    """

    width: int
    k: int
    stride: int
    dtype: type
    lowering: Lowering
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        common = {"dtype": self.dtype, "lowering": self.lowering}
        for i, stride in ((1, self.stride), (2, 1)):
            depthwise = Conv(
                x.shape[-1],
                self.k,
                stride,
                depthwise=True,
                name=f"depthwise{i}",
                **common,
            )
            pointwise = ConvNorm(
                self.width, 1, eps=EPS, norm=self.norm, name=f"pointwise{i}", **common
            )
            x = pointwise(depthwise(nn.relu(x)), mode, site)
        return x


class Cell(nn.Module):
    """A normal or a reduction cell: five sums of two branches, put together.

    Attributes:
      width: filters of a branch.
      reduction: whether it halves the side.
      first: whether it takes the output before last as it is, as the first cell does.
      dtype, lowering, norm: as in `Backbone`.
    """

    width: int
    reduction: bool
    first: bool
    dtype: type
    lowering: Lowering
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, outputs: tuple[Array, Array], mode: Mode, site: Array | None = None
    ) -> Array:
        """(output before last, last output) -> the cell's output."""

        def narrow(x: Array, name: str) -> Array:
            conv = ConvNorm(self.width, 1, eps=EPS, name=name, **self._shared())
            return conv(nn.relu(x), mode, site)

        def separable(x: Array, k: int, branch: str) -> Array:
            stride = 2 if self.reduction and branch != "4_left" else 1
            name = f"branch{branch}"
            part = Separable(self.width, k, stride, name=name, **self._shared())
            return part(x, mode, site)

        p, c = outputs
        if p.shape[1:3] != c.shape[1:3]:
            p = self._halved(nn.relu(p), mode, site)
        elif not self.first:
            p = narrow(p, "previous")
        c = narrow(c, "current")
        sum0 = separable(c, 5, "0_left")
        if self.reduction:
            highest = max_pool(c, padding="SAME", lowering=self.lowering)
            sum0 += separable(p, 7, "0_right")
            sum1 = highest + separable(p, 7, "1_right")
            parts = [
                sum1,
                _average(c, 2) + separable(p, 5, "2_right"),
                _average(sum0) + sum1,
                separable(sum0, 3, "4_left") + highest,
            ]
        else:
            parts = [
                p,
                sum0 + separable(p, 3, "0_right"),
                separable(p, 5, "1_left") + separable(p, 3, "1_right"),
                _average(c) + p,
                2 * _average(p),
                separable(c, 3, "4_left") + c,
            ]
        return jnp.concatenate(parts, -1)

    def _halved(self, x: Array, mode: Mode, site: Array | None) -> Array:
        """Every second pixel, and every second one a step down and right of those."""
        shifted = jnp.pad(x[:, 1:, 1:], ((0, 0), (0, 1), (0, 1), (0, 0)))
        common = {"dtype": self.dtype, "lowering": self.lowering}
        paths = [
            Conv(self.width // 2, 1, 2, name=f"path{i}", **common)(path)
            for i, path in ((1, x), (2, shifted))
        ]
        norm = self.norm(self.width, EPS, self.lowering, name="path_norm")
        return norm(jnp.concatenate(paths, -1), mode, site)

    def _shared(self) -> dict:
        return {"dtype": self.dtype, "lowering": self.lowering, "norm": self.norm}


class NASNetMobile(Backbone):
    """Stride 32; the last reduction cell and the one behind it read two cells each.

    `lower` is therefore the last two cells before the last reduction, [B, 2h, 2w, D3]
    with the earlier one's channels first.
    """

    def setup(self) -> None:
        super().setup()
        cell = self.rematerialised(Cell)
        self.stem = ConvNorm(STEM, 3, 2, 0, eps=EPS, name="stem", **self.shared())
        self.cells = [
            cell(width, reduction, not i, name=name, **self.shared())
            for i, (name, width, reduction) in enumerate(CELLS)
        ]

    def lower(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        x = self.stem(x, mode, site)
        outputs = self._run(self.cells[:LOWER_CELLS], (x, x), mode, site)
        return jnp.concatenate(outputs, -1)

    def upper(self, lower: Array, mode: Mode, site: Array | None = None) -> Array:
        outputs = tuple(jnp.split(lower, 2, -1))
        _, last = self._run(self.cells[LOWER_CELLS:], outputs, mode, site)
        return nn.relu(last)

    def _run(
        self,
        cells: list,
        outputs: tuple[Array, Array],
        mode: Mode,
        site: Array | None,
    ) -> tuple[Array, Array]:
        """Passes (output before last, last output) through cells."""
        for cell in cells:
            outputs = outputs[1], cell(outputs, mode, site)
        return outputs


def _average(x: Array, stride: int = 1) -> Array:
    """Mean over 3x3 windows, of the pixels inside the map alone."""
    y = nn.avg_pool(
        x, (3, 3), (stride, stride), padding="SAME", count_include_pad=False
    )
    return y.astype(x.dtype)  # Flax counts the pixels in float32.


SPEC = BackboneSpec(
    NASNetMobile, (127.5,) * 3, (127.5,) * 3, golden=5_289_978, rules=RULES
)
