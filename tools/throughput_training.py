"""python -m tools.throughput_training --config=siteB:full,lite0 [--data_dir=DIR]

Images per second of scoring and of training with images on the host, for a config and
its prepared data: who waits, the network or those who read for it?

Scoring, as --mode=eval does it but for the votes: reading the test split alone, the
network alone on one of its batches, both together, and the metrics. Training with
config.data.residency=host: what grain delivers with 0, 2 and more threads when nothing
else runs (of a method with several streams the first), what the train step eats of a
batch that is there already, and both together. `network_share` is the seconds that the
network needs alone over those of both together; it says little where others were busy.
Weights are untrained. CPU seconds stand beside the clock. Any config as a file:
--config=from_json:FILE.json.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from cxai_jax import host
from cxai_jax import mesh as meshes
from cxai_jax.config import load_config_file
from cxai_jax.data import pipeline
from cxai_jax.scoring import evaluate
from cxai_jax.training.compile import compile_run, unlabelled
from cxai_jax.training.run import Plan, Run, initial_state, make_plan, open_run
from cxai_jax.voting.forward import make_predict_step
from tools.benchmark_session import describe, make_session
from tools.throughput import show, timed, with_share

THREADS = (0, pipeline.THREADS, 4)
WARM = 6  # Batches until none is left that was read before the clock ran.


def scoring(run: Run) -> dict[str, dict]:
    """Each stage of scoring the test split once."""
    config, records, found = run.config, run.test, {}
    size, batch_size = config.data.image_size, config.eval.batch_size
    canvas = (size, size, records.images[0].shape[-1])
    given = pipeline.fit_for_scoring(config), canvas, batch_size, run.evaluator.mesh
    variables = jax.device_put(run.network.variables)

    def read():
        for batch, _ in pipeline.scoring_batches(records, *given):
            jax.block_until_ready(batch)
        return batch

    batch, found["read"] = timed(len(records), read)
    plain = config.tta.copy_and_resolve_references()
    plain.k = 0
    step = make_predict_step(run.network.model, run.network.scale, plain)
    step, number = jax.jit(step), -(-len(records) // batch_size)

    def forward(number):
        for _ in range(number):
            out = step(variables, batch.images, batch.sites)
        jax.block_until_ready(out)

    forward(1)  # Compiles.
    found["network"] = timed(number * batch_size, forward, number)[1]

    def predict(records):
        return run.evaluator.predict(variables, records, votes=False)

    predict(records.subset([0]))  # Compiles.
    predictions, found["read and network"] = timed(len(records), predict, records)
    given = predictions, run.tested, config
    found["metrics"] = timed(len(records), evaluate.score, *given)[1]
    return with_share(found, "network", ["read and network"])


def training(run: Run, steps: int, threads: Sequence[int]) -> dict[str, dict]:
    """What the first stream delivers, what the step eats, and both together."""
    plan, images, found = make_plan(run), steps * run.config.train.batch_size, {}
    for number in threads:
        batches = delivered(run, plan, number)
        batch = take(batches, WARM)
        found[f"{number} threads deliver"] = timed(images, take, batches, steps)[1]
        batches.close()
    fed = {
        name: batch if stream.labelled else unlabelled(batch)
        for name, stream in plan.streams.items()
    }
    key = meshes.put_replicated(jax.random.key_data(jax.random.key(0)), run.mesh)
    step = jax.jit(
        lambda state, fed, key: plan.method.step(
            state, fed, jax.random.wrap_key_data(key)
        ),
        donate_argnums=0,
        out_shardings=meshes.replicated(run.mesh),
    )

    def eat(state):
        return step(state, fed, key)[0]

    advance, _ = compile_run(run, plan, initial_state(run, plan.method), 0)
    for name, go, warm in (
        ("the step eats", eat, 2),
        ("both together", lambda state: advance(state)[0], WARM),
    ):
        state = repeat(go, initial_state(run, plan.method), warm)
        found[name] = timed(images, repeat, go, state, steps)[1]
    return with_share(found, "the step eats", ["both together"])


def repeat(go: Callable, state, steps: int):
    """The state after so many steps, waited for once, as training does."""
    for _ in range(steps):
        state = go(state)
    return jax.block_until_ready(state)


def delivered(run: Run, plan: Plan, threads: int):
    """Batches of the first stream, decoded by so many threads."""
    config, stream = run.config, next(iter(plan.streams.values()))
    fit = pipeline.fit_for_training(config)
    masks = stream.labelled and config.align.mask_weight > 0
    canvas, _ = pipeline.decode_all(stream.records, fit, 0.0, masks)
    given = stream.records, stream.rows, 0, fit, canvas, masks, run.mesh
    return pipeline.host_batches(*given, threads=threads)


def take(batches, number: int):
    """The last of the next `number` batches."""
    for _ in range(number):
        batch = jax.block_until_ready(next(batches))
    return batch


def make_config(given: argparse.Namespace):
    """The config of the command line, with images on the host."""
    config = load_config_file(given.config)
    config.data.residency, config.train.steps_per_call = "host", 1
    for group, field in (("data", "data_dir"), ("train", "batch_size")):
        if getattr(given, field):
            config[group][field] = getattr(given, field)
    return config


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.throughput_training")
    parser.add_argument("--config", required=True, help="FILE.py or name, :ROWS")
    parser.add_argument("--data_dir", help="of the prepared data")
    parser.add_argument("--batch_size", type=int, help="of training")
    parser.add_argument("--steps", type=int, default=8, help="of training")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument(
        "--json", type=Path, default=Path("experiments/results/host_path_cpu.json")
    )
    given = parser.parse_args(arguments)
    host.keep_freed_memory()
    host.one_device_a_core()
    try:
        config = make_config(given)
        with tempfile.TemporaryDirectory() as folder:
            run = open_run(config, Path(folder) / "run")
            found = {"scoring": scoring(run)}
            found["training"] = training(run, given.steps, given.threads)
            run.checkpoints.close()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    result = describe(make_session())
    result = {n: result[n] for n in ("git", "time", "host", "device", "versions")}
    result |= {"config": given.config, "network": config.model.name}
    result |= {"pixels": config.data.image_size, "batch": config.train.batch_size}
    result |= {"scoring_batch": config.eval.batch_size, "steps": given.steps, **found}
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    for part in ("scoring", "training"):
        show(found[part])


if __name__ == "__main__":
    main(sys.argv[1:])
