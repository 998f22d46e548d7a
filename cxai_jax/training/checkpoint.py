"""Checkpoints: orbax, latest and best, each with a checksum that is verified.

Orbax restores a file with a flipped byte silently and does not fall back when the
newest step is damaged, so every step carries the SHA-256 of its leaves and restoring
walks back to the newest step that still matches. Readers (scoring, prediction) change
nothing, for a training may be writing beside them; only a training moves a damaged
step out of the way, to `checkpoints/damaged`.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from cxai_jax import disk
from cxai_jax.training import lock
from cxai_jax.types import PyTree

READS = 10  # Times a reader looks again where a training replaced what it had listed.


def checksum(tree: PyTree) -> str:
    """SHA-256 over the bytes of all leaves, in tree order (replicated arrays)."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    return digest.hexdigest()


def leaves(tree: PyTree) -> dict[str, str]:
    """Path -> type and shape of every leaf, as {"params.head.bias": "float32 [2]"}."""
    return {
        ".".join(str(getattr(k, "name", getattr(k, "key", k))) for k in path): (
            f"{leaf.dtype} {list(leaf.shape)}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def seal(about: dict) -> str:
    """SHA-256 of the JSON values beside a state."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/{latest,best}`."""

    def __init__(self, workdir: Path, *, keep: int | None = None):
        """A training says how many of the latest to `keep`; None opens read-only."""
        folder = Path(workdir).absolute() / "checkpoints"
        self._writes = keep is not None
        self._managers = {
            name: self._listing(
                ocp.CheckpointManager,
                folder / name,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=count, cleanup_tmp_directories=True
                )
                if self._writes
                else ocp.CheckpointManagerOptions(
                    read_only=True, create=False, save_interval_steps=0
                ),
            )
            for name, count in (("latest", keep), ("best", 1))
        }
        self.folder = folder
        self._size = 0  # Bytes of the state saved last.

    def save(self, kind: str, step: int, state: PyTree, about: dict) -> None:
        """Writes one step; returns once it is safe to change `state`.

        Args:
          kind: "latest" or "best".
          about: JSON values kept beside the state, e.g. the validation score.

        Raises:
          RuntimeError: if orbax declined to save (a step that exists already is
            left as it is).
          FloatingPointError: if the state is not finite; the steps before stay.
          DiskError: if this or the step before could not be written.
        """
        manager = self._managers[kind]
        if step in manager.all_steps():
            return
        # The state is donated to the next step, so its bytes are taken now.
        state = jax.tree.map(np.asarray, state)
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
            raise FloatingPointError(
                f"the state of step {step} is not finite and was not saved to "
                f"{self.folder / kind}; the steps there are kept. See "
                "config.train.on_nan"
            )
        about = {**about, "leaves": leaves(state), "checksum": checksum(state)}
        about = json.loads(json.dumps(about))
        self._size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with disk.writing(self.folder / kind, self._size):  # Of the step before, too.
            saved = manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    about=ocp.args.JsonSave({**about, "seal": seal(about)}),
                ),
                force=True,
            )
        if not saved:
            raise RuntimeError(
                f"{self.folder / kind}: checkpoint of step {step} was not written; "
                f"the folder holds steps {sorted(manager.all_steps())}"
            )

    def about(self, kind: str) -> dict:
        """The JSON values of the newest step where they are whole; {} without one."""
        for step in self._steps(kind):
            try:
                return self._about(kind, step)
            except Exception:  # `restore` says what is wrong with it.
                continue
        return {}

    def restore(self, kind: str, template: PyTree) -> tuple[PyTree, int, dict] | None:
        """The newest intact checkpoint as (state, step, about), or None without one.

        Args:
          template: a pytree of arrays or ShapeDtypeStructs in the state's structure.

        Raises:
          ValueError: if steps exist but none can be restored, or the checkpoint is of
            another network, naming a leaf that differs.
        """
        for _ in range(READS):
            steps, problems = self._steps(kind), {}
            _in_step(f"listed {kind}")  # Before one of the hosts moves a step aside.
            for step in steps:
                try:
                    state, about = self._read(kind, step, template)
                except Mismatch:
                    raise
                except Exception as error:  # Orbax raises many types.
                    first = (str(error).splitlines() or [type(error).__name__])[0]
                    problems[step] = f"step {step}: {first[:200]}"
                    continue
                for other in problems:
                    self._report(kind, other, problems[other])
                return state, step, about
            # A training beside a reader removes old steps as it saves new ones.
            if self._writes or steps == self._steps(kind):
                break
        if not problems:
            return None
        told = f"{self.folder / kind}: no checkpoint can be restored "
        told += f"({'; '.join(problems.values())})"
        if not self._writes and (who := lock.holder(self.folder.parent)):
            raise ValueError(f"{told}; {who} is writing there, try again in a minute")
        raise ValueError(
            f"{told}; nothing was changed: put the files back from a copy, or train "
            "in another --workdir"
        )

    def _steps(self, kind: str) -> list[int]:
        """Steps on disk, newest first."""
        manager = self._managers[kind]
        manager.wait_until_finished()
        self._listing(manager.reload)
        return sorted(manager.all_steps(), reverse=True)

    def _listing(self, call, *arguments, **options):
        """`call(...)`, which looks at every step; again where one was just removed."""
        for _ in range(0 if self._writes else READS):
            try:
                return call(*arguments, **options)
            except FileNotFoundError:  # By the training beside this reader.
                continue
        return call(*arguments, **options)

    def _about(self, kind: str, step: int) -> dict:
        """The JSON values of a step; raises what orbax does, or ValueError."""
        args = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = dict(self._managers[kind].restore(step, args=args).about)
        # Runs of earlier versions have neither `leaves` nor a seal.
        if about.pop("seal", None) != seal(about) and "leaves" in about:
            raise ValueError("checksum differs: the file was damaged")
        return about

    def _read(self, kind: str, step: int, template: PyTree) -> tuple[PyTree, dict]:
        """State and JSON values of a step, their checksums verified."""
        about, wanted = self._about(kind, step), leaves(template)
        if (found := about.pop("leaves", wanted)) != wanted:
            names = sorted(n for n in found.keys() | wanted.keys())
            names = [n for n in names if found.get(n) != wanted.get(n)]
            name = next((n for n in names if n.startswith("params.")), names[0])
            raise Mismatch(
                f"{self.folder / kind / str(step)} is of another network: {name} is "
                f"{found.get(name, 'absent')} there and {wanted.get(name, 'absent')} "
                f"here ({len(names)} of its arrays differ); give config.model.* and "
                "the classes of the data as they were, see config.json"
            )
        host = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(host))
        state = self._managers[kind].restore(step, args=args).state
        if checksum(state) != about.pop("checksum"):
            raise ValueError("checksum differs: the file was damaged")
        return state, about

    def _report(self, kind: str, step: int, problem: str) -> None:
        """Warns of a damaged step; a training moves it aside, as orbax would refuse
        to save below it."""
        logging.warning("%s/%s %s", self.folder, kind, problem)
        if not self._writes:
            return
        if jax.process_index() == 0:
            target = self.folder / "damaged" / f"{kind}-{step}"
            number = 0
            while target.exists():
                number += 1
                target = target.with_name(f"{kind}-{step}-{number}")
            target.parent.mkdir(exist_ok=True)
            os.rename(self.folder / kind / str(step), target)
            logging.warning("moved aside to %s", target)
        _in_step(f"moved aside {kind} {step}")
        self._managers[kind].reload()

    def preempted(self, step: int) -> bool:
        """True at the step where all hosts of a preempted job are to stop together."""
        return jax.process_count() > 1 and self._managers["latest"].reached_preemption(
            step
        )

    def wait(self) -> None:
        """Blocks until everything handed to `save` is on disk."""
        for name, manager in self._managers.items():
            with disk.writing(self.folder / name, self._size):
                manager.wait_until_finished()

    def close(self) -> None:
        for manager in self._managers.values():
            manager.close()


class Mismatch(ValueError):
    """The checkpoint is whole, but of another network."""


def _in_step(name: str) -> None:
    """Waits until all hosts of a run have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
