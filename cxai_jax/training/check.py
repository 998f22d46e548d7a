"""`--mode=check`: is everything in place for this run, and what will it cost?

Environment, devices, the data with a montage, the leakage verdict, five steps on one
batch (a network that cannot learn 32 images by heart will not learn a data set), then
the run's own train and predict steps, timed.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from cxai_jax import disk
from cxai_jax import mesh as meshes
from cxai_jax.config import claim_workdir
from cxai_jax.data.records import Dataset, Records
from cxai_jax.progress import clock
from cxai_jax.report import pictures
from cxai_jax.training import preview
from cxai_jax.training.compile import compile_run
from cxai_jax.training.results import versions
from cxai_jax.training.run import (
    Run,
    fit_records,
    initial_state,
    make_method,
    make_plan,
    open_run,
)
from cxai_jax.types import Batch, PyTree

SAMPLE = 200  # Images per split behind the gray-level statistics.
OVERFIT_STEPS = 5
TIMED_CALLS = 3


def check(config, workdir: Path) -> str:
    """Checks a run without starting it; writes workdir/check.png.

    Returns:
      The findings, one screen of text. Lines that begin with "!" deserve a look.

    Raises:
      ValueError, FileNotFoundError: as `train.train` would for this config.
    """
    claim_workdir(config, workdir, write=False)
    lines = list(environment())
    run = open_run(config, workdir)
    fit = fit_records(run.sources, config.data.fit)
    lines += describe_data(run.dataset)
    workdir.mkdir(parents=True, exist_ok=True)
    picture = workdir / "check.png"
    disk.write(picture, pictures.encode(montage(config, run.dataset, fit), "PNG"))
    lines.append(
        f"pictures   {picture}: rows of each class, then as the step sees them"
    )
    lines += overfit(run, fit)
    lines += cost(run)
    run.checkpoints.close()
    return "\n".join(lines)


def environment() -> Iterator[str]:
    """Versions and devices."""
    found = versions()
    shown = ("python", "jax", "flax", "optax", "numpy")
    yield "versions   " + ", ".join(f"{name} {found[name]}" for name in shown)
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    yield (
        f"devices    {jax.device_count()} x {device.device_kind} "
        f"({jax.default_backend()}), processes: {jax.process_count()}"
        + (f", {gigabytes(limit)} each" if limit else "")
    )
    if warning := unused_gpu():
        yield f"! {warning}"


def unused_gpu(device: Path = Path("/dev/nvidia0")) -> str:
    """What to do where jax computes on the CPU beside an NVIDIA GPU; else ""."""
    if jax.default_backend() != "cpu" or not device.exists():
        return ""
    return (
        "there is an NVIDIA GPU but jax runs on the CPU; install its GPU build with "
        "pip install 'jax[cuda13]'"
    )


def describe_data(dataset: Dataset) -> Iterator[str]:
    """Counts, gray levels and leakage of a data set."""
    names = dataset.class_names
    yield (
        f"data       {dataset.name}, split {dataset.split_scheme}, positive class "
        f"{names[dataset.positive]}"
    )
    levels = {}
    for split, records in dataset.splits.items():
        counts = np.bincount(records.labels, minlength=len(names))
        patients = len(set(records.patients) - {""}) or "unknown"
        levels[split], spread, sizes = gray_levels(records)
        yield (
            f"  {split:<8} "
            + ", ".join(f"{n} {c}" for n, c in zip(names, counts, strict=True))
            + f"; {patients} patients; {sizes} px; "
            + f"gray {levels[split]:.0f} ± {spread:.0f}"
        )
        for name, count in zip(names, counts, strict=True):
            if not count:
                yield f"! {split} has no image of {name}: its scores are undefined"
    if np.ptp(list(levels.values())) > 25:
        yield "! the splits differ in mean gray level by more than 10 % of the range"
    verdict = dataset.leakage.get("verdict", "not examined")
    yield ("leakage    " if verdict == "clean" else "! leakage  ") + verdict


def gray_levels(records: Records) -> tuple[float, float, str]:
    """Mean, standard deviation and sizes of up to `SAMPLE` images, evenly chosen."""
    rows = np.linspace(0, len(records) - 1, min(SAMPLE, len(records))).astype(int)
    images = [records.images[int(row)] for row in rows]
    shapes = np.array([image.shape[:2] for image in images])
    ranges = zip(shapes.min(0), shapes.max(0), strict=True)
    sides = [f"{low}" if low == high else f"{low}-{high}" for low, high in ranges]
    means = [image.mean() for image in images]
    squares = [np.square(image.astype(np.float64)).mean() for image in images]
    mean = float(np.mean(means))
    return mean, float(np.sqrt(max(np.mean(squares) - mean**2, 0))), " x ".join(sides)


def montage(config, dataset: Dataset, fit: Records) -> np.ndarray:
    """Rows of `preview.COLUMNS` images: each class, then augmented and mixed ones."""
    rows = []
    for label, name in enumerate(dataset.class_names):
        own = np.flatnonzero(fit.labels == label)
        chosen = own[np.linspace(0, len(own) - 1, preview.COLUMNS).astype(int)]
        images = preview.sheet([fit.images[int(row)] for row in chosen])
        rows.append(preview.titled(images, f"{name}: {len(own)} images"))
    seen = preview.training_sheet(config, fit)
    rows.append(preview.titled(seen, "as the step sees them, augmented and mixed"))
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, [(0, 4), (0, width - row.shape[1]), (0, 0)]) for row in rows]
    )


def overfit(run: Run, fit: Records) -> Iterator[str]:
    """Five steps of plain cross-entropy on one batch that does not change."""
    config = run.config.copy_and_resolve_references()
    config.unlock()
    config.method, config.mix.name, config.cpe.weight = "guided", "none", 0.0
    config.contrastive.weight = 0.0
    config.align.weight = config.align.mask_weight = 0.0
    config.train.class_weights, config.train.label_smoothing = "none", 0.0
    config.augment.crop = "none"
    config.augment.hflip = config.augment.vflip = False
    config.augment.rotate = config.augment.intensity = 0.0
    config.optim.schedule, config.optim.warmup = "constant", 0.0
    config.train.accumulate = 1
    size = max(min(config.train.batch_size, 32, len(fit)) // run.mesh.size, 1)
    rows = np.random.default_rng(0).permutation(len(fit))[: size * run.mesh.size]
    if len(rows) % run.mesh.size:
        yield f"! overfit  left out: {len(fit)} images for {run.mesh.size} devices"
        return
    method = make_method(config, run.network, OVERFIT_STEPS)
    images, sizes = preview.sources(config, fit, rows)
    labels, sites = (np.asarray(x[rows], np.int32) for x in (fit.labels, fit.sites))
    batch = Batch(images, sizes, labels, sites, np.ones(len(rows), bool))
    batches = {"labelled": meshes.put_rows(batch, run.mesh)}
    state, step = initial_state(run, method), jax.jit(method.step)
    found = []
    for _ in range(OVERFIT_STEPS):
        state, metrics = step(state, batches, jax.random.key(config.seed))
        found.append(float(metrics["loss"]))
    falls = found[-1] < found[0]
    yield (
        ("overfit    " if falls else "! overfit  ")
        + f"{len(rows)} images, {OVERFIT_STEPS} steps: loss "
        + " ".join(f"{loss:.3f}" for loss in found)
        + ("" if falls else "; it must fall: check labels and config.optim.lr_*")
    )


def cost(run: Run) -> Iterator[str]:
    """Compiles the run's own step, times it and extrapolates."""
    config, plan = run.config, make_plan(run)
    state = initial_state(run, plan.method)
    advance, about = compile_run(run, plan, state, 0)
    state, metrics, _ = advance(state)
    jax.block_until_ready(metrics)
    begun = time.monotonic()
    for _ in range(TIMED_CALLS):
        state, metrics, _ = advance(state)
    loss = float(np.mean(metrics["loss"]))  # Waits for the last step.
    per_step = (time.monotonic() - begun) / (TIMED_CALLS * config.train.steps_per_call)
    terms = " ".join(f"{n} {np.mean(v):.3g}" for n, v in sorted(metrics.items()))
    yield ("" if np.isfinite(loss) else "! ") + f"step       {terms}"
    yield (
        f"time       compiled in {about['compile_s']:.0f} s; {plan.total_steps} steps "
        f"of {1000 * per_step:.0f} ms: {clock(plan.total_steps * per_step)}"
    )
    yield scoring(run, plan.method.scored(state))
    if about["argument_bytes"] is not None:
        yield (
            f"memory     {gigabytes(about['argument_bytes'])} weights and images "
            f"({about['residency']} residency) + {gigabytes(about['step_temp_bytes'])} "
            "for a step, per device"
        )


def scoring(run: Run, variables: PyTree) -> str:
    """Compiles the predict step, votes included, times a batch and extrapolates."""
    config, test = run.config, run.test
    batch = test.subset(np.arange(min(config.eval.batch_size, len(test))))
    begun = time.monotonic()
    run.evaluator.predict(variables, batch)
    compiled = time.monotonic()
    run.evaluator.predict(variables, batch)
    per_batch = time.monotonic() - compiled
    batches = -(-len(test) // config.eval.batch_size)
    return (
        f"scoring    compiled in {compiled - begun - per_batch:.0f} s; {len(test)} "
        f"images, {batches} batches of {config.eval.batch_size} x {config.tta.k + 1} "
        f"forward passes in {1000 * per_batch:.0f} ms: {clock(batches * per_batch)}"
    )


def gigabytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
