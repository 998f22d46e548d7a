"""Device-side preparation of uint8 images: crop, flips, normalisation.

The published training transform (method D18): short side to 256 (done when the data
were stored), random 224 crop over the whole image, both flips with probability one
half. Rotation and intensity are beyond it. It runs inside the step, so the host ships
bytes and nothing else.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cxai_jax.types import Array

CROPS = ("random", "square", "none")
NORMALISATIONS = ("model", "per_image")


class Scale(NamedTuple):
    """A network's input normalisation, in grey levels 0..255; see `normalise`."""

    mean: tuple
    std: tuple


PER_IMAGE = Scale((), ())


def random_crop(key: Array, images: Array, sizes: Array, size: int) -> Array:
    """Cuts one random window per image out of the valid part of its canvas.

    Args:
      key: PRNG key.
      images: uint8 [B, Hc, Wc, C], valid pixels at the top left of each canvas.
      sizes: int32 [B, 2], valid rows and columns, each at least `size`.
      size: pixels, side of the square window.

    Returns:
      uint8 [B, size, size, C].
    """
    room = jnp.maximum(sizes - size, 0)
    start = jax.random.randint(key, room.shape, 0, room + 1)

    def crop(image, at):
        return jax.lax.dynamic_slice(
            image, (at[0], at[1], 0), (size, size, image.shape[-1])
        )

    return jax.vmap(crop)(images, start)


def random_flips(key: Array, images: Array, *, hflip: bool, vflip: bool) -> Array:
    """Mirrors each image [B, H, W, C] left-right and up-down, each with p = 1/2."""
    for axis, wanted in ((2, hflip), (1, vflip)):
        if wanted:
            coin = jax.random.bernoulli(
                jax.random.fold_in(key, axis), shape=(images.shape[0], 1, 1, 1)
            )
            images = jnp.where(coin, jnp.flip(images, axis), images)
    return images


def random_rotation(key: Array, images: Array, degrees: float) -> Array:
    """Turns each image about its middle by up to `degrees`, uniform, either way.

    Bilinear; black where the turned image has no pixel.

    Args:
      key: PRNG key.
      images: uint8 [B, H, W, C].
      degrees: largest angle, 0..180.

    Returns:
      uint8 [B, H, W, C].
    """
    count, height, width, _ = images.shape
    limit = math.radians(degrees)
    angles = jax.random.uniform(key, (count,), minval=-limit, maxval=limit)
    middle = jnp.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    rows, columns = jnp.mgrid[:height, :width] - middle

    def turn(image, angle):
        sine, cosine = jnp.sin(angle), jnp.cos(angle)
        at = jnp.stack([cosine * rows - sine * columns, sine * rows + cosine * columns])
        plane = jax.vmap(
            lambda values: jax.scipy.ndimage.map_coordinates(
                values, list(at + middle), order=1, mode="constant"
            ),
            in_axes=-1,
            out_axes=-1,
        )
        return plane(image.astype(jnp.float32))

    return jnp.round(jax.vmap(turn)(images, angles)).astype(jnp.uint8)


def random_intensity(key: Array, images: Array, strength: float) -> Array:
    """Jitters gamma, contrast and brightness of each image.

    With x in 0..1, its mean m over the image, g and c = e^U(-s, s), b = U(-s, s) / 2:

        y = clip(m + c (x^g - m) + b, 0, 1)

    Args:
      key: PRNG key.
      images: uint8 [B, H, W, C].
      strength: s, 0..1.

    Returns:
      uint8 [B, H, W, C].
    """
    shape = (3, images.shape[0], 1, 1, 1)
    draws = jax.random.uniform(key, shape, minval=-strength, maxval=strength)
    gamma, contrast, brightness = jnp.exp(draws[0]), jnp.exp(draws[1]), draws[2] / 2
    x = images.astype(jnp.float32) / 255
    mean = x.mean((1, 2, 3), keepdims=True)
    y = mean + contrast * (x**gamma - mean) + brightness
    return jnp.round(255 * jnp.clip(y, 0, 1)).astype(jnp.uint8)


def options(config) -> dict:
    """What `augment` takes from a run's config."""
    chosen = config.augment
    return {
        "size": config.data.image_size,
        "crop": chosen.crop,
        "hflip": chosen.hflip,
        "vflip": chosen.vflip,
        "rotate": chosen.rotate,
        "intensity": chosen.intensity,
    }


def augment(
    key: Array,
    images: Array,
    sizes: Array,
    *,
    size: int,
    crop: str,
    hflip: bool,
    vflip: bool,
    rotate: float = 0.0,
    intensity: float = 0.0,
    channels: int | None = None,
) -> Array:
    """Applies the training transform: uint8 [B, Hc, Wc, C] -> [B, size, size, C].

    Args:
      crop: "random" and "square" cut a random window out of what the host resized,
        "none" expects images of `size` already.
      rotate: degrees, as `random_rotation`, of every channel alike.
      intensity: strength, as `random_intensity`, of the first `channels` alone: those
        behind are masks. None is all.

    Raises:
      ValueError: if the canvas is smaller than `size`, or crop is unknown.
    """
    if crop not in CROPS:
        raise ValueError(f"config.augment.crop is {crop!r}; known: {', '.join(CROPS)}")
    if min(images.shape[1:3]) < size or (
        crop == "none" and images.shape[1:3] != (size, size)
    ):
        raise ValueError(
            f"images are {images.shape[1]}x{images.shape[2]} px but crop={crop!r} at "
            f"config.data.image_size={size} needs "
            + ("exactly" if crop == "none" else "at least")
            + " that; set config.data.resize >= config.data.image_size"
        )
    key_crop, key_flip = jax.random.split(key)
    if crop != "none":
        images = random_crop(key_crop, images, sizes, size)
    images = random_flips(key_flip, images, hflip=hflip, vflip=vflip)
    if rotate:
        images = random_rotation(jax.random.fold_in(key, 2), images, rotate)
    if intensity:
        given = images[..., :channels]
        given = random_intensity(jax.random.fold_in(key, 3), given, intensity)
        images = images.at[..., :channels].set(given)
    return images


def normalise(images: Array, mean: tuple, std: tuple) -> Array:
    """(x - mean) / std per channel as float32 [B, H, W, 3]; gray is repeated.

    Args:
      images: uint8 [B, H, W, C], C = 1 or 3.
      mean, std: three numbers each, in grey levels 0..255; empty (`PER_IMAGE`): of each
        image over all its pixels and channels, the deviation at least one grey level.
    """
    images = images.astype(jnp.float32)
    if images.shape[-1] == 1:
        images = jnp.repeat(images, 3, axis=-1)
    if not mean:
        images -= images.mean((1, 2, 3), keepdims=True)
        variance = jnp.square(images).mean((1, 2, 3), keepdims=True)
        return images / jnp.sqrt(jnp.maximum(variance, 1.0))
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
