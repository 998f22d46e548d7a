"""Checkpoints: orbax, latest and best, each with a checksum that is verified.

Orbax restores a file with a flipped byte silently and does not fall back when the
newest step is damaged, so every step carries the SHA-256 of its leaves and restoring
walks back to the newest step that still matches.
"""

import hashlib
import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from cxai_jax.types import PyTree


def checksum(tree: PyTree) -> str:
    """SHA-256 over the bytes of all leaves, in tree order (replicated arrays)."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/{latest,best}`."""

    def __init__(self, workdir: Path, *, keep: int = 2):
        folder = Path(workdir).absolute() / "checkpoints"
        self._managers = {
            name: ocp.CheckpointManager(
                folder / name,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=count, cleanup_tmp_directories=True
                ),
            )
            for name, count in (("latest", keep), ("best", 1))
        }
        self.folder = folder

    def save(self, kind: str, step: int, state: PyTree, about: dict) -> None:
        """Writes one step; returns once it is safe to change `state`.

        Args:
          kind: "latest" or "best".
          about: JSON values kept beside the state, e.g. the validation score.

        Raises:
          RuntimeError: if orbax declined to save (a step that exists already is
            left as it is).
        """
        manager = self._managers[kind]
        if step in manager.all_steps():
            return
        # The state is donated to the next step, so its bytes are taken now.
        state = jax.tree.map(np.asarray, state)
        saved = manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                about=ocp.args.JsonSave({**about, "checksum": checksum(state)}),
            ),
            force=True,
        )
        if not saved:
            raise RuntimeError(
                f"{self.folder / kind}: checkpoint of step {step} was not written; "
                f"the folder holds steps {sorted(manager.all_steps())}"
            )

    def restore(self, kind: str, template: PyTree) -> tuple[PyTree, int, dict] | None:
        """The newest intact checkpoint as (state, step, about), or None without one.

        Args:
          template: a pytree of arrays or ShapeDtypeStructs in the state's structure.

        Raises:
          ValueError: if steps exist but none can be restored.
        """
        manager = self._managers[kind]
        manager.wait_until_finished()
        host = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
        damaged, problems = [], []
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                restored = manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(host),
                        about=ocp.args.JsonRestore(),
                    ),
                )
                state, about = restored.state, dict(restored.about)
                if checksum(state) != about.pop("checksum"):
                    raise ValueError("checksum differs: the file was damaged")
            except Exception as error:  # Orbax raises many types for damaged files.
                first = (str(error).splitlines() or [type(error).__name__])[0]
                damaged.append(step)
                problems.append(f"step {step}: {first[:200]}")
                logging.warning("%s/%s %s", self.folder, kind, problems[-1])
                continue
            for later in damaged:  # Orbax would refuse to save below them.
                manager.delete(later)
            return state, step, about
        if problems:
            raise ValueError(
                f"{self.folder / kind}: no checkpoint can be restored "
                f"({'; '.join(problems)}); delete the folder to start afresh"
            )
        return None

    def preempted(self, step: int) -> bool:
        """True at the step where all hosts of a preempted job are to stop together."""
        return jax.process_count() > 1 and self._managers["latest"].reached_preemption(
            step
        )

    def wait(self) -> None:
        """Blocks until everything handed to `save` is on disk."""
        for manager in self._managers.values():
            manager.wait_until_finished()

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()
