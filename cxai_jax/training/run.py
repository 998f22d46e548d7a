"""What a run is made of, before its first step: data, network, optimiser, plan."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cxai_jax import data, methods, models, progress
from cxai_jax import mesh as meshes
from cxai_jax.data import pipeline
from cxai_jax.data.augment import PER_IMAGE, Scale
from cxai_jax.data.identity import identity
from cxai_jax.data.records import Dataset, Records, concatenate
from cxai_jax.methods.method import STREAMS, Method, Network
from cxai_jax.models import pretrained
from cxai_jax.objectives import losses
from cxai_jax.objectives.mixing import group_count
from cxai_jax.scoring import evaluate
from cxai_jax.training import validate
from cxai_jax.training.checkpoint import Checkpoints
from cxai_jax.training.optimizer import learning_rate_groups, make_optimizer


def build_network(
    config, num_classes: int, *, num_sites: int = 0, abstract: bool = False
) -> Network:
    """Builds the model of a config and fills in pretrained weights where named.

    With `abstract` the variables are shapes only, for weights that follow.
    """
    model = models.build(config.model, num_classes, num_sites=num_sites)
    size = config.data.image_size

    def initialise(key):
        images, site = jnp.zeros((1, size, size, 3)), jnp.zeros(1, jnp.int32)
        return model.init(key, images, "eval", site)

    with progress.stage("building the network"):
        if abstract:  # All of it inside: nothing is compiled.
            variables = jax.eval_shape(lambda: initialise(jax.random.key(0)))
        else:
            variables = jax.jit(initialise)(jax.random.key(config.seed))
    summary = {}
    if config.model.pretrained:
        variables, summary = pretrained.load_pretrained(
            config.model.pretrained, config.model.name, variables
        )
    scale = Scale(*models.normalisation(config.model.name))
    if config.data.normalisation == "per_image":
        scale = PER_IMAGE
    return Network(model, variables, scale, summary, num_sites)


def load_sources(config) -> dict[str, Dataset]:
    """The data set of a config as "", and each other one that its splits name.

    Splits are named alone, "test", or with a data set of their own, "usps:test".

    Raises:
      ValueError: for a data set with other classes or channels.
    """
    main = data.load(config.data)
    sources = {"": main}
    for field in ("fit", "target", "other", "test"):
        for split in filter(None, config.data[field].split("+")):
            name = split.rpartition(":")[0]
            if name in sources:
                continue
            other = config.data.copy_and_resolve_references()
            other.name, other.split, other.fold = name, "", ""
            sources[name] = data.load(other)
            given = f"config.data.{field}={split}"
            check_classes(main, sources[name], given)
            data.check_channels(config.data.name, name, given)
    return sources


def check_classes(main: Dataset, other: Dataset, given: str) -> None:
    """Raises ValueError unless two data sets have the same classes in one order."""
    if main.class_names != other.class_names:
        raise ValueError(
            f"{given}: {other.name} has the classes {', '.join(other.class_names)} and "
            f"{main.name} has {', '.join(main.class_names)}; they must be the same"
        )


def records_of(sources: dict[str, Dataset], names: str, field: str) -> Records:
    """The records of the splits that a config field names, e.g. "train+val".

    Raises:
      ValueError: for an unknown split.
    """
    parts = []
    for name in names.split("+"):
        source, _, split = name.rpartition(":")
        dataset = sources[source]
        if split not in dataset.splits:
            raise ValueError(
                f"{field} names the split {split!r}; {dataset.name} has "
                f"{', '.join(dataset.splits)}"
            )
        parts.append(dataset.splits[split])
    return parts[0] if len(parts) == 1 else concatenate(parts)


def fit_records(sources: dict[str, Dataset], names: str) -> Records:
    """The records of `config.data.fit`.

    Raises:
      ValueError: for an unknown split, or a class without a training image.
    """
    records, dataset = records_of(sources, names, "config.data.fit"), sources[""]
    counts = np.bincount(records.labels, minlength=len(dataset.class_names))
    if not counts.all():
        missing = dataset.class_names[int(counts.argmin())]
        raise ValueError(
            f"config.data.fit={names!r} of {dataset.name} has no image of the class "
            f"{missing!r}; prepare the data with some of every class in it"
        )
    return records


@dataclasses.dataclass
class Run:
    """Everything that a run holds beside its state."""

    config: object
    workdir: Path
    mesh: Mesh
    sources: dict[str, Dataset]  # "" is the run's own, others by name.
    network: Network
    evaluator: evaluate.Evaluator
    checkpoints: Checkpoints
    curve: list  # Learning curve: one dict of split -> scores per evaluation.
    started: float  # time.monotonic() when it was opened.
    aside: Path | None = None  # Where results go while a training has the workdir.

    def about(self) -> dict:
        """What every checkpoint keeps beside the state."""
        return {"curve": list(self.curve), "data": self.identities()}

    def identities(self) -> dict[str, dict]:
        """What the run's data are, by source."""
        return {name: identity(dataset) for name, dataset in self.sources.items()}

    @property
    def out(self) -> Path:
        """Where results go."""
        return self.aside or self.workdir

    @property
    def dataset(self) -> Dataset:
        return self.sources[""]

    @property
    def tested(self) -> Dataset:
        """The data set that the test split is of, of several joined by + the first."""
        first = self.config.data.test.split("+")[0]
        return self.sources[first.rpartition(":")[0]]

    @property
    def test(self) -> Records:
        return records_of(self.sources, self.config.data.test, "config.data.test")

    @property
    def validation(self) -> Records | None:
        """The split `val` where it is not trained on."""
        if "val" in self.config.data.fit.split("+"):
            return None
        return self.dataset.splits.get("val")


def open_run(config, workdir: Path, *, write: bool = False) -> Run:
    """Checks the config, loads the data and builds the network of a run.

    Only a training may `write` checkpoints.
    """
    validate.check_config(config)
    started = time.monotonic()
    mesh = meshes.training_mesh()
    with progress.stage("reading data"):
        sources = load_sources(config)
    scored = sources[""]
    for other in sources.values():
        if models.needs_site(config.model) and other.site_names != scored.site_names:
            raise ValueError(
                f"config.model.norm={config.model.norm!r} with config.model.adapter="
                f"{config.model.adapter!r} has parts for the sites of {scored.name}, "
                f"{', '.join(scored.site_names)}; {other.name} has "
                f"others: {', '.join(other.site_names)}"
            )
    network = build_network(
        config, len(scored.class_names), num_sites=len(scored.site_names)
    )
    scoring_mesh = meshes.scoring_mesh(config.eval.batch_size)
    evaluator = evaluate.Evaluator(network.model, network.scale, config, scoring_mesh)
    keep = config.train.keep_checkpoints if write else None
    checkpoints = Checkpoints(workdir, keep=keep)
    run = Run(
        config, workdir, mesh, sources, network, evaluator, checkpoints, [], started
    )
    records_of(sources, config.data.test, "config.data.test")
    validate.check_run(run)
    return run


def make_method(config, network: Network, total_steps: int, groups: int = 1) -> Method:
    """The method of a config with its optimiser."""
    labels = learning_rate_groups(config)
    optimizer = make_optimizer(config.optim, total_steps, labels)
    return methods.build(
        config, network, optimizer, total_steps=total_steps, groups=groups
    )


def initial_state(run: Run, method: Method):
    """The state that a run starts from, on all devices."""
    key = jax.random.key(run.config.seed)
    return meshes.put_replicated(method.init(key, run.network.variables), run.mesh)


class Stream(NamedTuple):
    """One of the batches that a step takes."""

    records: Records
    rows: Sequence[np.ndarray]  # rows[step] is the row numbers of that step.
    labelled: bool = True  # False: its labels do not reach the device.


class Plan(NamedTuple):
    """What a run trains on, how often and with what."""

    streams: dict[str, Stream]
    steps_per_epoch: int
    total_steps: int
    method: Method


def make_plan(run: Run) -> Plan:
    """Lays out the steps of a run; an epoch is one of the first stream.

    Raises:
      ValueError: if the batch does not fit the data or the devices, a lung mask term is
        wanted of data without masks, or a stream of the method has no data.
    """
    config, batch_size = run.config, run.config.train.batch_size
    fit = fit_records(run.sources, config.data.fit)
    validate.check_training(run, fit)
    per_epoch = len(epoch_rows(config, fit)) // batch_size
    per_call = config.train.steps_per_call
    total_steps = max(1, round(config.train.epochs * per_epoch))
    total_steps = -(-total_steps // per_call) * per_call
    mixed_at_once = batch_size // config.train.accumulate
    paired = config.mix.name not in ("none", "cutout")
    groups = (
        group_count(config.mix.groups, mixed_at_once, run.mesh.size) if paired else 1
    )
    weighed = config.copy_and_resolve_references()
    labels = fit.labels[epoch_rows(config, fit)]
    with weighed.unlocked():
        weighed.train.class_weights = class_weights(
            config.train.class_weights, labels, len(run.dataset.class_names)
        )
    method = make_method(weighed, run.network, total_steps, groups)
    return Plan(make_streams(run, method, fit), per_epoch, total_steps, method)


def class_weights(given: str, labels: np.ndarray, classes: int) -> str:
    """`config.train.class_weights` as numbers whose mean over the images is 1.

    auto: w_k = N / (K N_k), N_k of the N images being of class k.

    Args:
      given: none (returned as it is), auto, or a weight for each class, "1,3".
      labels: int [N], of the images of an epoch.
      classes: K.

    Raises:
      ValueError: for another number of weights than classes, or weights that are 0 for
        all classes that have images.
    """
    if given == "none":
        return given
    counts = np.bincount(labels, minlength=classes)
    weights = 1 / np.maximum(counts, 1)
    if given != "auto":
        weights = np.array(losses.parse_class_weights(given))
        if len(weights) != classes:
            raise ValueError(
                f"config.train.class_weights={given!r} has {len(weights)} weights and "
                f"the data {classes} classes; give one for each, or auto"
            )
    if not counts @ weights > 0:
        raise ValueError(
            f"config.train.class_weights={given!r} is 0 for every training image"
        )
    return ",".join(map(repr, (weights * len(labels) / (counts @ weights)).tolist()))


def epoch_rows(config, records: Records) -> np.ndarray:
    """Row numbers of one epoch of labelled images."""
    return pipeline.training_rows(
        records, config.data.site_repeats, config.train.batch_size
    )


def make_streams(run: Run, method: Method, fit: Records) -> dict[str, Stream]:
    """The streams of a method, each shuffled with a seed of its own.

    Raises:
      ValueError: if the config names no splits for a stream, or too few images.
    """
    config, streams = run.config, {}
    size = config.train.batch_size
    for number, name in enumerate(method.streams):
        field, labelled = STREAMS[name]
        if labelled:
            records, rows = fit, epoch_rows(config, fit)
        else:
            records = unlabelled_records(run, field)
            rows = np.arange(len(records))
        if len(rows) < size:
            raise ValueError(
                f"{field} has {len(rows)} images, fewer than "
                f"config.train.batch_size={size}; lower it"
            )
        stream = pipeline.row_stream(rows, size, config.seed + number)
        streams[name] = Stream(records, stream, labelled)
    return streams


def unlabelled_records(run: Run, field: str) -> Records:
    """The records of an unlabelled stream.

    Raises:
      ValueError: if the config names no splits for it.
    """
    names = run.config.data[field.rpartition(".")[2]]
    if not names:
        raise ValueError(
            f"config.method={run.config.method} takes unlabelled images, and {field} "
            "names no splits; set it, for example to usps:train"
        )
    return records_of(run.sources, names, field)
