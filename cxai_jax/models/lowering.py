"""Convolution, pooling and batch norm where XLA's own lowering is slow.

Every operation has a plain form ("xla") and a rewritten one ("tuned") with the same
mathematics; "auto" takes what AUTO says for the backend. The rewritten forms are
built from ordinary operations and from each other, so they can be differentiated any
number of times, which the alignment loss needs. They serve reverse mode only.

What is slow on CPU: the weight gradient of a 1x1 convolution (XLA emits a convolution
whose window is the whole image), full convolutions on small maps (on 2x2 pixels of 512
channels by a factor of thirty), the gradient of max pooling (a scatter), depthwise
convolutions (forward and both gradients) and sums over batch and space.

Longer than other files: one idea, operation by operation, each built from the others.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cxai_jax.types import Array

Lowering = Literal["auto", "xla", "tuned"]
Padding = Literal["SAME"] | int

# "auto", by backend. Only what has been measured to gain is tuned, with two exceptions:
# the scatter in XLA's max-pool gradient has no deterministic form on GPUs, and the stem
# on TPUs follows Google's and NVIDIA's MLPerf ResNets; it is a loss on CPU.
AUTO = {
    "cpu": {
        "conv1x1": "tuned",
        "small_map": "tuned",
        "stem": "xla",
        "depthwise": "tuned",
        "max_pool": "tuned",
        "batch_norm": "tuned",
    },
    "gpu": {
        "conv1x1": "xla",
        "small_map": "xla",
        "stem": "xla",
        "depthwise": "xla",
        "max_pool": "tuned",
        "batch_norm": "xla",
    },
    "tpu": {
        "conv1x1": "xla",
        "small_map": "xla",
        "stem": "tuned",
        "depthwise": "xla",
        "max_pool": "xla",
        "batch_norm": "xla",
    },
}

# A map of at most 4x4 pixels is small. On 7x7 patches win alone and cost a whole
# training step a fortieth; with few channels a convolution is fast on any map.
SMALL_MAP, SMALL_MAP_CHANNELS = 4, 128
STEM_CHANNELS = 4  # At most, of what counts as a stem: an image.


def is_tuned(operation: str, lowering: Lowering) -> bool:
    """Whether `operation`, a key of AUTO, takes its rewritten form here.

    Raises:
      ValueError: `lowering` is none of auto, xla, tuned.
    """
    if lowering not in ("auto", "xla", "tuned"):
        raise ValueError(f"lowering is {lowering!r}; use auto, xla or tuned")
    if lowering == "auto":
        lowering = AUTO.get(jax.default_backend(), AUTO["gpu"])[operation]
    return lowering == "tuned"


def conv(
    x: Array,
    kernel: Array,
    *,
    stride: int = 1,
    padding: Padding = "SAME",
    lowering: Lowering = "auto",
) -> Array:
    """Two-dimensional convolution, full or depthwise.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, C, D], or [k, k, 1, C] for a depthwise convolution.
      stride: step in rows and columns.
      padding: rows and columns of zeros on each side as in torch, or "SAME" as in
        TensorFlow, which is lopsided at stride 2.
      lowering: "auto", "xla" or "tuned".

    Returns:
      [B, H', W', D] in the type of `x`.
    """
    size, (k, _, fan_in, _) = x.shape[1:3], kernel.shape
    pads = tuple(_pads(n, k, stride, padding) for n in size)
    depthwise = fan_in != x.shape[-1]
    if k == 1 and not depthwise and is_tuned("conv1x1", lowering):
        return _conv1x1(x, kernel, stride)
    window = _Window(k, stride, pads, size)
    if depthwise and is_tuned("depthwise", lowering):
        return _depthwise(window, x, kernel[:, :, 0])
    small = max(window.out) <= SMALL_MAP and fan_in >= SMALL_MAP_CHANNELS
    if small and is_tuned("small_map", lowering):
        return _conv_of_patches(window, x, kernel)
    stem = stride > 1 and k > 1 and not depthwise and fan_in <= STEM_CHANNELS
    if stem and is_tuned("stem", lowering):
        return _conv_of_blocks(window, x, kernel)
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // fan_in,
    )


def max_pool(x: Array, *, padding: Padding = 1, lowering: Lowering = "auto") -> Array:
    """Maximum over 3x3 windows at stride 2; at padding 1 the pool of a ResNet.

    Where a window holds its maximum more than once, the gradient goes to the first
    place in row order, as in torch.

    Args:
      x: [B, H, W, C].
      padding: 1 on each side, or "SAME"; they differ where H or W is even.
      lowering: "auto", "xla" or "tuned".

    Returns:
      [B, ceil(H / 2), ceil(W / 2), C].
    """
    size = x.shape[1:3]
    pads = tuple(_pads(n, 3, 2, padding) for n in size)
    if is_tuned("max_pool", lowering):
        return _max_pool(_Window(3, 2, pads, size), x)
    low = np.array(-np.inf, x.dtype)  # Known while tracing, or no gradient is found.
    pads = ((0, 0), *pads, (0, 0))
    return lax.reduce_window(x, low, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)


def moments(x: Array, *, lowering: Lowering = "auto") -> tuple[Array, Array]:
    """Mean and biased variance of every channel, in two passes and float32.

    Args:
      x: [B, H, W, C].
      lowering: "auto", "xla" or "tuned".

    Returns:
      Mean [C] and variance [C].
    """
    tuned = is_tuned("batch_norm", lowering)
    count = x.size // x.shape[-1]
    wide = x.astype(_wide(x))
    mean = _sums(wide, tuned=tuned)[0] / count
    return mean, _sums((wide - mean) ** 2, tuned=tuned)[0] / count


def normalise(
    x: Array, mean: Array, var: Array, scale: Array, bias: Array, *, eps: float
) -> Array:
    """`(x - mean) / sqrt(var + eps) * scale + bias`, in float32.

    Args:
      x: [B, H, W, C].
      mean, var, scale, bias: [C].
      eps: added to the variance.

    Returns:
      [B, H, W, C] in the type of `x`.
    """
    wide = x.astype(_wide(x))
    return ((wide - mean) * (lax.rsqrt(var + eps) * scale) + bias).astype(x.dtype)


def batch_norm(
    x: Array, scale: Array, bias: Array, *, eps: float, lowering: Lowering = "auto"
) -> tuple[Array, Array, Array]:
    """Normalises by the batch's own moments; its gradient takes two reductions.

    With `c = x - mean` and `r = 1 / sqrt(var + eps)`, Ioffe and Szegedy (2015) give
    `dx = r scale (dy - mean(dy) - c r^2 mean(dy c))`.

    Args:
      x: [B, H, W, C].
      scale, bias: [C].
      eps: added to the variance.
      lowering: "auto", "xla" or "tuned".

    Returns:
      y [B, H, W, C] in the type of `x`, mean [C], biased variance [C].
    """
    if is_tuned("batch_norm", lowering):
        return _batch_norm(eps, x, scale, bias)
    mean, var = moments(x, lowering="xla")
    return normalise(x, mean, var, scale, bias, eps=eps), mean, var


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _pads(size: int, k: int, stride: int, padding: Padding) -> tuple[int, int]:
    if padding == "SAME":
        total = max((-(-size // stride) - 1) * stride + k - size, 0)
        return total // 2, total - total // 2
    return padding, padding


# --- 1x1 convolution: a matrix product over flattened pixels --------------------------


def _conv1x1(x: Array, kernel: Array, stride: int) -> Array:
    x = x[:, ::stride, ::stride]
    # Two-dimensional operands: with four, XLA:CPU fuses what comes before the product
    # into strided transposing copies.
    y = _matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0])
    return y.reshape(*x.shape[:3], -1)


@jax.custom_vjp
def _matmul(x: Array, w: Array) -> Array:
    return x @ w


def _matmul_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, w), (x, w)


def _matmul_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    return _matmul(dy, w.T), _matmul(x.T, dy)


_matmul.defvjp(_matmul_forward, _matmul_backward)


# --- windows: shifted slices forward, phases of the stride backward -------------------


class _Window(NamedTuple):
    k: int  # side
    stride: int
    pads: tuple[tuple[int, int], ...]  # (before, after) of rows and of columns
    size: tuple[int, ...]  # rows and columns of the input

    @property
    def out(self) -> tuple[int, ...]:
        return tuple(
            (n + sum(pad) - self.k) // self.stride + 1
            for n, pad in zip(self.size, self.pads, strict=True)
        )

    @property
    def taps(self) -> list[tuple[int, int]]:
        return [(u, v) for u in range(self.k) for v in range(self.k)]


def _shifts(window: _Window, x: Array, fill: float = 0.0) -> Callable:
    """Returns `(u, v) -> x at offset (u, v) of every window`, each [B, *out, C]."""
    batch, _, _, channels = x.shape
    value = jnp.array(fill, x.dtype)
    padded = lax.pad(x, value, [(0, 0, 0), *[(*p, 0) for p in window.pads], (0, 0, 0)])
    padded = _once(padded)
    step = window.stride
    rows, cols = ((n - 1) * step + 1 for n in window.out)

    def at(u: int, v: int) -> Array:
        stop = (batch, u + rows, v + cols, channels)
        return lax.slice(padded, (0, u, v, 0), stop, (1, step, step, 1))

    return at


def _scatter(
    window: _Window, arrays: Sequence[Array], term: Callable[..., Array]
) -> Array:
    """Adjoint of `_shifts`, without a scatter: sums `term` into the input's grid.

    Pixel r of the input is offset u of window i where `r + pad = i stride + u`, so
    every phase of r modulo the stride meets a fixed set of offsets.

    Args:
      window: its geometry.
      arrays: each [B, *out, C], zero-padded and cut to the phase's windows.
      term: `(u, v, *cut arrays) -> contribution` of offset (u, v).
    """
    step, halo = window.stride, window.k
    padding = [(0, 0), (halo, halo), (halo, halo), (0, 0)]
    padded = [_once(jnp.pad(a, padding)) for a in arrays]
    rows, cols = (-(-n // step) for n in window.size)
    (top, _), (left, _) = window.pads

    def phase(p: int, q: int) -> Array:
        total = None
        for u, v in window.taps:
            i, skip_row = divmod(p + top - u, step)
            j, skip_col = divmod(q + left - v, step)
            if skip_row or skip_col:
                continue
            i, j = i + halo, j + halo
            part = term(u, v, *[a[:, i : i + rows, j : j + cols] for a in padded])
            total = part if total is None else total + part
        return total

    if step == 1:
        return phase(0, 0)
    grid = [jnp.stack([phase(p, q) for q in range(step)], 3) for p in range(step)]
    whole = jnp.stack(grid, 2)  # [B, rows, step, cols, step, C]
    whole = whole.reshape(whole.shape[0], rows * step, cols * step, -1)
    return whole[:, : window.size[0], : window.size[1]]


def _once(x: Array) -> Array:
    """Keeps XLA from computing `x` anew for every slice or consumer of it."""
    return lax.optimization_barrier(x)


# --- full convolution on a small map: a matrix product of its patches -----------------


def _conv_of_patches(window: _Window, x: Array, kernel: Array) -> Array:
    at = _shifts(window, x)
    patches = jnp.stack([at(u, v) for u, v in window.taps], 3)  # [B, *out, k k, C]
    weights = kernel.reshape(-1, kernel.shape[-1])
    y = _matmul(patches.reshape(-1, len(weights)), weights)
    return y.reshape(*patches.shape[:3], -1)


# --- strided convolution of an image: blocks of pixels become channels ----------------


def _conv_of_blocks(window: _Window, x: Array, kernel: Array) -> Array:
    """Space to depth: stride 1 over blocks whose channels fill a matrix unit."""
    batch, _, _, channels = x.shape
    step, taps = window.stride, -(-window.k // window.stride)
    rows, cols = (n + taps - 1 for n in window.out)  # Blocks that are read.
    pads = [
        (before, blocks * step - before - size, 0)
        for blocks, (before, _), size in zip(
            (rows, cols), window.pads, window.size, strict=True
        )
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    x = x.reshape(batch, rows, step, cols, step, channels).swapaxes(2, 3)
    missing = (0, taps * step - window.k)
    kernel = jnp.pad(kernel, (missing, missing, (0, 0), (0, 0)))
    kernel = kernel.reshape(taps, step, taps, step, channels, -1).swapaxes(1, 2)
    return lax.conv_general_dilated(
        x.reshape(batch, rows, cols, -1),
        kernel.reshape(taps, taps, step * step * channels, -1),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


# --- depthwise convolution: y, dx and dw are the three faces of one trilinear form ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise(window: _Window, x: Array, w: Array) -> Array:
    at, wide = _shifts(window, x), _wide(x)
    y = sum(at(u, v).astype(wide) * w[u, v].astype(wide) for u, v in window.taps)
    return _once(y.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise_dx(window: _Window, dy: Array, w: Array) -> Array:
    wide = _wide(dy)

    def term(u: int, v: int, dy: Array) -> Array:
        return dy.astype(wide) * w[u, v].astype(wide)

    return _once(_scatter(window, (dy,), term).astype(dy.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise_dw(window: _Window, x: Array, dy: Array) -> Array:
    at, wide = _shifts(window, x), _wide(x)
    dy = _once(dy.astype(wide))
    sums = _sums(*(at(u, v).astype(wide) * dy for u, v in window.taps), tuned=True)
    return jnp.stack(sums).reshape(window.k, window.k, -1).astype(x.dtype)


def _pair(form: Callable) -> Callable:
    return lambda window, a, b: (form(window, a, b), (a, b))


_depthwise.defvjp(
    _pair(_depthwise),
    lambda window, saved, dy: (
        _depthwise_dx(window, dy, saved[1]),
        _depthwise_dw(window, saved[0], dy),
    ),
)
_depthwise_dx.defvjp(
    _pair(_depthwise_dx),
    lambda window, saved, x: (
        _depthwise(window, x, saved[1]),
        _depthwise_dw(window, x, saved[0]),
    ),
)
_depthwise_dw.defvjp(
    _pair(_depthwise_dw),
    lambda window, saved, w: (
        _depthwise_dx(window, saved[1], w),
        _depthwise(window, saved[0], w),
    ),
)


# --- max pool: the place of each maximum as a byte ------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_pool(window: _Window, x: Array) -> Array:
    at = _shifts(window, x, -jnp.inf)
    return functools.reduce(jnp.maximum, (at(u, v) for u, v in window.taps))


def _max_pool_forward(window: _Window, x: Array) -> tuple[Array, Array]:
    at = _shifts(window, lax.stop_gradient(x), -jnp.inf)
    best, place = at(0, 0), jnp.zeros((), jnp.uint8)
    for index, (u, v) in enumerate(window.taps):
        value = at(u, v)
        place = jnp.where(value > best, jnp.uint8(index), place)
        best = jnp.maximum(best, value)
    return _max_pool(window, x), place


def _max_pool_backward(window: _Window, place: Array, dy: Array) -> tuple[Array]:
    def term(u: int, v: int, dy: Array, place: Array) -> Array:
        return jnp.where(place == window.k * u + v, dy, jnp.zeros((), dy.dtype))

    return (_scatter(window, (dy, place), term),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


# --- sums over batch and space, batch norm --------------------------------------------


def _sums(*arrays: Array, tuned: bool) -> tuple[Array, ...]:
    """Channel sums of several [B, H, W, C] arrays of one shape."""
    if tuned:
        return _column_sums(arrays[0].shape, arrays)
    return tuple(a.sum((0, 1, 2)) for a in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _column_sums(
    shape: tuple[int, ...], arrays: tuple[Array, ...]
) -> tuple[Array, ...]:
    """All sums in one pass over their sources, columns first.

    What the columns leave, [B, H, C], is what XLA:CPU can share among threads.
    """

    def add(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
        return [x + y for x, y in zip(a, b, strict=True)]

    zeros = [jnp.zeros((), a.dtype) for a in arrays]
    return tuple(r.sum((0, 1)) for r in lax.reduce(list(arrays), zeros, add, (2,)))


_column_sums.defvjp(
    lambda shape, arrays: (_column_sums(shape, arrays), None),
    lambda shape, _, sums: (tuple(jnp.broadcast_to(s, shape) for s in sums),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _batch_norm(
    eps: float, x: Array, scale: Array, bias: Array
) -> tuple[Array, Array, Array]:
    mean, var = moments(x, lowering="tuned")
    return normalise(x, mean, var, scale, bias, eps=eps), mean, var


def _batch_norm_forward(eps: float, x: Array, scale: Array, bias: Array) -> tuple:
    y, mean, var = _batch_norm(eps, x, scale, bias)
    return (y, mean, var), (x, mean, var, scale)


def _batch_norm_backward(eps: float, saved: tuple, cotangents: tuple) -> tuple:
    x, mean, var, scale = saved
    dy, dmean, dvar = cotangents
    count = x.size // x.shape[-1]
    centred, dy = x.astype(mean.dtype) - mean, dy.astype(mean.dtype)
    inverse = lax.rsqrt(var + eps)
    total, moment = _sums(dy, dy * centred, tuned=True)
    slope = (2 * dvar - inverse**3 * scale * moment) / count
    shift = (dmean - inverse * scale * total) / count
    dx = dy * (inverse * scale) + centred * slope + shift
    return dx.astype(x.dtype), moment * inverse, total


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)
