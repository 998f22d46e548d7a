"""The few types that cross module borders, and the legend of shape letters.

Shape letters, used in every docstring: B batch, H W pixels, h w grid of the last
feature map, C channels, D features, K classes, N cells or samples, n patches per
group (CPE), m maps (alignment), k masks (TTA). Images are NHWC.

The mode says how batch norm behaves and is an argument, never an attribute:
  "train"    batch statistics, with gradient; running statistics are updated.
  "explain"  the same batch statistics behind a stop-gradient, nothing updated: the
             gradient of one image's logit reaches that image alone.
  "eval"     running statistics.
"""

from typing import Any, Literal, NamedTuple

import jax

Mode = Literal["train", "explain", "eval"]
Array = jax.Array
PyTree = Any


class Batch(NamedTuple):
    """What one step receives. Images stay uint8 until they are on the device."""

    images: Array  # uint8 [B, Hc, Wc, C], C = 1 or 3, top-left aligned on a canvas
    sizes: Array  # int32 [B, 2], valid rows and columns of each canvas
    labels: Array | None  # int32 [B]; None in an unlabelled stream
    sites: Array  # int32 [B]
    valid: Array  # bool [B], False marks rows that only pad the last batch
    masks: Array | None = None  # uint8 [B, Hc, Wc, 1], lung is 255; None if unused


class Outputs(NamedTuple):
    """What a backbone returns beside its logits."""

    lower: Array  # [B, 2h, 2w, D3], one stage before the last
    features: Array  # [B, h, w, D], input of the global average pool
    class_maps: Array  # float32 [B, h, w, K], head applied to the un-pooled map
