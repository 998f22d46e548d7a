"""What every backbone shares: the contract, the head and its class maps.

A backbone builds its trunk in `setup`, calls `super().setup()` for the head, and states
`lower` and `upper`. Pooling, logits and class maps are float32 throughout.

One that can be entered behind its first layers, where a cell of the image reaches a
small window only, splits `lower` into `prefix` and `suffix` and declares
`prefix_windows` (voting/prefix.py).

`site`, int32 [B] or None, travels beside `mode` to every part: parts that differ from
site to site need it, all others ignore it.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cxai_jax.models.lowering import Lowering
from cxai_jax.models.norm import NORMS, BatchNorm
from cxai_jax.types import Array, Mode, Outputs

# Grey levels 0..255: what torchvision's ImageNet weights expect.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
HEADS = ("linear", "mlp", "flat")
HIDDEN = 512  # Width of the mlp head; the CT paper says "MLP" and no more.
PROJECTED = 1024  # Width of the projection's hidden layer (A16).

# Full float32: the default on GPUs and TPUs rounds the factors to fewer bits.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _uniform(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): how torch starts a linear layer."""
    return jax.random.uniform(key, shape, minval=-(fan_in**-0.5), maxval=fan_in**-0.5)


class Head(nn.Module):
    """Logits of the last feature map, and the map of every class.

    linear and mlp read the global average pool. The map is the features weighted by the
    gradient of the logit with respect to the pooled features. For the linear head that
    gradient is the kernel and the map is the class activation map (Zhou et al. 2016);
    for the mlp it is Grad-CAM at the last stage (Selvaraju et al. 2017), without its
    ReLU and its factor 1 / (h w). flat has weights for every cell, as the fully
    connected layer of LeNet, which fixes the image size; a cell of its map is h w times
    what the cell adds to the logit, so that, as with linear, the mean over the cells is
    the logit without its bias.

    Attributes:
      num_classes: K.
      kind: "linear" | "mlp" (one hidden layer of HIDDEN, ReLU) | "flat".
    """

    num_classes: int
    kind: str = "linear"

    @nn.compact
    def __call__(
        self, features: Array, mode: Mode, site: Array | None
    ) -> tuple[Array, Array]:
        """features [B, h, w, D] -> logits [B, K], class maps [B, h, w, K]."""
        features = features.astype(jnp.float32)
        if self.kind == "flat":
            fan_in = math.prod(features.shape[1:])
            shape = (*features.shape[1:], self.num_classes)
            kernel = self.param("kernel", _uniform, shape, fan_in)
            bias = self.param("bias", _uniform, shape[-1:], fan_in)
            cells = features.shape[1] * features.shape[2]
            maps = cells * _einsum("bhwd,hwdk->bhwk", features, kernel)
            return maps.mean((1, 2)) + bias, maps
        pooled = features.mean((1, 2))
        if self.kind == "linear":
            kernel, bias = self._weights("", pooled.shape[-1], self.num_classes)
            maps = _einsum("bhwd,dk->bhwk", features, kernel)
            return _einsum("bd,dk->bk", pooled, kernel) + bias, maps
        first, offset = self._weights("hidden_", pooled.shape[-1], HIDDEN)
        kernel, bias = self._weights("", HIDDEN, self.num_classes)
        hidden = nn.relu(_einsum("bd,dm->bm", pooled, first) + offset)
        active = (hidden > 0).astype(hidden.dtype)
        gradient = _einsum("dm,bm,mk->bdk", first, active, kernel)
        maps = _einsum("bhwd,bdk->bhwk", features, gradient)
        return _einsum("bm,mk->bk", hidden, kernel) + bias, maps

    def _weights(self, prefix: str, width: int, features: int) -> tuple[Array, Array]:
        kernel = self.param(prefix + "kernel", _uniform, (width, features), width)
        return kernel, self.param(prefix + "bias", _uniform, (features,), width)


class Projection(nn.Module):
    """Embedding of an image for a loss between images: pool, 1024, ReLU, `width`.

    The widths are those that Wang et al. (2020b) put behind their network; the CT paper
    does not say what it took (A16). Their norms, one per site, are covidnet.py's.
    """

    width: int

    @nn.compact
    def __call__(self, features: Array, mode: Mode, site: Array | None) -> Array:
        """Features [B, h, w, D] -> [B, width], float32."""
        pooled = features.astype(jnp.float32).mean((1, 2))
        hidden = nn.relu(nn.Dense(PROJECTED, name="hidden")(pooled))
        return nn.Dense(self.width, name="output")(hidden)


class Window(NamedTuple):
    """A layer by what it reads: output i reads `size` inputs from i stride - padding.

    Layers without a neighbourhood, 1x1 convolutions and activations, need no Window.
    """

    size: int
    stride: int = 1
    padding: int = 0  # On each side.


class Backbone(nn.Module):
    """A trunk in two parts and a head; the laws are in tests/models/test_laws.py.

    Attributes:
      num_classes: K.
      head_kind: "linear" | "mlp" | "flat".
      projection: width of the embedding that `project` gives; 0: there is none.
      dtype: type of the trunk's convolutions and activations; parameters are float32.
      remat: recompute each block in the backward pass, to save memory.
      lowering: "auto", "xla" or "tuned" (models/lowering.py).
      norm: constructor of the norms, of norm.NORMS.
    """

    num_classes: int
    head_kind: str = "linear"
    projection: int = 0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    lowering: Lowering = "auto"
    norm: Callable[..., nn.Module] = BatchNorm

    def setup(self) -> None:
        self.top = self.make_head()
        if self.projection:
            self.projector = self.make_projection()

    @nn.nowrap
    def make_head(self) -> nn.Module:
        return Head(self.num_classes, self.head_kind, name="head")

    @nn.nowrap
    def make_projection(self) -> nn.Module:
        return Projection(self.projection, name="projection")

    def lower(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        """Normalised images [B, H, W, 3] -> A3 [B, 2h, 2w, D3]."""
        raise NotImplementedError

    def upper(self, lower: Array, mode: Mode, site: Array | None = None) -> Array:
        """A3 [B, 2h, 2w, D3] -> features [B, h, w, D]."""
        raise NotImplementedError

    @nn.nowrap
    def prefix_windows(self) -> tuple[Window, ...]:
        """What the layers of `prefix` read; () for a backbone without that split."""
        return ()

    def prefix(self, x: Array, mode: Mode, site: Array | None = None) -> Array:
        """Normalised images [B, H, W, 3] -> the map that `suffix` starts from."""
        raise NotImplementedError

    def suffix(self, prefix: Array, mode: Mode, site: Array | None = None) -> Array:
        """The map of `prefix` -> A3: `lower` is `suffix(prefix(x))`."""
        raise NotImplementedError

    def head(self, features: Array, mode: Mode, site: Array | None = None) -> Array:
        """Features [B, h, w, D] -> logits float32 [B, K]."""
        return self.top(features, mode, site)[0]

    def project(self, features: Array, mode: Mode, site: Array | None = None) -> Array:
        """Features [B, h, w, D] -> embeddings float32 [B, projection]."""
        return self.projector(features, mode, site)

    def __call__(
        self, x: Array, mode: Mode, site: Array | None = None
    ) -> tuple[Array, Outputs]:
        """Normalised images [B, H, W, 3] -> logits [B, K] and the maps on the way."""
        return self._finish(self.lower(x, mode, site), mode, site)

    def from_prefix(
        self, prefix: Array, mode: Mode, site: Array | None = None
    ) -> tuple[Array, Outputs]:
        """As `__call__`, from the map of `prefix` on."""
        return self._finish(self.suffix(prefix, mode, site), mode, site)

    def _finish(
        self, lower: Array, mode: Mode, site: Array | None
    ) -> tuple[Array, Outputs]:
        features = self.upper(lower, mode, site)
        logits, class_maps = self.top(features, mode, site)
        if self.projection and self.is_initializing():
            self.project(features, mode, site)  # Makes its parameters.
        return logits, Outputs(lower, features, class_maps)

    @nn.nowrap
    def shared(self) -> dict:
        """The fields that every part of the trunk takes over."""
        return {"dtype": self.dtype, "lowering": self.lowering, "norm": self.norm}

    def rematerialised(self, block: type[nn.Module]) -> type[nn.Module]:
        """`block` itself, or its recomputing form where `remat` asks for it."""
        return nn.remat(block, static_argnums=(2,)) if self.remat else block


class BackboneSpec(NamedTuple):
    """All that is declared of a backbone, in its own file; see `models.MODELS`."""

    # Called with num_classes, the fields of `Backbone` and `options`, by name.
    build: Callable[..., Backbone]
    # Input normalisation (x - mean) / std per channel, grey levels 0..255.
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    golden: int  # Parameters with 1000 classes, as published; the tests hold it.
    # Pretrained weights: (pattern of a module path of the file, ours), by the first
    # that matches the whole path; ours is a template or a function of the match. ()
    # for a backbone without pretrained weights.
    rules: tuple[tuple[str, str | Callable], ...] = ()
    fresh: tuple[str, ...] = ()  # Modules, beside head and projection, without them.
    options: tuple[str, ...] = ()  # Fields of config.model that only it knows.
    norms: tuple[str, ...] = tuple(NORMS)  # What config.model.norm may be.
