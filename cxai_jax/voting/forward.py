"""The forward passes that test-time voting is made of, from a backbone and a config.

The rules of voting are in rules.py, which knows no model; the whole of it as one graph
is `make_predict_step`; what stops early is put together by `inference.predictor`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from cxai_jax.data.augment import Scale, normalise
from cxai_jax.maps.cam import of_class
from cxai_jax.types import Array, PyTree
from cxai_jax.voting import rules
from cxai_jax.voting.prefix import Crops, plan_crops

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
    """Builds `look(variables, images, site)`: the forward pass that voting starts from.

    Images are uint8 [B, H, W, C] at the network's size, site is int32 [B] for a network
    with parts of each site. Returns a dict: logits and
    probs float32 [B, K], class_maps float32 [B, h, w, K], pooled float32 [B, D], the
    mean of the features; with tta_config.k > 0 also
    what the votes need, `masks` from rules.plan_masks, and where the first layers are
    reused their map, prefix.
    """

    def look(variables, images, site=None):
        apply = functools.partial(model.apply, variables)
        images, more = normalise(images, scale.mean, scale.std), {}
        if prefix_crops(model, images.shape[1], tta_config):
            more["prefix"] = apply(images, "eval", site, method="prefix")
            logits, out = apply(more["prefix"], "eval", site, method="from_prefix")
        else:
            logits, out = apply(images, "eval", site)
        logits = logits.astype(jnp.float32)
        seen = {
            "logits": logits,
            "probs": jax.nn.softmax(logits),
            "class_maps": out.class_maps,
            "pooled": out.features.astype(jnp.float32).mean((1, 2)),
        }
        if tta_config.k:
            grid = images.shape[1] // tta_config.patch
            cells = rules.rank_cells(
                of_class(out.class_maps, logits.argmax(-1)),
                grid=grid,
                k=tta_config.k,
                patch=tta_config.patch,
            )
            masks = rules.plan_masks(images, cells, grid=grid, fill=tta_config.fill)
            seen |= {"masks": masks} | more
        return seen

    return look


def make_vote_forward(model: nn.Module) -> Callable:
    """Builds `forward(variables, images, site) -> probs [N, K]`, images normalised."""

    def forward(variables, images, site=None):
        logits, _ = model.apply(variables, images, "eval", site)
        return jax.nn.softmax(logits.astype(jnp.float32))

    return forward


def of_variants(site: Array | None, variants: Array) -> Array | None:
    """Site of each variant [N, ...] of B images, where those of an image are together.

    Args:
      site: of the images, int32 [B] or None.
    """
    return None if site is None else jnp.repeat(site, len(variants) // len(site))


def split_forward(
    model: nn.Module, variables: PyTree, crops: Crops, site: Array | None = None
) -> rules.Reuse:
    """`make_vote_forward` in two parts, with its variables and sites filled in."""

    def prefix(images):
        own = of_variants(site, images)
        return model.apply(variables, images, "eval", own, method="prefix")

    def suffix(maps):
        own = of_variants(site, maps)
        logits, _ = model.apply(variables, maps, "eval", own, method="from_prefix")
        return jax.nn.softmax(logits.astype(jnp.float32))

    return rules.Reuse(prefix=prefix, suffix=suffix, crops=crops)


def make_next_votes(model: nn.Module, crops: Crops) -> Callable:
    """Builds `forward(variables, site, masks, carried, rows, counts)`.

    It is `rules.next_votes_of`, for early exit with the first layers reused.
    """

    def forward(variables, site, masks, carried, rows, counts):
        own = None if site is None else site[rows]
        split = split_forward(model, variables, crops, own)
        return rules.next_votes_of(split, masks, carried, rows, counts)

    return forward


def make_predict_step(model: nn.Module, scale: Scale, tta_config) -> Callable:
    """Builds `predict(variables, images, site) -> {logits, probs, class_maps, pooled}`.

    One graph. As `make_first_look`, but probs are p_0 .. p_k of the test-time masks,
    float32 [B, k+1, K]: [B, 1, K] where tta_config.k is 0. Every mask is run, so that
    any smaller k and any theta can be read off afterwards.
    """
    look = make_first_look(model, scale, tta_config)
    forward = make_vote_forward(model)

    def predict(variables, images, site=None):
        seen = look(variables, images, site)
        probs, reuse = seen["probs"][:, None], None
        if crops := prefix_crops(model, images.shape[1], tta_config):
            reuse = split_forward(model, variables, crops, site), seen["prefix"]
        if tta_config.k:
            probs = rules.masked_probs(
                lambda masked: forward(variables, masked, of_variants(site, masked)),
                seen["masks"].images,
                seen["masks"].cells,
                seen["probs"],
                grid=images.shape[1] // tta_config.patch,
                fill=tta_config.fill,
                chunk=tta_config.chunk,
                reuse=reuse,
            )
        kept = {name: seen[name] for name in ("logits", "class_maps", "pooled")}
        return kept | {"probs": probs}

    return predict


def make_voting_step(model: nn.Module, scale: Scale, tta_config) -> Callable:
    """As `make_predict_step` with the count of the votes, still one graph.

    With tta_config.k > 0 the dict also holds `votes`, a rules.Votes.
    """
    predict = make_predict_step(model, scale, tta_config)

    def vote(variables, images, site=None):
        out = predict(variables, images, site)
        if tta_config.k:
            votes = rules.votes_for(
                out["probs"], theta=tta_config.theta, k=tta_config.k
            )
            out["votes"] = votes
        return out

    return vote
