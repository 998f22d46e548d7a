"""Voting that stops where nothing can change any more, driven by the host."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from cxai_jax.types import Array
from cxai_jax.voting.rules import Masks, count_votes, mask_cells, opposes


class EarlyVotes(NamedTuple):
    """The outcome of voting that stops where nothing can change any more."""

    labels: np.ndarray  # int32 [B], the same as of all k votes
    original: np.ndarray  # int32 [B]
    opposing: np.ndarray  # int32 [B], among the votes cast
    cast: np.ndarray  # int32 [B], votes cast
    forwards: int  # masked images run, those that only fill a batch included
    saved: int  # masked images of the full pass that were not run


def decided(
    opposing: np.ndarray, evaluated: np.ndarray | int, k: int, classes: int = 2
) -> np.ndarray:
    """Whether no further vote can change the outcome.

    Staying is certain once even k - evaluated more opposing votes make no majority. A
    flip is certain at more than k/2; with three classes or more the remaining votes
    still choose the new label, so only the last one settles it.

    Args:
      opposing: opposing votes so far, int [B].
      evaluated: votes cast so far, int or int [B].
      k: votes in all.
      classes: K.

    Returns:
      bool [B].
    """
    stays = 2 * (opposing + k - evaluated) <= k
    return stays | ((2 * opposing > k) & ((classes == 2) | (evaluated >= k)))


def vote_early(
    forward: Callable,
    masks: Masks,
    first: Array,
    *,
    theta: float = 0.2,
    chunk: int = 64,
    step: int = 4,
    carried: Array | None = None,
) -> EarlyVotes:
    """Votes until each image's label is certain; labels equal those of the full pass.

    Driven by the host: the first round casts the half of the votes that can settle an
    image, later ones `step` (16, 4, 4, 4, 3 of 31), each for the undecided images only,
    packed into full batches. The last batch of a round is filled up to a power of two,
    so that few shapes are compiled.

    Args:
      forward: jitted; images [N, H, W, C] and whose variants they are, int [N] in
        0..B-1, -> probabilities [N, K], for any N <= chunk. It must give an image the
        same probabilities in any batch (eval mode does, up to float rounding at the
        threshold). With `carried` it is `next_votes_of` behind its first argument,
        which may donate `carried`.
      masks: of the images and as many more as fill the batch, from `plan_masks`.
      first: probabilities of the unmasked images [B, K].
      theta: support threshold.
      chunk: images per forward pass.
      step: masks per image and round after the first.
      carried: to reuse a network's first layers, their maps of the images of `masks`;
        they are kept up to date for the whole batch.

    Returns:
      EarlyVotes; its `opposing` counts only the votes cast.
    """
    (batch, classes), k = first.shape, masks.cells.shape[1]
    if carried is None:
        run = functools.partial(_run_packed, forward, masks, chunk)
    else:
        run = _NestedRuns(forward, masks, chunk, carried)
    first = np.asarray(first, np.float32)
    original = first.argmax(-1).astype(np.int32)
    votes = np.zeros((batch, k, classes), np.float32)
    against = np.zeros((batch, k), bool)
    cast = np.zeros(batch, np.int32)
    undecided, begin, forwards = np.arange(batch), 0, 0
    while undecided.size and begin < k:
        end = min(k, begin + step) if begin else (k + 1) // 2
        forwards += run(votes, undecided, begin, end)
        begin = cast[undecided] = end
        was_cast = np.arange(k) < cast[:, None]
        against = opposes(votes, original, theta=theta) & was_cast
        undecided = undecided[~decided(against[undecided].sum(1), end, k, classes)]
    result = count_votes(votes, original, against)
    return EarlyVotes(
        labels=result.labels,
        original=original,
        opposing=result.opposing,
        cast=cast,
        forwards=forwards,
        saved=batch * k - forwards,
    )


def _run_packed(
    forward: Callable, masks: Masks, chunk: int, votes, rows, begin: int, end: int
) -> int:
    """Fills votes[rows, begin:end], images and masks packed; returns forward passes."""
    forwards, turns = 0, np.tile(np.arange(begin, end), rows.size)
    rows = np.repeat(rows, end - begin)
    for start in range(0, rows.size, chunk):
        row, turn = rows[start : start + chunk], turns[start : start + chunk]
        room = min(chunk, _power_of_two(row.size))
        filler = (0, room - row.size)
        of = np.pad(row, filler)
        variants = masked_rows(masks, of, np.pad(turn, filler) + 1)
        votes[row, turn] = np.asarray(forward(variants, of))[: row.size]
        forwards += room
    return forwards


class _NestedRuns:
    """As `_run_packed`; an image's masks stay together, each builds on the last."""

    def __init__(self, forward: Callable, masks: Masks, chunk: int, carried: Array):
        self.forward, self.masks, self.chunk = forward, masks, chunk
        self.carried = carried

    def __call__(self, votes, rows, begin: int, end: int) -> int:
        forwards = 0
        for turn in range(begin, end, self.chunk):  # One turn, unless chunk is tiny.
            turns = np.arange(turn, min(end, turn + self.chunk))
            most = self.chunk // turns.size
            for start in range(0, rows.size, most):
                row = rows[start : start + most]
                room = min(most, _power_of_two(row.size))
                # Filled with the last row itself: it is written twice, the same.
                filled = np.pad(row, (0, room - row.size), mode="edge")
                self.carried, probs = self.forward(
                    self.masks, self.carried, filled, turns + 1
                )
                votes[row[:, None], turns] = np.asarray(probs)[: row.size]
                forwards += room * turns.size
        return forwards


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (number - 1).bit_length()


@jax.jit
def masked_rows(masks: Masks, rows: Array, counts: Array) -> Array:
    """`mask_cells` for the chosen rows of a batch: rows and counts int [N]."""
    images, order, value = (x[rows] for x in (masks.images, masks.order, masks.value))
    return mask_cells(images, order, counts, value)
