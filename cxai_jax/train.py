"""The loop: load, compile once, step, log, score, save, resume.

The step and the data order are functions of (seed, step), so a run that is killed and
started again continues bit for bit. The host touches a device value at log steps only.
"""

import dataclasses
import json
import logging
import platform
import signal
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from cxai_jax import (
    calibration,
    data,
    evaluate,
    explain,
    models,
    novelty,
    preview,
    report,
    steps,
)
from cxai_jax import mesh as meshes
from cxai_jax.checkpoint import Checkpoints
from cxai_jax.config import claim_workdir
from cxai_jax.data import pipeline
from cxai_jax.data.records import Dataset, Records, concatenate
from cxai_jax.models import pretrained
from cxai_jax.optimizer import make_optimizer
from cxai_jax.types import PyTree
from cxai_jax.writer import Timer, Writer, clock, read_log, write_json

EXPLAINED = 24  # Test images whose maps are measured where an alignment term is on.


@dataclasses.dataclass(frozen=True)
class Network:
    """A built model with its initial variables and input normalisation."""

    model: nn.Module
    variables: PyTree
    scale: steps.Scale
    pretrained: dict  # What was loaded; {} when training starts from scratch.


def build_network(config, num_classes: int) -> Network:
    """Builds the model of a config and fills in pretrained weights where named."""
    model = models.build(config.model, num_classes)
    size = config.data.image_size
    images = jnp.zeros((1, size, size, 3))
    variables = jax.jit(lambda key: model.init(key, images, "eval"))(
        jax.random.key(config.seed)
    )
    summary = {}
    if config.model.pretrained:
        variables, summary = pretrained.load_pretrained(
            config.model.pretrained, config.model.name, variables
        )
    scale = steps.Scale(*models.normalisation(config.model.name))
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
      ValueError: if the batch does not fit the data or the devices.
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
    rows = pipeline.training_rows(fit, config.data.site_repeats, batch_size)
    stream = pipeline.row_stream(rows, batch_size, config.seed)
    steps_per_epoch = len(rows) // batch_size
    per_call = config.train.steps_per_call
    total_steps = max(1, round(config.train.epochs * steps_per_epoch))
    total_steps = -(-total_steps // per_call) * per_call
    optimizer = make_optimizer(config.optim, total_steps, learning_rate_groups(config))
    return Plan(fit, stream, steps_per_epoch, total_steps, optimizer)


def train(config, workdir: Path) -> dict:
    """Trains (or continues) the run in `workdir`, scores it and writes results.json.

    Args:
      config: a config made like configs/common.py.
      workdir: holds config.json, metrics.jsonl, checkpoints/, predictions_*.npz and
        results.json.

    Returns:
      The contents of results.json.

    Raises:
      ValueError: for a config that does not fit the data, the devices or the workdir.
      FloatingPointError: if the loss stops being finite; the last checkpoint stays.
    """
    started = time.monotonic()
    claim_workdir(config, workdir, write=jax.process_index() == 0)
    run = open_run(config, workdir)
    plan = make_plan(run)
    state = steps.create_state(run.network.variables, plan.optimizer)
    step, restored = 0, run.checkpoints.restore("latest", state)
    if restored:
        state, step, about = restored
        run.curve = about["curve"]
    state = meshes.put_replicated(state, run.mesh)
    writer = Writer(workdir, start_step=step, active=jax.process_index() == 0)
    total_steps, steps_per_epoch = plan.total_steps, plan.steps_per_epoch
    if restored:
        writer.say(f"continuing {workdir} at step {step} of {total_steps}")
    compiled = {}
    if step < total_steps:
        advance, compiled = compile_run(run, plan, state, step)
        writer.say(
            f"compiled in {compiled['compile_s']:.1f} s; {len(plan.fit)} images, "
            f"{steps_per_epoch} steps per epoch, {total_steps} steps, images on the "
            f"{compiled['residency']}"
        )
        if writer.shows_images:
            fed = preview.training_sheet(config, plan.fit)
            writer.image(step, "training_images", fed)
        state = loop(
            run,
            writer,
            advance,
            state,
            step,
            total_steps,
            steps_per_epoch,
            compiled["residency"],
        )
    run.checkpoints.wait()
    results = conclude(run, state)
    results["time"] = {**compiled, "total_s": time.monotonic() - started}
    results["steps"] = total_steps
    finish(run, writer, results)
    return results


def loop(run, writer, advance, state, step, total_steps, steps_per_epoch, residency):
    """Advances `state` to `total_steps`; logs, scores and saves when due."""
    config = run.config.train
    periods = {
        "log": max(1, config.log_every_steps),
        "score": round(config.eval_every_epochs * steps_per_epoch),
        "save": round(config.checkpoint_every_epochs * steps_per_epoch),
    }
    timer = Timer(total_steps, step, config.batch_size)
    pending, waiting, begun = [], 0.0, time.monotonic()
    with StopSignal() as stop:
        while step < total_steps:
            state, metrics, waited = advance(state)
            pending.append(metrics)
            waiting += waited
            before, step = step, step + config.steps_per_call
            last = step == total_steps
            due = {
                name: last or (period and step // period != before // period)
                for name, period in periods.items()
            }
            if due["log"]:
                log(writer, timer, pending, step, total_steps, steps_per_epoch)
                pending = []
            if due["score"] and (periods["score"] or config.selection == "best_val"):
                score_curve(run, writer, state, step)
            asked = run.checkpoints.preempted(step) or stop.asked
            if due["save"] or asked:
                run.checkpoints.save("latest", step, state, run.about())
            if asked and not last:
                run.checkpoints.wait()
                writer.close()
                print(f"stopped at step {step}; the same command continues", flush=True)
                sys.exit(128 + signal.SIGTERM)
    share = waiting / max(time.monotonic() - begun, 1e-9)
    if share > 0.2 and residency == "host":
        logging.warning(
            "host-bound: the devices waited for images %.0f %% of the time; set "
            "config.data.residency=device if the data fit",
            100 * share,
        )
    return state


def score_curve(run: Run, writer: Writer, state, step: int) -> None:
    """Adds a row to the learning curve and keeps the best on validation.

    The test split is drawn in the curve and never selects.
    """
    row = {"step": step}
    for split in ("val", run.config.data.test):
        if split in run.dataset.splits and split not in run.config.data.fit.split("+"):
            records = run.dataset.splits[split]
            predictions = run.evaluator.predict(state, records)
            if writer.shows_images:
                maps = preview.class_map_sheet(predictions, records)
                writer.image(step, f"{split}_class_maps", maps)
            row[split] = evaluate.quick_score(predictions, run.dataset.positive)
            writer.scalars(step, {f"{split}_{n}": v for n, v in row[split].items()})
    if "val" in row:
        earlier = [other["val"]["accuracy"] for other in run.curve if "val" in other]
        if row["val"]["accuracy"] > max(earlier, default=-1.0):
            run.checkpoints.save("best", step, state, run.about())
    run.curve.append(row)


def score(config, workdir: Path) -> dict:
    """Scores the checkpoint of a finished or stopped run again (`--mode=eval`).

    Raises:
      FileNotFoundError: if the workdir holds no checkpoint.
    """
    run = open_run(config, workdir)
    optimizer = make_optimizer(config.optim, 1, learning_rate_groups(config))
    state = steps.create_state(run.network.variables, optimizer)
    restored = run.checkpoints.restore("latest", state)
    if restored is None:
        raise FileNotFoundError(
            f"{workdir}/checkpoints holds no checkpoint; train first with --mode=train"
        )
    state, step, about = restored
    run.curve = about["curve"]
    results = conclude(run, meshes.put_replicated(state, run.mesh))
    results["steps"] = step
    finish(run, None, results)
    return results


def conclude(run: Run, state) -> dict:
    """Scores the selected weights on the test split and collects results.json."""
    config, dataset = run.config, run.dataset
    selected = {"rule": config.train.selection}
    if config.train.selection == "best_val":
        best = run.checkpoints.restore("best", state)
        if best is None:
            raise FileNotFoundError(
                f"{run.workdir}/checkpoints/best is empty: no epoch was scored yet; "
                "continue with --mode=train"
            )
        state = meshes.put_replicated(best[0], run.mesh)
        selected["step"] = best[1]
    split = config.data.test
    predictions = run.evaluator.predict(state, dataset.splits[split])
    if jax.process_index() == 0:
        evaluate.save_predictions(run.workdir / f"predictions_{split}.npz", predictions)
    held_out = "val" in dataset.splits and "val" not in config.data.fit.split("+")
    calibrated = {}
    if held_out:
        validation = run.evaluator.predict(state, dataset.splits["val"])
        calibrated = calibration.calibrate(
            (validation["logits"], validation["labels"]),
            (predictions["logits"], predictions["labels"]),
            positive=dataset.positive,
        )
    optimistic = [row[split]["accuracy"] for row in run.curve if split in row]
    explained = config.align.weight > 0 or config.align.mask_weight > 0
    return {
        "metrics": evaluate.score(predictions, dataset, config),
        "explanations": explain_some(run, state) if explained else {},
        "calibration": calibrated,  # {} where no validation split was held out.
        "selected": selected,
        "best_test_epoch_accuracy (reference protocol, optimistic)": max(
            optimistic, default=None
        ),
        "curve": run.curve,
        "data": {
            "name": dataset.name,
            "class_names": list(dataset.class_names),
            "positive": dataset.class_names[dataset.positive],
            "site_names": list(dataset.site_names),
            "split_scheme": dataset.split_scheme,
            "fingerprint": dataset.fingerprint,
            "counts": {name: len(records) for name, records in dataset.splits.items()},
            "leakage": dataset.leakage,
        },
        "pretrained": run.network.pretrained,
        "config": json.loads(config.to_json()),
        "versions": versions(),
        "device": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "hosts": jax.process_count(),
        },
    }


def explain_some(run: Run, state) -> dict:
    """Measures the maps of some test images and keeps them for the report."""
    config, split = run.config, run.config.data.test
    records = run.dataset.splits[split]
    records = records.subset(explain.evenly(len(records), EXPLAINED))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    found = explain.explain(
        run.network.model, run.network.scale, config, run.mesh, variables, records
    )
    if jax.process_index() == 0:
        explain.save(run.workdir / f"explanations_{split}.npz", found)
    masks = explain.lung_masks(records, config.data.image_size)
    return explain.summarise(explain.measure(found, masks))


def finish(run: Run, writer: Writer | None, results: dict) -> None:
    """Writes results.json, report.html and what `predict` needs; closes the files."""
    if jax.process_index() == 0:
        config, split = run.config, run.config.data.test
        write_json(run.workdir / "results.json", results)
        fit = fit_records(run.dataset, config.data.fit)
        described = novelty.describe(fit, config.data.resize)
        write_json(run.workdir / novelty.FILE, described)
        page = report.run_report(
            results,
            evaluate.load_predictions(run.workdir / f"predictions_{split}.npz"),
            run.dataset.splits[split],
            read_log(run.workdir),
            explain.load(run.workdir / f"explanations_{split}.npz")
            if results["explanations"]
            else None,
        )
        (run.workdir / "report.html").write_text(page, encoding="utf-8")
    if writer:
        writer.close()
    run.checkpoints.close()


def compile_run(run: Run, plan: Plan, state: steps.TrainState, step: int):
    """`compile_step` of a run's own step, to go on from `step`."""
    train_step = steps.make_train_step(
        run.network.model,
        plan.optimizer,
        run.config,
        scale=run.network.scale,
        total_steps=plan.total_steps,
        groups=run.config.mix.groups or run.mesh.size,
    )
    return compile_step(
        train_step, state, plan.fit, plan.stream, step, run.config, run.mesh
    )


def compile_step(train_step, state, fit, stream, step, config, mesh: Mesh):
    """Compiles the step for where the images live.

    Returns:
      (advance, about): `advance(state) -> (state, metrics, seconds waited for data)`
      runs `steps_per_call` steps; `about` holds compile seconds, FLOPs and bytes.

    Raises:
      ValueError: if the step needs more memory than the device has.
    """
    key = meshes.put_replicated(jax.random.key_data(jax.random.key(config.seed)), mesh)
    transform = pipeline.fit_for_training(config)
    with_masks = config.align.mask_weight > 0
    budget = pipeline.device_budget(config.data.residency)
    canvas, split = pipeline.decode_all(fit, transform, budget, with_masks)
    if split is None:
        if config.train.steps_per_call != 1:
            raise ValueError(
                f"config.train.steps_per_call={config.train.steps_per_call} needs "
                "config.data.residency=device; set it to 1"
            )
        batches = pipeline.host_batches(
            fit, stream, step, transform, canvas, with_masks, mesh
        )
        inputs = ((batch,) for batch in batches)

        def call(state, batch, key):
            return train_step(state, batch, jax.random.wrap_key_data(key))

    else:
        split = meshes.put_replicated(split, mesh)
        rows = pipeline.row_blocks(
            stream, step, config.train.steps_per_call, config.train.batch_size, mesh
        )
        inputs = ((split, block) for block in rows)
        resident = steps.resident(train_step)

        def call(state, split, rows, key):
            return resident(state, split, rows, jax.random.wrap_key_data(key))

    first = next(inputs)
    # Donated: the new state takes the old one's memory. The output shardings are
    # fixed, so that the second call receives what the first was compiled for.
    jitted = jax.jit(call, donate_argnums=0, out_shardings=meshes.replicated(mesh))
    begun = time.monotonic()
    lowered = jitted.lower(state, *first, key)
    traced = time.monotonic()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    check_memory(memory, config.train.batch_size)
    about = {
        "trace_s": traced - begun,
        "compile_s": time.monotonic() - traced,
        "step_flops": (compiled.cost_analysis() or {}).get("flops"),
        "step_temp_bytes": getattr(memory, "temp_size_in_bytes", None),
        "argument_bytes": getattr(memory, "argument_size_in_bytes", None),
        "donated_bytes": getattr(memory, "alias_size_in_bytes", None),
        "residency": "host" if split is None else "device",
    }
    queue = [first]

    def advance(state):
        begun = time.monotonic()
        arguments = queue.pop() if queue else next(inputs)
        waited = time.monotonic() - begun
        return *compiled(state, *arguments, key), waited

    return advance, about


def check_memory(memory, batch_size: int, limit: int | None = None) -> None:
    """Raises ValueError if a compiled step cannot fit, with a batch size that would.

    Args:
      memory: what XLA says of the program; None where it says nothing.
      batch_size: of the step. What a step allocates grows in proportion to it.
      limit: bytes of a device; None asks the first one, which may not know (CPU).
    """
    limit = limit or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if memory is None or not limit:
        return
    fixed, grows = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    if fixed + grows > limit:
        fits = int(batch_size * max(limit - fixed, 0) / grows)
        raise ValueError(
            f"config.train.batch_size={batch_size} needs {(fixed + grows) / 1e9:.1f} "
            f"GB of {limit / 1e9:.1f} GB per device; about {fits} would fit. Lower it, "
            "raise config.train.accumulate, or set config.model.remat=True"
        )


def log(writer, timer, pending, step, total_steps, steps_per_epoch) -> None:
    """Reads the pending metrics off the device, writes and shows their means."""
    values = jax.device_get(pending)
    means = {name: np.mean([v[name] for v in values]) for name in values[0]}
    rate, left = timer.lap(step)
    if not np.isfinite(means["loss"]):
        raise FloatingPointError(
            f"the loss is {means['loss']} at step {step}; the last checkpoint is kept. "
            "Lower config.optim.lr_*, or set config.cpe.normalize=True (raw dot "
            "products of ReLU features are ill-scaled) or config.optim.clip_norm=1"
        )
    writer.scalars(step, {**means, "images_per_s": rate})
    terms = " ".join(f"{name} {value:.4g}" for name, value in means.items())
    writer.progress(
        f"step {step}/{total_steps} epoch {step / steps_per_epoch:.1f} {terms} "
        f"{rate:.1f} images/s ETA {clock(left)}",
        last=step == total_steps,
    )


def versions() -> dict:
    """Versions of everything that can change a number."""
    names = ("cxai-jax", "jax", "jaxlib", "flax", "optax", "numpy", "grain", "pillow")
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in names
    }


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that the loop can save before it ends."""

    def __init__(self):
        self.asked = 0
        self._before = {}

    def __enter__(self):
        if jax.process_count() > 1:  # There JAX's own preemption service listens.
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # Only the main thread may listen to signals.
                break
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked:  # The second time means now.
            raise KeyboardInterrupt
        self.asked = int(number)
