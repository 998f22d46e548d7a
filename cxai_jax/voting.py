"""The forward passes that test-time voting is made of, from a backbone and a config.

The rules of voting are in tta.py, which knows no model; the whole of it as one graph is
`steps.make_predict_step`, and what stops early is put together by `trained.Predictor`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from cxai_jax import tta
from cxai_jax.data.augment import Scale, normalise
from cxai_jax.maps.cam import of_class
from cxai_jax.reuse import Crops, plan_crops
from cxai_jax.types import PyTree

PREFIX_REUSE = ("auto", "on", "off")


def prefix_crops(model: nn.Module, size: int, tta_config) -> Crops | None:
    """How `tta.prefix_reuse` applies to a backbone and images of `size` pixels.

    "auto" takes it on CPUs, where it was measured to gain, if the crops have at most
    half of the image's pixels.

    Returns:
      The crops, or None to run every variant as a whole.

    Raises:
      ValueError: for an unknown value, or "on" where it is impossible.
    """
    wanted, windows = tta_config.prefix_reuse, model.prefix_windows()
    if wanted not in PREFIX_REUSE:
        raise ValueError(
            f"config.tta.prefix_reuse is {wanted!r}; known: {', '.join(PREFIX_REUSE)}"
        )
    if not tta_config.k or wanted == "off":
        return None
    if not windows and wanted == "on":
        raise ValueError(
            f"config.tta.prefix_reuse=on: {type(model).__name__} declares no prefix; "
            "ResNets do, for others set it to auto or off"
        )
    if not windows or (wanted == "auto" and jax.default_backend() != "cpu"):
        return None
    crops = plan_crops(windows, size, size // tta_config.patch)
    if crops.share <= 0.5:
        return crops
    if wanted == "on":
        raise ValueError(
            f"config.tta.prefix_reuse=on: a cell of {tta_config.patch} pixels needs "
            f"crops of {crops.side} pixels, too large to gain on images of {size}; set "
            "it to auto or off"
        )
    return None


def make_first_look(model: nn.Module, scale: Scale, tta_config) -> Callable:
    """Builds `look(variables, images)`: the forward pass that voting starts from.

    Images are uint8 [B, H, W, C] at the network's size. Returns a dict: logits and
    probs float32 [B, K], class_maps float32 [B, h, w, K]; with tta_config.k > 0 also
    what the votes need, the normalised images and cells int32 [B, k], and where the
    first layers are reused their map, prefix.
    """

    def look(variables, images):
        apply = functools.partial(model.apply, variables)
        images, more = normalise(images, scale.mean, scale.std), {}
        if prefix_crops(model, images.shape[1], tta_config):
            more["prefix"] = apply(images, "eval", method="prefix")
            logits, out = apply(more["prefix"], "eval", method="from_prefix")
        else:
            logits, out = apply(images, "eval")
        logits = logits.astype(jnp.float32)
        seen = {
            "logits": logits,
            "probs": jax.nn.softmax(logits),
            "class_maps": out.class_maps,
        }
        if tta_config.k:
            cells = tta.rank_cells(
                of_class(out.class_maps, logits.argmax(-1)),
                grid=images.shape[1] // tta_config.patch,
                k=tta_config.k,
                patch=tta_config.patch,
            )
            seen |= {"images": images, "cells": cells} | more
        return seen

    return look


def make_vote_forward(model: nn.Module) -> Callable:
    """Builds `forward(variables, images) -> probs [N, K]` of normalised images."""

    def forward(variables, images):
        logits, _ = model.apply(variables, images, "eval")
        return jax.nn.softmax(logits.astype(jnp.float32))

    return forward


def split_forward(model: nn.Module, variables: PyTree, crops: Crops) -> tta.Reuse:
    """`make_vote_forward` in two parts, with its variables filled in."""

    def suffix(maps):
        logits, _ = model.apply(variables, maps, "eval", method="from_prefix")
        return jax.nn.softmax(logits.astype(jnp.float32))

    return tta.Reuse(
        prefix=lambda images: model.apply(variables, images, "eval", method="prefix"),
        suffix=suffix,
        crops=crops,
    )


def make_next_votes(model: nn.Module, crops: Crops) -> Callable:
    """Builds `forward(variables, masks, carried, rows, counts)`.

    It is `tta.next_votes_of`, for early exit with the first layers reused.
    """

    def forward(variables, *given):
        return tta.next_votes_of(split_forward(model, variables, crops), *given)

    return forward
