"""SnapMix and its relatives: images and label weights mixed together, on the device.

SnapMix is Huang et al. 2021 as the CT paper (Ali et al.) uses it; CutMix, attentive
CutMix ("as_cutmix"), MixUp and CutOut follow its repository. Every shape is static: a
box is four numbers, and pasting is two gathers of two taps each. A batch that is not
mixed is an empty box and the identity permutation, so `prob` needs no branch. All in
one file, longer than others: the five differ in a few lines over the same parts.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cxai_jax.maps.cam import is_flat, semantic_percent_map
from cxai_jax.maps.grid import height_and_width
from cxai_jax.types import Array

SAME_CLASS = ("double", "interp")
BOXES = ("batch", "sample")
FEWEST = 8  # Images in a group of partners: one in eight is then its own.


class Mixed(NamedTuple):
    """A mixed batch; the loss is weight_a CE(labels_a) + weight_b CE(labels_b)."""

    images: Array  # float32 [B, H, W, C]
    labels_a: Array  # int [B], of the receiving image
    labels_b: Array  # int [B], of the donor
    weight_a: Array  # float32 [B]
    weight_b: Array  # float32 [B]
    permutation: Array  # int32 [B], row of each image's donor


def sample_box(key: Array, lam: Array | float, size: int | tuple[int, int]) -> Array:
    """A box of side int(size * sqrt(1 - lam)) around a uniform centre, clipped.

    CutMix's box (Yun et al. 2019). Clipping makes it smaller: its mean area is 0.3185
    of the image for lam ~ Beta(1, 1).

    Args:
      key: PRNG key.
      lam: in [0, 1], nominal share of the image that stays.
      size: pixels, H = W or (H, W).

    Returns:
      int32 [4], (row0, col0, row1, col1), half open; may be empty.
    """
    size = jnp.array(height_and_width(size), jnp.int32)
    cut = size.astype(jnp.float32) * jnp.sqrt(1.0 - lam)
    half = cut.astype(jnp.int32) // 2
    centre = jax.random.randint(key, (2,), 0, size)
    low, high = jnp.maximum(centre - half, 0), jnp.minimum(centre + half, size)
    return jnp.concatenate([low, high]).astype(jnp.int32)


def snapmix(
    images: Array,
    labels: Array,
    cam: Array,
    *,
    permutation: Array,
    box_dst: Array,
    box_src: Array,
    same_class: str = "double",
) -> Mixed:
    """Pastes the donor's source box over the destination box; weights by evidence.

    With S the semantic percent map, A the destination, B the source box, d the donor:

        weight_a = 1 - sum_A S,    weight_b = sum_B S_d

    A pair of one class gets weight_a + weight_b on both sides ("double", as published),
    or keeps its own ("interp", decision A6). Where S does not exist because the map is
    constant, |A| / HW stands in for either sum, and for both of a doubled pair. If
    either box is empty nothing is pasted and the weights are 1 and 0.

    Args:
      images: [B, H, W, C], uint8 or float.
      labels: int [B].
      cam: class activation map of each image's own label [B, h, w].
      permutation: row of each image's donor, int [B]; or [G, B/G] rows within each of
        G contiguous groups, which lets a batch sharded into G stay where it is.
      box_dst: (row0, col0, row1, col1) in pixels, half open, int [4] or [B, 4].
      box_src: likewise, in the donor.
      same_class: "double" or "interp".

    Returns:
      Mixed; the images are float32 and the weights carry no gradient.

    Raises:
      ValueError: for an unknown `same_class` or shapes that disagree.
    """
    if same_class not in SAME_CLASS:
        raise ValueError(
            f"same_class is {same_class!r}; known: {', '.join(SAME_CLASS)}"
        )
    if cam.ndim != 3 or cam.shape[0] != images.shape[0]:
        raise ValueError(
            f"cam has shape {cam.shape}, expected [B, h, w] with B = {images.shape[0]}"
        )
    cam = jax.lax.stop_gradient(cam)
    box_dst, box_src = whole_batch(box_dst, labels), whole_batch(box_src, labels)
    labels_b, cam_b = partner(labels, permutation), partner(cam, permutation)
    size = images.shape[1:3]
    area = box_area(box_dst) / (size[0] * size[1])
    flat_a, flat_b = is_flat(cam), is_flat(cam_b)
    weight_a = 1.0 - jnp.where(flat_a, area, evidence(cam, box_dst, size))
    weight_b = jnp.where(flat_b, area, evidence(cam_b, box_src, size))
    if same_class == "double":
        same = labels == labels_b
        total = weight_a + weight_b
        # A sum with a missing map is missing on both sides, hence the areas on both.
        missing = flat_a | flat_b
        weight_a = jnp.where(same, jnp.where(missing, 1 - area, total), weight_a)
        weight_b = jnp.where(same, jnp.where(missing, area, total), weight_b)
    mixes = (box_area(box_dst) > 0) & (box_area(box_src) > 0)
    return Mixed(
        images=paste(images, partner(images, permutation), box_dst, box_src),
        labels_a=labels,
        labels_b=labels_b,
        weight_a=jnp.where(mixes, weight_a, 1.0),
        weight_b=jnp.where(mixes, weight_b, 0.0),
        permutation=batch_rows(permutation),
    )


def area_mix(
    images: Array,
    labels: Array,
    *,
    permutation: Array,
    box_dst: Array,
    box_src: Array,
) -> Mixed:
    """SnapMix's paste with the area as weight, weight_b = |A| / HW.

    CutMix (Yun et al. 2019) where both boxes are the same, attentive CutMix where they
    differ. Arguments as in `snapmix`.
    """
    box_dst, box_src = whole_batch(box_dst, labels), whole_batch(box_src, labels)
    mixes = (box_area(box_dst) > 0) & (box_area(box_src) > 0)
    share = box_area(box_dst) / (images.shape[1] * images.shape[2])
    weight_b = jnp.where(mixes, share, 0.0)
    return Mixed(
        images=paste(images, partner(images, permutation), box_dst, box_src),
        labels_a=labels,
        labels_b=partner(labels, permutation),
        weight_a=1.0 - weight_b,
        weight_b=weight_b,
        permutation=batch_rows(permutation),
    )


def unmixed(images: Array, labels: Array) -> Mixed:
    """The batch as it is, with all weight on its own labels."""
    return Mixed(
        images=images.astype(jnp.float32),
        labels_a=labels,
        labels_b=labels,
        weight_a=jnp.ones(labels.shape, jnp.float32),
        weight_b=jnp.zeros(labels.shape, jnp.float32),
        permutation=jnp.arange(labels.shape[0], dtype=jnp.int32),
    )


def whole_batch(box: Array, labels: Array) -> Array:
    """One box [4] or a box per image [B, 4] -> int32 [B, 4]."""
    return jnp.broadcast_to(jnp.asarray(box, jnp.int32), (labels.shape[0], 4))


def box_area(box: Array) -> Array:
    """Pixels in each box [B, 4] -> int32 [B]; 0 for an empty one."""
    sides = jnp.maximum(box[:, 2:] - box[:, :2], 0)
    return sides[:, 0] * sides[:, 1]


def box_mask(box: Array, size: tuple[int, int]) -> Array:
    """Which pixels lie in each box [B, 4] -> bool [B, H, W]."""
    rows, columns = jnp.arange(size[0])[None], jnp.arange(size[1])[None]
    row0, col0, row1, col1 = (box[:, i, None] for i in range(4))
    in_rows = (rows >= row0) & (rows < row1)
    in_columns = (columns >= col0) & (columns < col1)
    return in_rows[:, :, None] & in_columns[:, None, :]


def evidence(cam: Array, box: Array, size: tuple[int, int]) -> Array:
    """Share of the semantic percent map inside each box [B, 4] -> float32 [B]."""
    percent = semantic_percent_map(cam, size)
    return jnp.sum(jnp.where(box_mask(box, size), percent, 0.0), axis=(1, 2))


def paste(images: Array, donors: Array, box_dst: Array, box_src: Array) -> Array:
    """Resizes each donor's source box onto the destination box of its image.

    Bilinear with aligned corners: row i of an n-row destination reads source row
    b + i (m - 1) / (n - 1). Gathers take a quarter of the time of two interpolation
    matmuls on a CPU (4.6 against 18.6 ms, 8 images of 224x224x3, 2 cores).

    Args:
      images: [B, H, W, C].
      donors: [B, H, W, C].
      box_dst: int [B, 4]; an empty one, or an empty source, leaves the image.
      box_src: int [B, 4].

    Returns:
      float32 [B, H, W, C].
    """
    size = images.shape[1:3]

    def resize(donor, dst, src):
        for axis in (0, 1):
            low, high, share = taps(dst[axis::2], src[axis::2], size[axis])
            share = share.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
            below = jnp.take(donor, low, axis=axis, mode="clip").astype(jnp.float32)
            above = jnp.take(donor, high, axis=axis, mode="clip").astype(jnp.float32)
            donor = (1.0 - share) * below + share * above
        return donor

    inside = box_mask(box_dst, size) & (box_area(box_src) > 0)[:, None, None]
    pasted = jax.vmap(resize)(donors, box_dst, box_src)
    return jnp.where(inside[..., None], pasted, images.astype(jnp.float32))


def taps(dst: Array, src: Array, size: int) -> tuple[Array, Array, Array]:
    """The two source pixels that each of `size` destination pixels reads.

    Args:
      dst: int [2], first and one past the last destination pixel.
      src: int [2], likewise in the source.
      size: pixels along the axis.

    Returns:
      Lower and upper source pixel, int32 [size], and the upper one's share, float32
      [size]. Pixels outside `dst` read something harmless.
    """
    steps = jnp.maximum(dst[1] - dst[0] - 1, 1)
    # Whole numbers up to the last division keep the share exact to float32.
    along = jnp.clip(jnp.arange(size) - dst[0], 0, steps) * (src[1] - src[0] - 1)
    low = src[0] + along // steps
    return low, jnp.minimum(low + 1, src[1] - 1), (along % steps) / steps


def partner(rows: Array, permutation: Array) -> Array:
    """Each row's partner; with permutation [G, B/G] nothing leaves its group."""
    local = jnp.atleast_2d(permutation)
    grouped = rows.reshape(*local.shape, *rows.shape[1:])
    return jax.vmap(lambda group, order: group[order])(grouped, local).reshape(
        rows.shape
    )


def group_count(given: int, batch: int, devices: int) -> int:
    """Into how many groups `config.mix.groups` divides a batch for its partners.

    Where it is 0: one per device if that leaves `FEWEST` images in each, so that none
    moves; else as many as do, which fetches partners from other devices. In a smaller
    group too many images would be their own partners, one in each on average.

    Args:
      given: the field.
      batch: images mixed at once, of a micro-batch where steps accumulate.
      devices: of the mesh; they divide the batch.

    Raises:
      ValueError: if `given` does not divide the batch.
    """
    if given < 0 or (given and batch % given):
        raise ValueError(
            f"config.mix.groups={given} does not divide the {batch} images of a batch; "
            "set it to a divisor, or to 0"
        )
    fitting = (
        n for n in range(devices, 0, -1) if devices % n == 0 and batch // n >= FEWEST
    )
    groups = given or next(fitting, 1)
    if batch // groups < FEWEST:
        logging.warning(
            "images are mixed in groups of fewer than %d images (%d): many will be "
            "their own partners; raise config.train.batch_size or lower "
            "config.train.accumulate or config.mix.groups",
            FEWEST,
            batch // groups,
        )
    return groups


def batch_rows(permutation: Array) -> Array:
    """A permutation [B], or [G, B/G] within groups, as rows of the batch: int32 [B]."""
    local = jnp.atleast_2d(permutation).astype(jnp.int32)
    groups, length = local.shape
    return (local + length * jnp.arange(groups)[:, None]).reshape(-1)


class Draw(NamedTuple):
    """One step's randomness. Where nothing is to be mixed, lam is 1: empty boxes."""

    mixes: Array  # bool scalar
    permutation: Array  # int32 [G, B/G], rows within each group
    lam: Array  # float32 [2, B], of the destination and of the source
    keys: Array  # [2, B], for the two boxes


def draw(
    key: Array, batch: int, *, prob: float, beta: float, boxes: str, groups: int
) -> Draw:
    """Draws once per batch ("batch", as published) or per image ("sample").

    Args:
      key: PRNG key.
      batch: B.
      prob: probability that the batch is mixed at all.
      beta: both parameters of lam's Beta distribution.
      boxes: "batch" or "sample"; the permutation is per batch either way.
      groups: contiguous groups of equal size that partners stay in.

    Raises:
      ValueError: for an unknown `boxes`, groups that do not divide B, or prob or beta
        out of range.
    """
    if boxes not in BOXES:
        raise ValueError(f"boxes is {boxes!r}; known: {', '.join(BOXES)}")
    if groups < 1 or batch % groups:
        raise ValueError(f"groups is {groups}, it must divide the batch of {batch}")
    if not 0 <= prob <= 1 or beta <= 0:
        raise ValueError(
            f"prob is {prob} and beta {beta}; expected 0 <= prob <= 1 and beta > 0"
        )
    key_mixes, key_permutation, key_lam, key_boxes = jax.random.split(key, 4)
    mixes = jax.random.bernoulli(key_mixes, prob)
    permutation = jax.vmap(lambda k: jax.random.permutation(k, batch // groups))(
        jax.random.split(key_permutation, groups)
    )
    count = 1 if boxes == "batch" else batch
    if beta == 1:  # Uniform; the general sampler loops, which stalls a GPU every step.
        lam = jax.random.uniform(key_lam, (2, count))
    else:
        lam = jax.random.beta(key_lam, beta, beta, (2, count))
    keys = jax.random.split(key_boxes, (2, count))
    return Draw(
        mixes=mixes,
        permutation=jnp.where(mixes, permutation, jnp.arange(batch // groups)[None]),
        lam=jnp.where(mixes, jnp.broadcast_to(lam, (2, batch)), 1.0),
        keys=jnp.broadcast_to(keys, (2, batch, *keys.shape[2:])),
    )


def sample_boxes(keys: Array, lam: Array, images: Array) -> Array:
    """`sample_box` for every image: keys [B], lam [B] -> int32 [B, 4]."""
    size = images.shape[1:3]
    return jax.vmap(lambda key, lam: sample_box(key, lam, size))(keys, lam)


def random_snapmix(
    key: Array,
    images: Array,
    labels: Array,
    cam: Array,
    *,
    prob: float,
    beta: float,
    same_class: str,
    boxes: str,
    groups: int,
) -> Mixed:
    """`snapmix` with two independent boxes; every entry of `MIXES` has this signature.

    Args:
      key: PRNG key.
      images: [B, H, W, C], uint8 or float.
      labels: int [B].
      cam: class activation map of each image's own label [B, h, w]; only SnapMix reads
        it.
      prob: probability that the batch is mixed.
      beta: both parameters of lam's Beta distribution.
      same_class: "double" or "interp", SnapMix only.
      boxes: "batch" or "sample", how often lam and the boxes are drawn.
      groups: partners come from the same of `groups` contiguous parts of the batch.
    """
    drawn = draw(key, len(labels), prob=prob, beta=beta, boxes=boxes, groups=groups)
    box_dst, box_src = (
        sample_boxes(drawn.keys[i], drawn.lam[i], images) for i in (0, 1)
    )
    return snapmix(
        images,
        labels,
        cam,
        permutation=drawn.permutation,
        box_dst=box_dst,
        box_src=box_src,
        same_class=same_class,
    )


def random_cutmix(
    key, images, labels, cam, *, prob, beta, same_class, boxes, groups
) -> Mixed:
    """Copies one box from the donor, in place and unscaled (Yun et al. 2019)."""
    drawn = draw(key, len(labels), prob=prob, beta=beta, boxes=boxes, groups=groups)
    box = sample_boxes(drawn.keys[0], drawn.lam[0], images)
    return area_mix(
        images, labels, permutation=drawn.permutation, box_dst=box, box_src=box
    )


def random_as_cutmix(
    key, images, labels, cam, *, prob, beta, same_class, boxes, groups
) -> Mixed:
    """Two boxes of one lam, resized; only if both have more than 4 pixels."""
    drawn = draw(key, len(labels), prob=prob, beta=beta, boxes=boxes, groups=groups)
    box_dst, box_src = (
        sample_boxes(drawn.keys[i], drawn.lam[0], images) for i in (0, 1)
    )
    large = (box_area(box_dst) > 4) & (box_area(box_src) > 4)
    return area_mix(
        images,
        labels,
        permutation=drawn.permutation,
        box_dst=jnp.where(large[:, None], box_dst, 0),
        box_src=box_src,
    )


def random_mixup(
    key, images, labels, cam, *, prob, beta, same_class, boxes, groups
) -> Mixed:
    """lam x + (1 - lam) x_donor, labels likewise (Zhang et al. 2018)."""
    drawn = draw(key, len(labels), prob=prob, beta=beta, boxes=boxes, groups=groups)
    lam, images = drawn.lam[0], images.astype(jnp.float32)
    donors = partner(images, drawn.permutation)
    return Mixed(
        images=donors + lam[:, None, None, None] * (images - donors),
        labels_a=labels,
        labels_b=partner(labels, drawn.permutation),
        weight_a=lam,
        weight_b=1.0 - lam,
        permutation=batch_rows(drawn.permutation),
    )


def random_cutout(
    key, images, labels, cam, *, prob, beta, same_class, boxes, groups
) -> Mixed:
    """Sets a box of nominally 25 % to 0 (DeVries and Taylor 2017); labels stay.

    A lung mask, the fourth channel, is left whole: the lungs are still there.
    """
    drawn = draw(key, len(labels), prob=prob, beta=beta, boxes=boxes, groups=groups)
    lam = jnp.where(drawn.mixes, 0.75, jnp.ones(labels.shape))
    hole = box_mask(sample_boxes(drawn.keys[0], lam, images), images.shape[1:3])
    cut = hole[..., None] & (jnp.arange(images.shape[3]) < 3)
    return unmixed(jnp.where(cut, 0, images), labels)


def no_mix(key, images, labels, cam, *, prob, beta, same_class, boxes, groups) -> Mixed:
    """Leaves the batch as it is."""
    return unmixed(images, labels)


MIXES: dict[str, Callable[..., Mixed]] = {
    "none": no_mix,
    "snapmix": random_snapmix,
    "cutmix": random_cutmix,
    "as_cutmix": random_as_cutmix,
    "mixup": random_mixup,
    "cutout": random_cutout,
}
