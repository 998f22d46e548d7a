"""The checkpoint a run goes on from, if it is of the same data."""

import logging

from cxai_jax.data.identity import differences
from cxai_jax.training.run import Run
from cxai_jax.types import PyTree


def restore(run: Run, state: PyTree, *, advice: str, force: bool = False):
    """`Checkpoints.restore` of the latest step, its data compared first.

    Args:
      state: a fresh state, whose structure is restored.
      advice: what to do about other data, the end of the error.
      force: other data are only warned of.

    Raises:
      ValueError: if the run has trained on other data or another split of them, or as
        `Checkpoints.restore`.
    """
    there = run.checkpoints.about("latest").get("data", {})
    found = [
        f"{f'{name}: ' if name else ''}{told}"
        for name, here in run.identities().items()
        if (told := differences(there.get(name, {}), here))
    ]
    if found:
        told = f"{run.workdir} was trained on other data: {'; '.join(found)}"
        if not force:
            raise ValueError(f"{told}. {advice}")
        logging.warning("%s; continuing with these, as --force_resume says", told)
    return run.checkpoints.restore("latest", state)
