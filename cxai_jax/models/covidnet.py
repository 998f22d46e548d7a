"""COVID-Net (Wang et al. 2020a) as ported and redesigned by Wang et al. (2020b).

Stage s = 1..4 has n_s = 3, 4, 6, 3 blocks and c_s = 256, 512, 1024, 2048 channels:

    P_{s,1} = PEPX(in_s),  P_{s,j} = PEPX(L_s + P_{s,1} + ... + P_{s,j-1})
    in_{s+1} = sum_j pool(P_{s,j}) + pool(L_s)
    L_{s+1} = pool(act(conv1x1(sum_j P_{s,j} + L_s)))

in_1 is the pooled stem, L_1 = act(conv1x1(in_1)) and P_{4,3} the features. "covidnet"
has no norm and no activation at all, act(x) = x; "covidnet_redesign" has
act(x) = ReLU(norm(x)) behind the stem, the four 1x1 convolutions and the hidden layers
of the head, the norms shared or of each site (SepNorm). The published head, `head=mlp`,
pools to 2x2 cells and has hidden layers of 1024 and 256; `head=linear` is that of all
other backbones, whose class map is a CAM. The published sigmoid behind the head is
config.loss.scores.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cxai_jax.models.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BackboneSpec,
)
from cxai_jax.models.lowering import Lowering, Padding, conv
from cxai_jax.types import Array, Mode

BLOCKS = (3, 4, 6, 3)
HIDDEN = (1024, 256)
STAGE4_INPUTS = ("published", "all")


def _init(fan_in: int) -> Callable:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): how torch starts convolutions and layers."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, minval=-bound, maxval=bound
    )


class Conv(nn.Module):
    """A convolution with bias.

    Attributes:
      features: output channels.
      kernel, stride, padding: of `lowering.conv`.
      depthwise: one window per channel.
      dtype, lowering: as in `Backbone`.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    padding: Padding = 0
    depthwise: bool = False
    dtype: jnp.dtype = jnp.float32
    lowering: Lowering = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        k, fan_in = self.kernel, 1 if self.depthwise else x.shape[-1]
        init = _init(k * k * fan_in)
        kernel = self.param("kernel", init, (k, k, fan_in, self.features))
        bias = self.param("bias", init, (self.features,))
        y = conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
            lowering=self.lowering,
        )
        return y + bias.astype(self.dtype)


class Pepx(nn.Module):
    """Projection, expansion, depthwise 3x3, projection, extension; nothing between.

    Attributes:
      features: output channels.
      dtype, lowering: as in `Backbone`.
    """

    features: int
    dtype: jnp.dtype
    lowering: Lowering

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, common = x.shape[-1], {"dtype": self.dtype, "lowering": self.lowering}
        inner = 3 * width // 4
        x = Conv(width // 2, name="projection1", **common)(x)
        x = Conv(inner, name="expansion", **common)(x)
        x = Conv(inner, 3, padding=1, depthwise=True, name="depthwise", **common)(x)
        x = Conv(width // 2, name="projection2", **common)(x)
        return Conv(self.features, name="extension", **common)(x)


class Layers(nn.Module):
    """Fully connected layers, each with norm and ReLU where there is a norm.

    Attributes:
      widths: of the layers.
      last: width of one more layer without norm; 0: none.
      norm: constructor of the norms; None leaves norm and ReLU out.
    """

    widths: Sequence[int]
    last: int
    norm: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, x: Array, mode: Mode, site: Array | None) -> Array:
        """[B, D] -> [B, last width]."""
        for number, width in enumerate(self.widths, 1):
            x = self._layer(x, width, f"layer{number}")
            if self.norm:
                norm = self.norm(width, name=f"layer{number}_norm")
                x = nn.relu(norm(x[:, None, None], mode, site)[:, 0, 0])
        return self._layer(x, self.last, "output") if self.last else x

    def _layer(self, x: Array, width: int, name: str) -> Array:
        init = _init(x.shape[-1])
        dense = nn.Dense(width, kernel_init=init, bias_init=init, name=name)
        return dense(x)


class QuarterHead(nn.Module):
    """Logits of the features pooled to 2x2 cells; the class map is Grad-CAM.

    The features are weighted by the gradient of the logit with respect to them, summed
    over their cells, batch statistics held: as backbone.Head for an mlp.

    Attributes:
      num_classes: K.
      hidden: widths of the hidden layers.
      norm: constructor of the norms; None leaves norm and ReLU out.
    """

    num_classes: int
    hidden: Sequence[int]
    norm: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(
        self, features: Array, mode: Mode, site: Array | None
    ) -> tuple[Array, Array]:
        """features [B, h, w, D] -> logits [B, K], class maps [B, h, w, K]."""
        pooled = quarters(features)
        layers = Layers(self.hidden, self.num_classes, self.norm, name="mlp")
        logits = layers(pooled, mode, site)
        alone, variables = layers.unbind()
        held = "explain" if mode == "train" else mode
        _, pull = jax.vjp(lambda x: alone.apply(variables, x, held, site), pooled)
        classes = jnp.eye(self.num_classes, dtype=logits.dtype)[:, None]
        each = jnp.broadcast_to(classes, (self.num_classes, *logits.shape))
        (slopes,) = jax.vmap(pull)(each)
        weights = slopes.reshape(*slopes.shape[:2], 4, -1).sum(2)
        maps = jnp.einsum("bhwd,kbd->bhwk", _wide(features), weights)
        return logits, maps


class QuarterProjection(nn.Module):
    """Embedding for a loss between images: 2x2 cells, 1024, `width`, each with norm.

    It serves training alone, so nothing moves the running statistics of its norms.

    Attributes:
      width: of the embedding.
      hidden: width of the layer before.
      norm: constructor of the norms; None leaves norm and ReLU out.
    """

    width: int
    hidden: int
    norm: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, features: Array, mode: Mode, site: Array | None) -> Array:
        """Features [B, h, w, D] -> [B, width], float32."""
        layers = Layers((self.hidden, self.width), 0, self.norm, name="mlp")
        return layers(quarters(features), mode, site)


def quarters(features: Array) -> Array:
    """Means of the 2x2 overlapping quarters, as torch's adaptive pooling.

    [B, h, w, D] -> float32 [B, 4 D] (or wider, as given), quarter by quarter.
    """

    wide, (height, width) = _wide(features), features.shape[1:3]

    def halves(size: int) -> Array:
        rows = np.arange(size)
        members = np.stack([rows < -(-size // 2), rows >= size // 2])
        return jnp.asarray(members / members.sum(1, keepdims=True), wide.dtype)

    pooled = jnp.einsum(
        "ih,jw,bhwd->bijd",
        halves(height),
        halves(width),
        wide,
        precision=jax.lax.Precision.HIGHEST,
    )
    return pooled.reshape(len(pooled), -1)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def halve(x: Array) -> Array:
    """Maxima of 2x2 cells; an odd last row or column is left out."""
    batch, height, width, channels = x.shape
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width]
    return x.reshape(batch, height, 2, width, 2, channels).max((2, 4))


class CovidNet(Backbone):
    """COVID-Net or its redesign: stride 32.

    `lower` ends with stage 3: the maps of P_{3,1..6} and L_3, one after another, of
    which stage 4 takes two different sums.

    Attributes:
      activated: norm and ReLU where the redesign has them.
      stage4_input: "published" sums P_{3,2} twice and P_{3,3} not at all into in_4, as
        the code of Wang et al. (2020b) does; "all" is the formula.
      widths: channels of the stem and of the four stages.
      hidden: widths of the hidden layers of the published head.
    """

    activated: bool = False
    stage4_input: str = "published"
    widths: Sequence[int] = (64, 256, 512, 1024, 2048)
    hidden: Sequence[int] = HIDDEN

    def setup(self) -> None:
        super().setup()
        common = {"dtype": self.dtype, "lowering": self.lowering}
        stem, *stages = self.widths
        block = nn.remat(Pepx) if self.remat else Pepx
        self.stem = Conv(stem, 7, 2, padding=3, name="stem", **common)
        self.long = [
            Conv(width, name=f"long{s}", **common) for s, width in enumerate(stages, 1)
        ]
        self.blocks = [
            [block(width, name=f"stage{s}_{j}", **common) for j in range(count)]
            for s, (width, count) in enumerate(zip(stages, BLOCKS, strict=True), 1)
        ]
        if self.activated:
            self.norms = [
                self.norm(width, lowering=self.lowering, name=f"norm{s}")
                for s, width in enumerate(self.widths)
            ]

    @nn.nowrap
    def make_head(self) -> nn.Module:
        if self.head_kind != "mlp":
            return super().make_head()
        norm = self.norm if self.activated else None
        return QuarterHead(self.num_classes, self.hidden, norm, name="head")

    @nn.nowrap
    def make_projection(self) -> nn.Module:
        norm = self.norm if self.activated else None
        return QuarterProjection(
            self.projection, self.hidden[0], norm, name="projection"
        )

    def lower(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        given = halve(self._act(0, self.stem(x), mode, site))
        long = self._act(1, self.long[0](given), mode, site)
        for stage in (1, 2):
            terms = self._stage(stage, given, long)
            given = sum(map(halve, terms))
            long = self._long(stage + 1, sum(terms), mode, site)
        return jnp.concatenate(self._stage(3, given, long), axis=-1)

    def upper(self, lower: Array, mode: Mode, site: Array | None = None) -> Array:
        terms = jnp.split(lower, BLOCKS[2] + 1, axis=-1)
        long = self._long(4, sum(terms), mode, site)
        if self.stage4_input == "published":
            terms[2] = terms[1]
        return self._stage(4, sum(map(halve, terms)), long)[-2]

    def _stage(self, stage: int, given: Array, long: Array) -> list[Array]:
        """[P_{s,1}, ..., P_{s,n}, L_s]."""
        first, *others = self.blocks[stage - 1]
        terms = [first(given)]
        for block in others:
            terms.append(block(long + sum(terms)))
        return [*terms, long]

    def _long(self, stage: int, x: Array, mode: Mode, site: Array | None) -> Array:
        return halve(self._act(stage, self.long[stage - 1](x), mode, site))

    def _act(self, place: int, x: Array, mode: Mode, site: Array | None) -> Array:
        return nn.relu(self.norms[place](x, mode, site)) if self.activated else x


def _spec(activated: bool, golden: int, **fields) -> BackboneSpec:
    return BackboneSpec(
        functools.partial(CovidNet, activated=activated),
        IMAGENET_MEAN,
        IMAGENET_STD,
        golden=golden,
        options=("stage4_input",),
        **fields,
    )


# Parameters with a linear head of 1000 classes.
SPECS = {
    "covidnet": _spec(False, golden=33_538_296, norms=("plain",)),
    "covidnet_redesign": _spec(True, golden=33_546_104),
}
