"""How good an explanation is: against a mask, against the model, against another.

Every metric gives one value per image, [B], and NaN where it is undefined (an empty
mask, a map that is not finite), never a flattering 0 or 1; `mean_and_excluded` counts
those. Ties in a map score their expected value under random order, so an empty
(constant) map scores as a uniform one and not by the accident of a sort.

Maps are rectified here (S+ = max(S, 0)) where a metric speaks of energy. The metrics
that call the model take `probabilities`, images [B, H, W, C] -> [B, K], are pure
JAX and may be jitted as a whole. Read agreement together with entropy and
the empty fraction: agreement up with entropy up is collapse, not success.

One list of small functions, longer than other files so that all can be compared.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax.maps.imputation import impute
from cxai_jax.types import Array, PyTree

Probabilities = Callable[[Array], Array]


def mean_and_excluded(values: np.ndarray) -> tuple[float, int]:
    """Mean of the defined values [B], and how many undefined (NaN) ones it leaves out.

    The mean of none is NaN.
    """
    defined = ~np.isnan(values)
    mean = float(values[defined].mean()) if defined.any() else float("nan")
    return mean, int((~defined).sum())


# Against a mask.


def pointing_game(
    maps: np.ndarray, masks: np.ndarray, *, tolerance: float = 0.0
) -> np.ndarray:
    """1[argmax_u S(u) in M] (Zhang et al. 2016); also the "hit rate" of Saporta 2022.

    Args:
      maps: [B, H, W].
      masks: bool or 0/1 [B, H, W].
      tolerance: pixels by which the maximum may miss the mask (TorchRay: 15).

    Returns:
      [B]; the share of hits among tied maxima.
    """
    from scipy.ndimage import distance_transform_edt  # SciPy is slow to import.

    maps, masks = _cells(maps, masks)
    near = np.stack([distance_transform_edt(~m) <= tolerance for m in masks])
    top = maps == maps.max(axis=(1, 2), keepdims=True)
    hits = (top & near).sum(axis=(1, 2)) / np.maximum(top.sum(axis=(1, 2)), 1)
    return _defined(hits, maps, masks)


def energy_pointing_game(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """sum_M S+ / sum S+ (Wang et al. 2020, Score-CAM): energy inside the mask, [B].

    Also called content heat map or relevance mass accuracy. It favours large masks:
    report `energy_over_area` beside it.
    """
    maps, masks = _cells(maps, masks)
    inside = (_distribution(maps) * masks.reshape(len(masks), -1)).sum(axis=1)
    return _defined(inside, maps, masks)


def energy_over_area(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Energy pointing game over the mask's share of the image; 1 is a flat map, [B]."""
    area = np.asarray(masks, bool).mean(axis=(1, 2))
    return energy_pointing_game(maps, masks) / np.where(area > 0, area, np.nan)


def relevance_rank_accuracy(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """|topK(S) & M| / K with K = |M| (Arras et al. 2022), [B]."""
    maps, masks = _cells(maps, masks)
    result = np.full(len(maps), np.nan)
    for i, (s, m) in enumerate(zip(maps, masks, strict=True)):
        k = int(m.sum())
        if k and np.isfinite(s).all():
            threshold = np.sort(s, axis=None)[-k]
            above, tied = s > threshold, s == threshold
            share = (k - above.sum()) / tied.sum()
            result[i] = ((above & m).sum() + share * (tied & m).sum()) / k
    return result


def intersection_over_union(
    maps: np.ndarray, masks: np.ndarray, *, fraction: float = 0.5
) -> np.ndarray:
    """|{S >= t} & M| / |{S >= t} or M| with t = fraction * max S, [B].

    The threshold dominates the value: tune `fraction` per method, on validation. A map
    without positive evidence selects nothing and scores 0.
    """
    maps, masks = _cells(maps, masks)
    threshold = fraction * maps.max(axis=(1, 2), keepdims=True)
    chosen = (maps >= threshold) & (maps > 0)
    union = (chosen | masks).sum(axis=(1, 2))
    return _defined(
        (chosen & masks).sum(axis=(1, 2)) / np.maximum(union, 1), maps, masks
    )


def localisation_auc(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of S(u) against M(u) over pixels (Fawcett 2006), [B].

    Mann-Whitney form with mid-ranks; NaN for an empty and for a full mask.
    """
    from scipy.stats import rankdata

    maps, masks = _cells(maps, masks)
    flat = masks.reshape(len(masks), -1)
    ranks = rankdata(maps.reshape(len(maps), -1), axis=1)
    inside = flat.sum(axis=1)
    wins = (ranks * flat).sum(axis=1) - inside * (inside + 1) / 2
    pairs = inside * (flat.shape[1] - inside)
    return wins / np.where(pairs > 0, pairs, np.nan)


def border_mass(maps: np.ndarray, *, width: float = 0.1) -> np.ndarray:
    """Energy in the frame of `width` of each side, [B]: burnt-in text lives there."""
    _, height, columns = np.shape(maps)
    frame = np.ones((height, columns), bool)
    rows, cols = max(round(width * height), 1), max(round(width * columns), 1)
    frame[rows : height - rows, cols : columns - cols] = False
    return energy_pointing_game(maps, np.broadcast_to(frame, np.shape(maps)))


# Of one map alone.


def normalised_entropy(maps: np.ndarray) -> np.ndarray:
    """-sum p log p / log N of p = S+ / sum S+, [B]; 1 is a flat or an empty map."""
    p = _distribution(_cells(maps))
    terms = p * np.log(np.where(p > 0, p, 1))
    return -terms.sum(axis=1) / np.log(max(p.shape[1], 2))


def gini(maps: np.ndarray) -> np.ndarray:
    """sum_i (2i - n - 1) s_(i) / (n sum s) of S+ (Chalasani et al. 2020), [B].

    0 is a flat or an empty map, 1 - 1/n a single pixel.
    """
    p = np.sort(_distribution(_cells(maps)), axis=1)
    n = p.shape[1]
    return p @ (2 * np.arange(1, n + 1) - n - 1) / n


def empty_fraction(maps: np.ndarray) -> float:
    """Share of maps [B, H, W] without any positive evidence; NaN is no evidence."""
    return float((~(np.asarray(maps) > 0).any(axis=(1, 2))).mean())


# Between maps.


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of two maps [B, H, W] -> [B]; NaN if one is flat."""
    from scipy.stats import rankdata

    a, b = (rankdata(s.reshape(len(s), -1), axis=1) for s in _same_grid(a, b))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    norm = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return (a * b).sum(axis=1) / np.where(norm > 0, norm, np.nan)


def jensen_shannon(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of p = S+ / sum S+ over log 2, in [0, 1], [B].

    Without the smoothing of the loss: disjoint maps score 1, and an empty map counts
    as uniform. Subtract the spatial mean before to compare as the loss does.
    """
    p = np.stack([_distribution(s) for s in _same_grid(a, b)])
    centre = np.broadcast_to(p.mean(axis=0), p.shape)
    ratio = np.where(p > 0, p, 1) / np.where(p > 0, centre, 1)
    return (p * np.log(ratio)).sum(axis=2).mean(axis=0) / np.log(2)


def pairwise(
    maps: Mapping[str, np.ndarray],
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> dict[tuple[str, str], np.ndarray]:
    """`measure` (spearman, jensen_shannon) of every pair of named maps on one grid."""
    return {(a, b): measure(maps[a], maps[b]) for a, b in combinations(maps, 2)}


def held_out_agreement(
    maps: Mapping[str, np.ndarray], held_out: np.ndarray
) -> dict[str, np.ndarray]:
    """Spearman of each trained map with an explainer that no loss has seen.

    Agreement of the trained maps proves little by itself: it must also rise with
    occlusion or integrated gradients (PEAR, Schwarzschild et al. 2023).
    """
    return {name: spearman(s, held_out) for name, s in maps.items()}


def parameter_randomisation(
    explain: Callable[[PyTree], np.ndarray],
    params: Mapping[str, PyTree],
    fresh: Mapping[str, PyTree],
    order: Sequence[str],
) -> dict[str, np.ndarray]:
    """Sanity check of Adebayo et al. (2018): do maps depend on what was learned?

    Layers are re-initialised one after the other, from the top down, and stay so. A
    map that keeps correlating with the original shows the image, not the model.

    Args:
      explain: parameters -> maps [B, H, W].
      params: trained parameters, top-level groups by name.
      fresh: parameters of the same structure from an initialisation.
      order: names of the groups, the head first.

    Returns:
      Name of the group last replaced -> Spearman with the original map [B], signed.
    """
    missing = [name for name in order if name not in params or name not in fresh]
    if missing:
        raise ValueError(f"no parameters named {missing}; there are {sorted(params)}")
    original, current, result = explain(params), dict(params), {}
    for name in order:
        current[name] = fresh[name]
        result[name] = spearman(explain(current), original)
    return result


# Against the model.


def deletion_curve(
    probabilities: Probabilities,
    images: Array,
    maps: Array,
    labels: Array,
    *,
    step: int = 224,
    fill: float = 0.0,
    at_once: int = 32,
    whole: Array | None = None,
) -> Array:
    """Probability of the class while pixels are removed, most salient first.

    RISE (Petsiuk et al. 2018). The area below is the deletion metric: lower is better.

    Args:
      probabilities: images [N, H, W, C] -> [N, K].
      images: normalised images [B, H, W, C].
      maps: [B, H, W]; ties in reading order, so enlarge coarse maps smoothly.
      labels: int [B].
      step: pixels per point.
      fill: value of a removed pixel; 0 is the mean of normalised images.
      at_once: images per forward pass at most, all of one point at least.
      whole: the probability of the class for the whole images [B], if it is known.

    Returns:
      [B, ceil(H W / step) + 1], the first of the whole image.
    """
    if whole is None:
        whole = _of_class(probabilities(images), labels)
    finish, counts = jnp.full_like(images, fill), _counts(maps, step)[1:]
    rest = _curve(probabilities, images, finish, maps, labels, counts, at_once)
    return jnp.concatenate([whole[:, None], rest], axis=1)


def insertion_curve(
    probabilities: Probabilities,
    images: Array,
    maps: Array,
    labels: Array,
    *,
    step: int = 224,
    at_once: int = 32,
    whole: Array | None = None,
) -> Array:
    """Probability of the class while pixels return to a blurred image; see deletion.

    RISE starts from a blur of 11 pixels and sigma 5. Higher area is better. The last
    point is of the whole image.
    """
    if whole is None:
        whole = _of_class(probabilities(images), labels)
    start, counts = blurred(images), _counts(maps, step)[:-1]
    rest = _curve(probabilities, start, images, maps, labels, counts, at_once)
    return jnp.concatenate([rest, whole[:, None]], axis=1)


def area_under_curve(curve: Array) -> Array:
    """(sum_i y_i - y_0/2 - y_n/2) / n of curves [B, n + 1] -> [B] (RISE)."""
    ends = (curve[:, 0] + curve[:, -1]) / 2
    return (curve.sum(axis=1) - ends) / (curve.shape[1] - 1)


def blurred(images: Array, *, width: int = 11, sigma: float = 5.0) -> Array:
    """Gaussian blur [B, H, W, C] with a kernel of odd `width` pixels.

    Deviation: RISE pads with zeros, which darkens the border; here the kernel is
    renormalised to the pixels that exist.
    """

    def smoothing(size):
        distance = np.arange(size)[:, None] - np.arange(size)[None, :]
        kernel = np.exp(-0.5 * (distance / sigma) ** 2)
        kernel[np.abs(distance) > width // 2] = 0
        return jnp.asarray(kernel / kernel.sum(axis=1, keepdims=True), images.dtype)

    _, height, columns, _ = images.shape
    return jnp.einsum(
        "hi,wj,bijc->bhwc",
        smoothing(height),
        smoothing(columns),
        images,
        precision="highest",
    )


def masked_confidence(
    probabilities: Probabilities, images: Array, maps: Array, labels: Array
) -> tuple[Array, Array]:
    """Class probability of the image and of S+ / max S+ times the image, each [B].

    The two forwards behind `average_drop` and `average_increase`. A map without
    positive evidence leaves nothing of its image.
    """
    _check_images(images, maps)
    energy = jnp.maximum(maps, 0)
    peak = energy.max(axis=(1, 2), keepdims=True)
    kept = (energy / jnp.where(peak > 0, peak, 1))[..., None] * images
    before = probabilities(images)
    after = probabilities(kept.astype(images.dtype))
    return _of_class(before, labels), _of_class(after, labels)


def average_drop(before: Array, after: Array) -> Array:
    """max(0, Y - O) / Y per image (Grad-CAM++, Chattopadhay et al. 2018), [B].

    pytorch-grad-cam's `DropInConfidence` leaves out the division by Y.
    """
    return jnp.maximum(before - after, 0) / before


def average_increase(before: Array, after: Array) -> Array:
    """1[O > Y] per image (Grad-CAM++, Chattopadhay et al. 2018), [B]."""
    return (after > before).astype(before.dtype)


def road(
    probabilities: Probabilities,
    images: Array,
    maps: Array,
    labels: Array,
    *,
    percentiles: Sequence[float] = (10, 20, 30, 40, 50, 60, 70, 80, 90),
    noise: float = 0.01,
    seed: int = 0,
    at_once: int = 32,
) -> Array:
    """(LeRF - MoRF) / 2, mean over percentiles: remove and debias (Rong et al. 2022).

    Keeping the p % most salient pixels against keeping the p % least salient ones;
    removed pixels are imputed from their neighbours, which leaks less of the mask's
    shape than a constant and stays nearer to real images. Higher is better.

    Args:
      probabilities: images [N, H, W, C] -> [N, K].
      images: normalised images [B, H, W, C].
      maps: [B, H, W].
      labels: int [B].
      percentiles: shares of pixels kept, in (0, 100).
      noise: standard deviation added to imputed pixels, in units of the images.
      seed: of the noise.
      at_once: images per forward pass at most, all of one point at least.

    Returns:
      [B], in [-1/2, 1/2].
    """
    _check_images(images, maps)
    if not all(0 < p < 100 for p in percentiles):
        raise ValueError(f"percentiles must lie inside (0, 100), got {percentiles}")
    images, rank = jnp.asarray(images), _rank(maps)
    pixels = maps.shape[1] * maps.shape[2]
    # Those below the percentile.
    counts = [int(np.ceil(p / 100 * (pixels - 1))) for p in percentiles]
    kept = [(0, count) for count in counts]
    kept += [(pixels - count, pixels) for count in counts]

    def filled(point):
        (low, high), key = point
        keep = (rank >= low) & (rank < high)
        x = impute(images, keep) + noise * jax.random.normal(key, images.shape)
        return jnp.where(keep[..., None], images, x).astype(images.dtype)

    points = jnp.array(kept), jax.random.split(jax.random.key(seed), len(kept))
    scores = _scores(probabilities, filled, points, labels, at_once)
    most_kept, least_kept = jnp.split(scores, 2)
    return (most_kept - least_kept).mean(0) / 2


def _counts(maps, step):
    """Pixels that are replaced at each point of a curve, from none to all."""
    pixels = maps.shape[1] * maps.shape[2]
    return jnp.arange(-(-pixels // step) + 1) * step


def _curve(probabilities, start, finish, maps, labels, counts, at_once):
    """Class probability while `finish` replaces `start`, most salient first."""
    _check_images(start, maps)
    rank = _rank(maps)

    def mixed(count):
        return jnp.where((rank < count)[..., None], finish, start)

    return _scores(probabilities, mixed, counts, labels, at_once).T


def _scores(probabilities, make, points, labels, at_once):
    """Class probability of the images `make(point)` [B, ...] of every point: [P, B]."""

    def score(point):
        return _of_class(probabilities(make(point)), labels)

    together = max(1, at_once // len(labels))
    return jax.lax.map(score, points, batch_size=together if together > 1 else None)


def _rank(maps):
    """Place of each pixel in falling order of its map, [B, H, W], ties by index."""
    flat = jnp.reshape(maps, (maps.shape[0], -1))
    order = jnp.argsort(flat, axis=1, stable=True, descending=True)
    return jnp.argsort(order, axis=1).reshape(maps.shape)


def _of_class(scores, labels):
    return jnp.take_along_axis(scores, jnp.asarray(labels)[:, None], axis=1)[:, 0]


def _check_images(images, maps):
    if np.ndim(images) != 4 or np.shape(images)[:3] != np.shape(maps):
        raise ValueError(
            f"maps must have the images' batch and pixels: images {np.shape(images)}, "
            f"maps {np.shape(maps)}; enlarge the maps first"
        )


def _cells(maps, masks=None):
    """Float64 maps [B, H, W], all NaN where one value is not finite, and bool masks."""
    maps = np.asarray(maps, np.float64)
    if maps.ndim != 3:
        raise ValueError(f"maps must be [B, H, W], got shape {maps.shape}")
    maps = np.where(np.isfinite(maps).all(axis=(1, 2), keepdims=True), maps, np.nan)
    if masks is None:
        return maps
    masks = np.asarray(masks).astype(bool)
    if masks.shape != maps.shape:
        raise ValueError(
            f"masks {masks.shape} and maps {maps.shape} differ; resize one of them"
        )
    return maps, masks


def _distribution(maps):
    """S+ / sum S+ of float64 [B, H, W] as [B, N]; an empty map is uniform."""
    energy = np.maximum(maps, 0).reshape(len(maps), -1)  # Keeps NaN.
    energy[(energy == 0).all(axis=1)] = 1
    return energy / energy.sum(axis=1, keepdims=True)


def _same_grid(a, b):
    """Two maps [B, H, W] of one shape, float64."""
    a, b = _cells(a), _cells(b)
    if a.shape != b.shape:
        raise ValueError(
            f"maps {a.shape} and {b.shape} are on different grids; bring both to the "
            "coarser one with alignment.block_mean"
        )
    return a, b


def _defined(values, maps, masks):
    """Values with NaN where the mask is empty or the map is not finite."""
    defined = masks.any(axis=(1, 2)) & ~np.isnan(maps).any(axis=(1, 2))
    return np.where(defined, values, np.nan)
