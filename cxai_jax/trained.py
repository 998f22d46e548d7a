"""A finished run, loaded from its workdir without its data, and put to use."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cxai_jax import mesh as meshes
from cxai_jax import setup, steps, tta, voting
from cxai_jax.checkpoint import Checkpoints
from cxai_jax.config import read_config
from cxai_jax.executables import Executables
from cxai_jax.optimizer import make_optimizer
from cxai_jax.types import PyTree
from cxai_jax.writer import read_json


class Trained(NamedTuple):
    """What is needed to use a trained model."""

    config: ConfigDict
    class_names: list[str]
    positive: int
    model: nn.Module
    scale: steps.Scale
    variables: PyTree  # NumPy arrays: params and batch_stats.
    step: int  # Of the checkpoint that the run's selection rule chose.


def load(workdir: Path) -> Trained:
    """Loads the model that a run selected.

    Raises:
      FileNotFoundError: if the workdir holds no run, no results or no checkpoint.
      ValueError: if no checkpoint can be restored, or a file is damaged.
    """
    config = read_config(workdir)
    results = workdir / "results.json"
    if not results.exists():
        raise FileNotFoundError(
            f"{results} does not exist: the run is not finished; continue it, or score "
            "its last checkpoint with --mode=eval"
        )
    class_names, positive = _classes(results)
    # The checkpoint replaces pretrained weights, so they need not be found again.
    fresh = config.copy_and_resolve_references()
    fresh.model.pretrained = ""
    try:
        network = setup.build_network(fresh, len(class_names), abstract=True)
    except (AttributeError, KeyError, TypeError) as error:
        path = workdir / "config.json"
        raise ValueError(f"{path} does not describe a network: {error}") from error
    optimizer = make_optimizer(config.optim, 1, setup.learning_rate_groups(config))
    template = jax.eval_shape(
        lambda variables: steps.create_state(variables, optimizer), network.variables
    )
    kind = "best" if config.train.selection == "best_val" else "latest"
    checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints)
    restored = checkpoints.restore(kind, template)
    checkpoints.close()
    if restored is None:
        raise FileNotFoundError(
            f"{checkpoints.folder / kind} holds no checkpoint; train first"
        )
    state, step, _ = restored
    return Trained(
        config=config,
        class_names=class_names,
        positive=positive,
        model=network.model,
        scale=network.scale,
        variables={"params": state.params, "batch_stats": state.batch_stats},
        step=step,
    )


def _classes(results: Path) -> tuple[list[str], int]:
    """The class names of a results.json, and the index of the positive one."""
    data = read_json(results, "data")["data"]
    names = data.get("class_names") if isinstance(data, dict) else None
    sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not sound or data.get("positive") not in names:
        raise ValueError(
            f"{results} is damaged: its classes are {names!r}; score the run again "
            "with --mode=eval to write it"
        )
    return names, names.index(data["positive"])


class Predicted(NamedTuple):
    """The outcome of one batch; NumPy arrays."""

    probs: np.ndarray  # float32 [B, K], of the unmasked images
    class_maps: np.ndarray  # float32 [B, h, w], of the label before voting
    before: np.ndarray  # int [B], label before voting
    after: np.ndarray  # int [B], label after voting
    opposing: np.ndarray | None  # int [B], among the votes cast; None without voting
    cast: np.ndarray | None  # int [B]
    saved: int  # Masked images that the early exit did not have to run.


class Predictor:
    """A trained model with test-time voting as its config's `tta` says.

    With `tta.early_exit` an image leaves the voting once its label cannot change.
    Given a folder, the compiled programs are kept there (executables.py).
    """

    def __init__(self, trained: Trained, mesh: Mesh, folder: Path | None = None):
        config, jit = trained.config, jax.jit
        if folder:
            names = trained.class_names
            jit = Executables(folder, config=config.to_json(), classes=names).jit
        self.batch_size = -(-config.eval.batch_size // mesh.size) * mesh.size
        self._tta, self._mesh = config.tta, mesh
        self._grid = config.data.image_size // config.tta.patch
        self._variables = meshes.put_replicated(trained.variables, mesh)
        self._early = bool(config.tta.k) and config.tta.early_exit
        make = voting.make_first_look if self._early else steps.make_voting_step
        self._look = jit(make(trained.model, trained.scale, config.tta))
        crops = voting.prefix_crops(trained.model, config.data.image_size, config.tta)
        if crops:  # The carried maps are replaced call by call: donated.
            votes = voting.make_next_votes(trained.model, crops)
            self._forward = jit(votes, donate_argnums=2)
        else:
            self._forward = jit(voting.make_vote_forward(trained.model))

    def __call__(self, images: np.ndarray) -> Predicted:
        """Predicts uint8 [B, S, S, 1] of at most `batch_size` images."""
        number, tta_config = len(images), self._tta
        filler = [(0, self.batch_size - number)] + [(0, 0)] * 3
        padded = meshes.put_rows(np.pad(images, filler, mode="edge"), self._mesh)
        seen = self._look(self._variables, padded)
        probs = np.asarray(seen["probs"][:number])
        first = probs if self._early else probs[:, 0]
        before = first.argmax(1)
        after, opposing, cast, saved = before, None, None, 0
        if self._early:
            votes = tta.vote_early(
                functools.partial(self._forward, self._variables)
                if "prefix" in seen
                else self._vote,
                seen["images"][:number],
                seen["cells"][:number],
                first,
                theta=tta_config.theta,
                grid=self._grid,
                fill=tta_config.fill,
                chunk=tta_config.chunk,
                carried=seen["prefix"][:number] if "prefix" in seen else None,
            )
            after, opposing, cast, saved = (
                votes.labels,
                votes.opposing,
                votes.cast,
                votes.saved,
            )
        elif tta_config.k:
            votes = jax.tree.map(lambda x: np.asarray(x[:number]), seen["votes"])
            after, opposing = votes.labels, votes.opposing
            cast = np.full(number, tta_config.k)
        maps = np.asarray(seen["class_maps"][:number])
        maps = np.take_along_axis(maps, before[:, None, None, None], axis=3)[..., 0]
        return Predicted(first, maps, before, after, opposing, cast, saved)

    def _vote(self, masked: jax.Array) -> jax.Array:
        """Probabilities of normalised images; every device takes its share of them."""
        if len(masked) % self._mesh.size == 0:
            masked = jax.device_put(masked, meshes.split_rows(self._mesh))
        return self._forward(self._variables, masked)
