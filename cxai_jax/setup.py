"""What a run is made of, before its first step: data, network, optimiser, plan."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from cxai_jax import data, evaluate, models, steps
from cxai_jax import mesh as meshes
from cxai_jax.augment import PER_IMAGE
from cxai_jax.checkpoint import Checkpoints
from cxai_jax.data import pipeline
from cxai_jax.data.records import Dataset, Records, concatenate
from cxai_jax.models import pretrained
from cxai_jax.optimizer import make_optimizer
from cxai_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Network:
    """A built model with its initial variables and input normalisation."""

    model: nn.Module
    variables: PyTree
    scale: steps.Scale
    pretrained: dict  # What was loaded; {} when training starts from scratch.


def build_network(config, num_classes: int, *, abstract: bool = False) -> Network:
    """Builds the model of a config and fills in pretrained weights where named.

    With `abstract` the variables are shapes only, for weights that follow.
    """
    model = models.build(config.model, num_classes)
    size = config.data.image_size
    images = jnp.zeros((1, size, size, 3))
    initialise = functools.partial(model.init, x=images, mode="eval")
    key = jax.random.key(config.seed)
    variables = (
        jax.eval_shape(initialise, key) if abstract else jax.jit(initialise)(key)
    )
    summary = {}
    if config.model.pretrained:
        variables, summary = pretrained.load_pretrained(
            config.model.pretrained, config.model.name, variables
        )
    scale = steps.Scale(*models.normalisation(config.model.name))
    if config.data.normalisation == "per_image":
        scale = PER_IMAGE
    return Network(model, variables, scale, summary)


def learning_rate_groups(config):
    """Parameters -> "trunk" | "fresh" per leaf; all fresh if trained from scratch."""

    def label(path, _):
        names = tuple(str(getattr(key, "key", key)) for key in path)
        trunk = config.model.pretrained and models.is_trunk(names)
        return "trunk" if trunk else "fresh"

    return lambda params: jax.tree_util.tree_map_with_path(label, params)


def fit_records(dataset: Dataset, names: str) -> Records:
    """The records of `config.data.fit`, e.g. "train+val".

    Raises:
      ValueError: for an unknown split, or a class without a training image.
    """
    parts = [split_of(dataset, name, "config.data.fit") for name in names.split("+")]
    records = parts[0] if len(parts) == 1 else concatenate(parts)
    counts = np.bincount(records.labels, minlength=len(dataset.class_names))
    if not counts.all():
        missing = dataset.class_names[int(counts.argmin())]
        raise ValueError(
            f"config.data.fit={names!r} of {dataset.name} has no image of the class "
            f"{missing!r}; prepare the data with some of every class in it"
        )
    return records


def split_of(dataset: Dataset, name: str, field: str) -> Records:
    """One split; raises ValueError naming the config field if there is none."""
    if name not in dataset.splits:
        raise ValueError(
            f"{field} names the split {name!r}; {dataset.name} has "
            f"{', '.join(dataset.splits)}"
        )
    return dataset.splits[name]


@dataclasses.dataclass
class Run:
    """Everything that a run holds beside its state."""

    config: object
    workdir: Path
    mesh: Mesh
    dataset: Dataset
    network: Network
    evaluator: evaluate.Evaluator
    checkpoints: Checkpoints
    curve: list  # Learning curve: one dict of split -> scores per evaluation.

    def about(self) -> dict:
        return {"curve": list(self.curve)}


def open_run(config, workdir: Path) -> Run:
    """Checks the config, loads the data and builds the network of a run."""
    steps.check_config(config)
    if config.train.selection not in ("last", "best_val"):
        raise ValueError(
            f"config.train.selection is {config.train.selection!r}; known: last, "
            "best_val (the test split never selects)"
        )
    mesh = meshes.make_mesh()
    dataset = data.load(config.data)
    split_of(dataset, config.data.test, "config.data.test")
    if config.train.selection == "best_val" and (
        "val" not in dataset.splits or "val" in config.data.fit.split("+")
    ):
        raise ValueError(
            "config.train.selection=best_val needs a split `val` that is not in "
            f"config.data.fit={config.data.fit!r}; {dataset.name} has "
            f"{', '.join(dataset.splits)}"
        )
    network = build_network(config, len(dataset.class_names))
    evaluator = evaluate.Evaluator(network.model, network.scale, config, mesh)
    checkpoints = Checkpoints(workdir, keep=config.train.keep_checkpoints)
    return Run(config, workdir, mesh, dataset, network, evaluator, checkpoints, [])


class Plan(NamedTuple):
    """What a run trains on, how often and with what."""

    fit: Records
    stream: grain.MapDataset  # stream[step] is the row numbers of that step.
    steps_per_epoch: int
    total_steps: int
    optimizer: optax.GradientTransformation


def make_plan(run: Run) -> Plan:
    """Lays out the steps of a run.

    Raises:
      ValueError: if the batch does not fit the data or the devices, or a lung mask
        term is wanted of data without masks.
    """
    config, batch_size = run.config, run.config.train.batch_size
    if batch_size % config.train.accumulate:
        raise ValueError(
            f"config.train.batch_size={batch_size} must be a multiple of "
            f"config.train.accumulate={config.train.accumulate}"
        )
    meshes.check_batch(
        batch_size // config.train.accumulate,
        run.mesh,
        "config.train.batch_size / config.train.accumulate",
    )
    fit = fit_records(run.dataset, config.data.fit)
    if config.align.mask_weight > 0 and fit.lung_masks is None:
        raise ValueError(
            f"config.align.mask_weight={config.align.mask_weight} needs lung masks and "
            f"{run.dataset.name} has none; set it to 0, or train on cxr or phantom"
        )
    rows = pipeline.training_rows(fit, config.data.site_repeats, batch_size)
    stream = pipeline.row_stream(rows, batch_size, config.seed)
    steps_per_epoch = len(rows) // batch_size
    per_call = config.train.steps_per_call
    total_steps = max(1, round(config.train.epochs * steps_per_epoch))
    total_steps = -(-total_steps // per_call) * per_call
    optimizer = make_optimizer(config.optim, total_steps, learning_rate_groups(config))
    return Plan(fit, stream, steps_per_epoch, total_steps, optimizer)
