"""Steps whose loss is not finite: stop and name their images, or leave them out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax.training.run import Plan

NAMED = 8  # Images in a message at most.
HOPELESS = 10  # Steps between two logs, all skipped, after which a run stops.
SEEN = ("loss", "skipped")  # The metrics that `check` reads.
ADVICE = (
    "Lower config.optim.lr_*, or set config.cpe.normalize=True (raw dot products of "
    "ReLU features are ill-scaled), config.optim.clip_norm=1 or "
    "config.train.on_nan=skip"
)


def skip_not_finite(step: Callable) -> Callable:
    """A step of a method that changes nothing where its outcome is not finite.

    The state's `step`, wherever a method keeps it, counts on, so that the next batch is
    another one. The metrics
    have `skipped` as well: 1 in such a step, whose other metrics say nothing, else 0.
    """

    def guarded(state, batches, key):
        new, metrics = step(state, batches, key)
        finite = jnp.isfinite(metrics["loss"])
        for leaf in jax.tree.leaves(new):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                finite &= jnp.isfinite(leaf).all()

        def keep(path, after, before):
            counts = getattr(path[-1], "name", "") == "step"
            return after if counts else jnp.where(finite, after, before)

        kept = jax.tree_util.tree_map_with_path(keep, new, state)
        return kept, metrics | {"skipped": (~finite).astype(jnp.float32)}

    return guarded


def check(plan: Plan, pending: list[dict], step: int) -> None:
    """Stops a run whose losses stopped being finite; waits for the devices.

    Args:
      plan: the run's.
      pending: metrics of the last calls, each [S].
      step: the number of steps done, the last of these included.

    Raises:
      FloatingPointError: naming the first such step and its images; where steps are
        skipped, only if all of many were.
    """
    metrics = jax.device_get([{n: m[n] for n in m if n in SEEN} for m in pending])
    losses = np.ravel([m["loss"] for m in metrics])
    if metrics and "skipped" in metrics[0]:
        skipped = np.ravel([m["skipped"] for m in metrics])
        if skipped.all() and len(skipped) >= HOPELESS:
            raise FloatingPointError(
                f"all {len(losses)} steps up to {step} were skipped as not finite; the "
                f"last checkpoint is kept. {ADVICE}"
            )
        return
    if np.isfinite(losses).all():
        return
    first = int(np.argmin(np.isfinite(losses)))
    bad = step - len(losses) + first
    raise FloatingPointError(
        f"the loss is {losses[first]} at step {bad + 1}, of the images "
        f"{named(plan, bad)}; the last checkpoint is kept. {ADVICE}"
    )


def named(plan: Plan, step: int) -> str:
    """The images of a step, counted from 0, of all streams."""
    names = [
        str(name)
        for stream in plan.streams.values()
        for name in stream.records.names[stream.rows[step]]
    ]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def means(pending: list[dict]) -> dict:
    """Means of the metrics over all steps but the skipped; `skipped` is their number.

    Args:
      pending: metrics of the last calls, read off the devices, each [S].
    """
    rows = {name: np.ravel([m[name] for m in pending]) for name in pending[0]}
    if "skipped" not in rows:
        return {name: row.mean() for name, row in rows.items()}
    skipped = rows.pop("skipped")
    if skipped.all():  # Nothing to tell but this.
        return {"skipped": skipped.sum()}
    kept = {name: row[skipped == 0].mean() for name, row in rows.items()}
    return kept | {"skipped": skipped.sum()}
