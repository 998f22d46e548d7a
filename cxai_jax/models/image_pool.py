"""History of generated images for a discriminator (Shrivastava et al. 2017).

A pool is part of the train state, so a resumed run continues with the same images.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cxai_jax.types import Array


class ImagePool(NamedTuple):
    """Images that generators made earlier."""

    images: Array  # float32 [P, H, W, C]
    filled: Array  # int32 scalar, how many of the P hold an image


def empty_pool(size: int, side: int) -> ImagePool:
    """A pool of `size` images of `side` pixels; CycleGAN keeps 50."""
    return ImagePool(jnp.zeros((size, side, side, 3)), jnp.zeros((), jnp.int32))


def exchange(pool: ImagePool, images: Array, key: Array) -> tuple[ImagePool, Array]:
    """New images into the pool, a mixture of new and old ones out of it.

    While the pool has room every image is stored and returned itself. After that, with
    probability one half, it takes the place of a stored one, which is returned in its
    stead. CycleGAN draws a place per image; here the places of one batch differ, so
    that one static scatter does it and no image leaves in the step in which it came.

    Args:
      pool: P places.
      images: [B, H, W, C], B at most P.
      key: PRNG key.

    Raises:
      ValueError: if the batch is larger than the pool.
    """
    size, batch = pool.images.shape[0], images.shape[0]
    if batch > size:
        raise ValueError(
            f"a batch of {batch} images does not fit into an image pool of {size}; "
            "set config.adapt.pool to the batch size or more"
        )
    images = jax.lax.stop_gradient(images)
    key_place, key_coin = jax.random.split(key)
    drawn = jax.random.permutation(key_place, size)[:batch]
    next_free = pool.filled + jnp.arange(batch)
    room = next_free < size
    # A place that holds no image yet, though this very batch may fill it, has none to
    # give back.
    swap = (
        ~room & jax.random.bernoulli(key_coin, shape=(batch,)) & (drawn < pool.filled)
    )
    old = pool.images[drawn]
    # The scatter drops what is placed out of range.
    place = jnp.where(room, next_free, jnp.where(swap, drawn, size))
    stored = pool.images.at[place].set(images, mode="drop")
    out = jnp.where(swap[:, None, None, None], old, images)
    return ImagePool(stored, jnp.minimum(pool.filled + batch, size)), out
