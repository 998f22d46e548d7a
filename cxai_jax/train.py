"""The loop: load, compile once, step, log, score, save, resume.

The step and the data order are functions of (seed, step), so a run that is killed and
started again continues bit for bit. The host touches a device value at log steps only.
"""

import logging
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from cxai_jax import (
    compilation,
    evaluate,
    explain,
    host_memory,
    novelty,
    outcome,
    preview,
    report,
    setup,
    steps,
)
from cxai_jax import mesh as meshes
from cxai_jax.config import claim_workdir, read_config
from cxai_jax.optimizer import make_optimizer
from cxai_jax.writer import Timer, Writer, clock, read_log, write_json


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
    run = setup.open_run(config, workdir)
    plan = setup.make_plan(run)
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
        advance, compiled = compilation.compile_run(run, plan, state, step)
        if jax.default_backend() == "cpu":
            host_memory.limit(compiled["step_temp_bytes"] or 0)
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
    results = outcome.conclude(run, state)
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
    blocked = 0.0  # Seconds in which the host waited for the devices instead.
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
                asked_at = time.monotonic()
                jax.block_until_ready(pending)
                blocked += time.monotonic() - asked_at
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
    # A host that runs ahead waits for images while the devices are busy, and makes up
    # for it at the next log step.
    share = (waiting - blocked) / max(time.monotonic() - begun, 1e-9)
    if share > 0.2 and residency == "host":
        logging.warning(
            "host-bound: %.0f %% of the time went into waiting for images; set "
            "config.data.residency=device if the data fit",
            100 * share,
        )
    return state


def score_curve(run: setup.Run, writer: Writer, state, step: int) -> None:
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
      FileNotFoundError: if the workdir holds no run or no checkpoint.
    """
    read_config(workdir)  # A mistyped workdir is refused before anything is written.
    run = setup.open_run(config, workdir)
    optimizer = make_optimizer(config.optim, 1, setup.learning_rate_groups(config))
    state = steps.create_state(run.network.variables, optimizer)
    restored = run.checkpoints.restore("latest", state)
    if restored is None:
        raise FileNotFoundError(
            f"{workdir}/checkpoints holds no checkpoint; train first with --mode=train"
        )
    state, step, about = restored
    run.curve = about["curve"]
    results = outcome.conclude(run, meshes.put_replicated(state, run.mesh))
    results["steps"] = step
    finish(run, None, results)
    return results


def finish(run: setup.Run, writer: Writer | None, results: dict) -> None:
    """Writes results.json, report.html and what `predict` needs; closes the files."""
    if jax.process_index() == 0:
        config, split = run.config, run.config.data.test
        outcome.warn_below_chance(results["metrics"]["all"])
        write_json(run.workdir / "results.json", results)
        fit = setup.fit_records(run.dataset, config.data.fit)
        write_json(run.workdir / novelty.FILE, novelty.describe(fit))
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
