"""The loop: load, compile once, step, log, score, save, resume.

The step and the data order are functions of (seed, step), so a run that is killed and
started again continues bit for bit. The host touches a device value at log steps only.
"""

import logging
import signal
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from cxai_jax import host, progress, signals
from cxai_jax import mesh as meshes
from cxai_jax.config import claim_workdir, read_config
from cxai_jax.methods.method import Method
from cxai_jax.scoring import evaluate
from cxai_jax.training import finite, lock, preview, resume, selection
from cxai_jax.training.compile import compile_run
from cxai_jax.training.results import conclude
from cxai_jax.training.run import (
    Plan,
    Run,
    initial_state,
    make_method,
    make_plan,
    open_run,
)
from cxai_jax.writer import Writer

RESUME = (
    "Continue with the data as they were, train on these in another --workdir, or add "
    "--force_resume to continue all the same"
)
SCORE = (
    "Its results are left as they are; score it with its own data, at "
    "config.data.data_dir"
)


def train(config, workdir: Path, *, force_resume: bool = False) -> dict:
    """Trains (or continues) the run in `workdir`, scores it and writes results.json.

    Args:
      config: a config made like configs/common.py.
      workdir: holds config.json, metrics.jsonl, checkpoints/, predictions_*.npz and
        results.json.
      force_resume: continue although the data have changed since.

    Returns:
      The contents of results.json.

    Raises:
      ValueError: for a config that does not fit the data, the devices or the workdir,
        data that have changed, or a workdir in which another training runs.
      FloatingPointError: if the loss stops being finite; the last checkpoint stays.
    """
    if config.deterministic:
        host.be_deterministic()
    active = jax.process_index() == 0
    with signals.StopSignal(), lock.training(workdir, active=active):
        return train_alone(config, workdir, force_resume)


def train_alone(config, workdir: Path, force_resume: bool) -> dict:
    """`train` in a workdir that is held for it."""
    with signals.at_once(progress.where):
        claim_workdir(config, workdir, write=jax.process_index() == 0)
        run = open_run(config, workdir, write=True)
        plan = make_plan(run)
        state = initial_state(run, plan.method)
        restored = resume.restore(run, state, force=force_resume, advice=RESUME)
    step = 0
    if restored:
        state, step, about = restored
        state = meshes.put_replicated(state, run.mesh)
        run.curve = about["curve"]
    writer = Writer(workdir, start_step=step, active=jax.process_index() == 0)
    if restored:
        writer.say(f"continuing {workdir} at step {step} of {plan.total_steps}")
    compiled = {}
    if step < plan.total_steps and not selection.stopped(config, run.curve):
        with signals.at_once(progress.where):
            advance, compiled = compile_run(run, plan, state, step)
        signals.stop_if_asked("after compiling")
        announce(run, plan, writer, compiled, step)
        try:
            state, step = loop(
                run, plan, writer, advance, state, step, compiled["residency"]
            )
        except FloatingPointError:
            run.checkpoints.wait()  # The last good step may still be on its way.
            raise
    run.checkpoints.wait()
    results = conclude(run, plan.method, state, steps=step, compiled=compiled)
    writer.close()
    return results


def announce(run: Run, plan: Plan, writer: Writer, compiled: dict, step: int) -> None:
    """Says what was compiled and what will be trained on."""
    if jax.default_backend() == "cpu":
        host.limit(compiled["step_temp_bytes"] or 0)
    images = " + ".join(str(len(s.records)) for s in plan.streams.values())
    writer.say(
        f"compiled in {compiled['compile_s']:.1f} s; {images} images, "
        f"{plan.steps_per_epoch} steps per epoch, {plan.total_steps} steps, images on "
        f"the {compiled['residency']}"
    )
    if writer.shows_images:
        first = next(iter(plan.streams.values()))
        sheet = preview.training_sheet(run.config, first.records)
        writer.image(step, "training_images", sheet)


def loop(run: Run, plan: Plan, writer, advance, state, step: int, residency: str):
    """Advances `state` to the plan's last step, or to where patience ends.

    Logs, scores and saves when due.

    Returns:
      (state, steps taken).
    """
    config, total_steps = run.config.train, plan.total_steps
    steps_per_epoch = plan.steps_per_epoch
    periods = {
        "log": max(1, config.log_every_steps),
        "score": steps_of(config.eval_every_epochs, steps_per_epoch),
        "save": steps_of(config.checkpoint_every_epochs, steps_per_epoch),
    }
    pending, waiting, begun = [], 0.0, time.monotonic()
    saved_at, told = begun, (step, begun)
    blocked = 0.0  # Seconds in which the host waited for the devices instead.
    training = progress.stage("training", total_steps, "steps", done=step)
    with signals.StopSignal() as stop, training as show:
        first, last = step + config.steps_per_call, False
        while not last:
            state, metrics, waited = advance(state)
            pending.append(metrics)
            waiting += waited
            before, step = step, step + config.steps_per_call
            last = step == total_steps
            due = {
                name: last or (period and step // period != before // period)
                for name, period in periods.items()
            }
            due["log"] = due["log"] or (due["score"] and config.patience > 0)
            due["save"] = due["save"] or overdue(
                config.checkpoint_every_minutes, saved_at, due["log"]
            )
            if due["save"] and not due["log"]:
                finite.check(plan, pending, step)
            if due["log"] or step == first or show.due():
                asked_at = time.monotonic()
                jax.block_until_ready(pending)
                blocked += time.monotonic() - asked_at
                finite.check(plan, pending, step)
                here, keeps = (step, time.monotonic()), writer if due["log"] else None
                log(run, plan, keeps, show, pending, told, here)
                told, pending = here, [] if due["log"] else pending
            if due["score"] and (periods["score"] or config.selection == "best_val"):
                score_curve(run, plan.method, writer, state, step)
                if not last and selection.stopped(run.config, run.curve):
                    last = due["save"] = True
                    writer.say(
                        f"stopped at step {step} of {total_steps}: {config.patience} "
                        f"evaluations without a better {config.select_metric}"
                    )
            asked = run.checkpoints.preempted(step) or stop.asked
            if due["save"] or asked:
                run.checkpoints.save("latest", step, state, run.about())
                saved_at = time.monotonic()
            if asked and not last:
                run.checkpoints.wait()
                writer.close()
                signals.stop(stop.asked or signal.SIGTERM, f"at step {step}")
    # A host that runs ahead waits for images while the devices are busy, and makes up
    # for it at the next log step.
    share = (waiting - blocked) / max(time.monotonic() - begun, 1e-9)
    if share > 0.2 and residency == "host":
        logging.warning(
            "host-bound: %.0f %% of the time went into waiting for images; set "
            "config.data.residency=device if the data fit",
            100 * share,
        )
    return state, step


def steps_of(epochs: float, steps_per_epoch: int) -> int:
    """A period in steps, at least one; 0 stays 0, never."""
    return max(1, round(epochs * steps_per_epoch)) if epochs else 0


def log(run: Run, plan: Plan, writer, show, pending, told, here) -> None:
    """Reads the pending metrics off the device, shows and, with a writer, keeps them.

    Args:
      told: step and time of the last line.
      here: of this one.
    """
    (told_step, told_at), (step, now) = told, here
    means = finite.means(jax.device_get(pending))
    pace = (step - told_step) / max(now - told_at, 1e-9)
    rate = pace * run.config.train.batch_size
    terms = " ".join(f"{name} {value:.4g}" for name, value in means.items())
    left = progress.clock((plan.total_steps - step) / pace)
    show(
        step,
        f"step {step}/{plan.total_steps} epoch {step / plan.steps_per_epoch:.1f} "
        f"{terms} {rate:.1f} images/s ETA {left}",
        now=True,
    )
    if writer:
        writer.scalars(step, {**means, "images_per_s": rate})


def overdue(minutes: float, saved_at: float, together: bool) -> bool:
    """Whether the last save is too long ago.

    The clocks of several hosts differ: they ask the first one where they are `together`
    anyway, at log steps.
    """
    late = bool(minutes) and time.monotonic() - saved_at >= 60 * minutes
    if jax.process_count() == 1:
        return late
    return together and bool(multihost_utils.broadcast_one_to_all(np.int32(late)))


def score_curve(run: Run, method: Method, writer: Writer, state, step: int) -> None:
    """Adds a row to the learning curve and keeps the best on validation.

    The test split is drawn in the curve and never selects.
    """
    row = {"step": step}
    splits = {"val": run.validation}
    if run.config.data.test not in run.config.data.fit.split("+"):
        splits[run.config.data.test] = run.test
    for split, records in splits.items():
        if records is None:
            continue
        scored = method.scored(state)
        predictions = run.evaluator.predict(scored, records, votes=False)
        if writer.shows_images:
            maps = preview.class_map_sheet(predictions, records)
            writer.image(step, f"{split}_class_maps", maps)
        metric = run.config.train.select_metric
        positive = run.dataset.positive
        row[split] = evaluate.quick_score(predictions, positive, also=metric)
        writer.scalars(step, {f"{split}_{n}": v for n, v in row[split].items()})
    best = "val" in row and selection.gained([*run.curve, row], metric)
    if best:
        run.checkpoints.save("best", step, state, run.about())
    run.curve.append(row)


def score(config, workdir: Path) -> dict:
    """Scores the checkpoint of a finished or stopped run again (`--mode=eval`).

    Beside a live training the results go to `workdir/eval/live`: the workdir is its.

    Raises:
      FileNotFoundError: if the workdir holds no run or no checkpoint.
      ValueError: for another config or other data than the run has trained on.
    """
    read_config(workdir)  # A mistyped workdir is refused before anything is written.
    with signals.StopSignal():
        return score_alone(config, workdir)


def score_alone(config, workdir: Path) -> dict:
    """`score` where signals are listened to."""
    claim_workdir(config, workdir, write=False)
    if not any((workdir / "checkpoints" / "latest").glob("*")):  # Before any work.
        raise FileNotFoundError(
            f"{workdir}/checkpoints holds no checkpoint; train first with --mode=train"
        )
    run = open_run(config, workdir)
    method = make_method(config, run.network, total_steps=1)
    restored = resume.restore(run, initial_state(run, method), advice=SCORE)
    if restored is None:
        raise FileNotFoundError(f"{workdir}: its first checkpoint is being written")
    state, step, about = restored
    run.curve = about["curve"]
    if who := lock.holder(workdir):
        run.aside = workdir / "eval" / "live"
        run.out.mkdir(parents=True, exist_ok=True)
        logging.warning("%s is writing in %s: results go to %s", who, workdir, run.out)
    state = meshes.put_replicated(state, run.mesh)
    return conclude(run, method, state, steps=step, compiled={})
