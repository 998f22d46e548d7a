"""A finished run, loaded from its workdir without its data, and put to use."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cxai_jax import mesh as meshes
from cxai_jax import models
from cxai_jax.config import read_config
from cxai_jax.data.augment import Scale
from cxai_jax.inference.program_cache import Executables
from cxai_jax.methods.method import Network
from cxai_jax.training.checkpoint import Checkpoints
from cxai_jax.training.run import build_network, make_method
from cxai_jax.types import PyTree
from cxai_jax.voting import early_exit
from cxai_jax.voting.forward import (
    make_first_look,
    make_next_votes,
    make_vote_forward,
    make_voting_step,
    prefix_crops,
)
from cxai_jax.writer import read_json

# Of results.json: what the card of a model shows and its decisions need.
CARD = ("metrics", "calibration", "config", "versions")


class Trained(NamedTuple):
    """What is needed to use a trained model."""

    config: ConfigDict
    class_names: list[str]
    site_names: list[str]  # Of the sites that it was trained on, in their order.
    positive: int
    model: nn.Module
    scale: Scale
    variables: PyTree  # NumPy arrays: params and batch_stats.
    step: int  # Of the checkpoint that the run's selection rule chose.
    results: dict  # Contents of results.json.
    map_scale: float  # Value of the highest colour of its maps.


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
    data = read_json(results, "data")["data"]
    try:
        network = empty_network(config, *names_of(data, results)[:2])
        method = make_method(config, network, total_steps=1)
    except (AttributeError, KeyError, TypeError) as error:
        path = workdir / "config.json"
        raise ValueError(f"{path} does not describe a network: {error}") from error
    template = jax.eval_shape(
        lambda variables: method.init(jax.random.key(0), variables), network.variables
    )
    kind = "best" if config.train.selection == "best_val" else "latest"
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore(kind, template)
    checkpoints.close()
    if restored is None:
        raise FileNotFoundError(
            f"{checkpoints.folder / kind} holds no checkpoint; train first"
        )
    state, step, about = restored
    # Of the run that trained, whoever scored it since.
    data = about.get("data", {}).get("", data)
    names, variables = names_of(data, results), method.scored(state)
    return assemble(config, names, network, variables, step, results)


def empty_network(
    config: ConfigDict, class_names: Sequence[str], site_names: Sequence[str]
) -> Network:
    """The network of a run without weights: its variables are shapes."""
    # Pretrained weights will be replaced, so they need not be found again.
    fresh = config.copy_and_resolve_references()
    fresh.model.pretrained = ""
    return build_network(
        fresh, len(class_names), num_sites=len(site_names), abstract=True
    )


def assemble(
    config: ConfigDict,
    names: tuple[list[str], list[str], int],
    network: Network,
    variables: PyTree,
    step: int,
    results: Path,
) -> Trained:
    """A trained model from its parts.

    Args:
      config: of the run.
      names: of classes and sites, and the index of the positive class.
      network: without weights.
      variables: its weights.
      step: of the checkpoint.
      results: the run's results.json, or what a bundle kept of it.

    Raises:
      ValueError: if that file lacks what predictions need.
    """
    contents = read_json(results)
    class_names, site_names, positive = names
    return Trained(
        config=config,
        class_names=class_names,
        site_names=site_names,
        positive=positive,
        model=network.model,
        scale=network.scale,
        variables=variables,
        step=step,
        results=contents,
        map_scale=_map_scale(contents, results),
    )


def _map_scale(results: dict, path: Path) -> float:
    """The scale of the run's maps; results of earlier versions lack it."""
    again = "score the run again with --mode=eval to write it"
    for key in CARD:
        if key not in results:
            raise ValueError(f"{path} lacks {key!r}; {again}")
    try:
        return float(results["maps"]["scale"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} lacks the scale of the maps; {again}") from None


def names_of(data, results: Path) -> tuple[list[str], list[str], int]:
    """Names of the classes and sites of a run's data; the positive class' index."""
    found = data if isinstance(data, dict) else {}
    classes, sites = found.get("class_names"), found.get("site_names")
    for what, names in (("classes", classes), ("sites", sites)):
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(
                f"{results} is damaged: its {what} are {names!r}; score the run again "
                "with --mode=eval to write it"
            )
    if found.get("positive") not in classes:
        raise ValueError(
            f"{results} is damaged: its positive class is {found.get('positive')!r}; "
            "score the run again with --mode=eval to write it"
        )
    return classes, sites, classes.index(found["positive"])


def chosen_sites(trained: Trained, wanted: str) -> dict[str, int]:
    """The sites as which images are predicted: name -> index, {} if none matters.

    Args:
      trained: a run.
      wanted: name of one of its sites, "each" for all of them, "" for none.

    Raises:
      ValueError: the network has parts for each site and `wanted` names none that the
        run knows, or it has none and `wanted` names one.
    """
    names = trained.site_names
    if not models.needs_site(trained.config.model):
        if wanted:
            raise ValueError(
                f"--site={wanted}: this run's network is the same for every site "
                f"(config.model.norm={trained.config.model.norm}); leave --site out"
            )
        return {}
    if wanted == "each":
        return {name: index for index, name in enumerate(names)}
    if wanted not in names:
        given = f"--site={wanted} is no site" if wanted else "--site is missing"
        raise ValueError(
            f"{given}: the network of this run has parts of its own for every site; "
            f"give --site=each or one of {', '.join(names)}"
        )
    return {wanted: names.index(wanted)}


class Predicted(NamedTuple):
    """The outcome of one batch; NumPy arrays."""

    probs: np.ndarray  # float32 [B, K], of the unmasked images
    class_maps: np.ndarray  # float32 [B, h, w, K]
    before: np.ndarray  # int [B], label before voting
    after: np.ndarray  # int [B], label after voting
    opposing: np.ndarray | None  # int [B], among the votes cast; None without voting
    cast: np.ndarray | None  # int [B]
    pooled: np.ndarray  # float32 [B, D], mean of the features
    saved: int  # Masked images that the early exit did not have to run.


def over_sites(found: Sequence[Predicted]) -> Predicted:
    """One answer from those of several sites to the same images.

    Probabilities and class maps are means. `before` is the class of the largest mean
    probability; `after` the class that most sites end with, of as many the one with
    the larger mean probability, and without voting `before`. Votes are not added up:
    each site counts against a label of its own.
    """
    if len(found) == 1:
        return found[0]
    probs = np.mean([one.probs for one in found], axis=0)
    before = after = probs.argmax(1)
    if found[0].cast is not None:
        agree = sum(np.eye(probs.shape[1])[one.after] for one in found)
        after = (agree + probs / 2).argmax(1)  # A half of a probability breaks ties.
    return Predicted(
        probs=probs,
        class_maps=np.mean([one.class_maps for one in found], axis=0),
        before=before,
        after=after,
        opposing=None,
        cast=None,
        pooled=np.mean([one.pooled for one in found], axis=0),
        saved=sum(one.saved for one in found),
    )


class Predictor:
    """A trained model with test-time voting as its config's `tta` says.

    With `tta.early_exit` an image leaves the voting once its label cannot change.
    Given a folder, the compiled programs are kept there (program_cache.py).
    """

    def __init__(self, trained: Trained, mesh: Mesh, folder: Path | None = None):
        config, jit = trained.config, jax.jit
        if folder:
            names = {"classes": trained.class_names, "sites": trained.site_names}
            jit = Executables(folder, config=config.to_json(), **names).jit
        self.batch_size = -(-config.eval.batch_size // mesh.size) * mesh.size
        self._tta, self._mesh = config.tta, mesh
        self._variables = meshes.put_replicated(trained.variables, mesh)
        self._early = bool(config.tta.k) and config.tta.early_exit
        make = make_first_look if self._early else make_voting_step
        self._look = jit(make(trained.model, trained.scale, config.tta))
        crops = prefix_crops(trained.model, config.data.image_size, config.tta)
        if crops:  # The carried maps are replaced call by call: donated.
            votes = make_next_votes(trained.model, crops)
            self._forward = jit(votes, donate_argnums=3)
        else:
            self._forward = jit(make_vote_forward(trained.model))

    def __call__(self, images: np.ndarray, site: np.ndarray | None = None) -> Predicted:
        """Predicts uint8 [B, S, S, C] of at most `batch_size` images, C = 1 or 3.

        `site`, int32 [B], is needed for a network with parts of each site.
        """
        number, tta_config = len(images), self._tta
        filler = [(0, self.batch_size - number)] + [(0, 0)] * 3
        padded = meshes.put_rows(np.pad(images, filler, mode="edge"), self._mesh)
        if site is not None:
            site = np.pad(np.asarray(site, np.int32), filler[0], mode="edge")
        sites = meshes.put_rows(site, self._mesh)
        seen = self._look(self._variables, padded, sites)
        probs = np.asarray(seen["probs"])[:number]  # A slice by JAX is compiled.
        first = probs if self._early else probs[:, 0]
        before = first.argmax(1)
        after, opposing, cast, saved = before, None, None, 0
        if self._early:
            votes = early_exit.vote_early(
                functools.partial(self._forward, self._variables, sites)
                if "prefix" in seen
                else functools.partial(self._vote, site),
                seen["masks"],
                first,
                theta=tta_config.theta,
                chunk=tta_config.chunk,
                carried=seen.get("prefix"),
            )
            after, opposing, cast, saved = (
                votes.labels,
                votes.opposing,
                votes.cast,
                votes.saved,
            )
        elif tta_config.k:
            votes = jax.tree.map(lambda x: np.asarray(x)[:number], seen["votes"])
            after, opposing = votes.labels, votes.opposing
            cast = np.full(number, tta_config.k)
        maps = np.asarray(seen["class_maps"])[:number]
        pooled = np.asarray(seen["pooled"])[:number]
        return Predicted(first, maps, before, after, opposing, cast, pooled, saved)

    def _vote(self, site, masked: jax.Array, rows: np.ndarray) -> jax.Array:
        """Probabilities of normalised images; every device takes its share of them."""
        own = None if site is None else site[rows]
        if len(masked) % self._mesh.size == 0:
            shares = meshes.split_rows(self._mesh)
            masked, own = jax.device_put((masked, own), shares)
        return self._forward(self._variables, masked, own)
