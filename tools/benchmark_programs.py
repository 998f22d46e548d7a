"""What the benchmark times: the library's own steps, compiled as in training.

Synthetic uint8 images, random weights, fixed seeds. A `Program` holds what compilation
told about itself and a `run(calls)` that waits once, at the end.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from cxai_jax import mesh as meshes
from cxai_jax import models
from cxai_jax.data import pipeline
from cxai_jax.data.augment import Scale, normalise
from cxai_jax.data.records import Records
from cxai_jax.methods.method import Network, in_one_call
from cxai_jax.objectives import mixing
from cxai_jax.training.compile import compile_step
from cxai_jax.training.run import Stream, build_network, make_method
from cxai_jax.types import Batch

CLASSES = 2
ROTATION = 4  # Batches that take turns, so that no call repeats the one before.
TOTAL_STEPS = 1000  # Only schedules read it.

# The step by what it does; everything else is configs/common.py. Unit vectors keep the
# contrastive term of an untrained network finite and cost the same.
PLAIN = {"mix.name": "none", "cpe.weight": 0.0}
SNAPMIX = {"cpe.weight": 0.0}
FULL = {"cpe.normalize": True}
ALIGN = {**FULL, "align.weight": 1.0}
EVAL_MAPS = {"cam.mode": "eval"}
# The peer gets images of the network's size, ready to use.
NO_AUGMENTATION = {
    "augment.crop": "none",
    "augment.hflip": False,
    "augment.vflip": False,
}


@dataclass
class Program:
    """Something compiled and ready to be timed.

    Args:
      run: makes that many calls, waits, returns the last call's loss (None without).
      images: images per call.
      about: trace_s, compile_s, cache_hit, bytes_xla, peak_bytes and, of a train step,
        donated_bytes, state_bytes and the last call's gradient_norm.
      hlo: text of the optimised program.
    """

    run: Callable[[int], float | None]
    images: int
    about: dict = field(default_factory=dict)
    hlo: str = ""


class CacheHits:
    """Counts programs that the persistent compilation cache delivered."""

    count = 0

    @classmethod
    def listen(cls) -> None:
        def heard(event: str, **_) -> None:
            cls.count += event == "/jax/compilation_cache/cache_hits"

        jax.monitoring.register_event_listener(heard)


CacheHits.listen()


def make_config(**fields):
    """configs/common.py with fields changed, e.g. {"mix.name": "none"}."""
    config = common.get_config()
    config.update_from_flattened_dict(
        {"optim.lr_fresh": 0.001, "model.name": "resnet50", **fields}
    )
    return config


def synthetic_images(count: int, size: int, seed: int = 0) -> tuple:
    """Gray uint8 images [N, size, size, 1] and labels int32 [N], never constant."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, size, size, 1), np.uint8)
    return images, rng.integers(0, CLASSES, count).astype(np.int32)


def synthetic_split(count: int, size: int) -> Batch:
    images, labels = synthetic_images(count, size)
    return Batch(
        images=images,
        sizes=np.full((count, 2), size, np.int32),
        labels=labels,
        sites=np.zeros(count, np.int32),
        valid=np.ones(count, bool),
    )


@functools.cache
def initial_variables(name: str, size: int) -> dict:
    """NumPy weights of a fresh network: one start for all variants and the peer."""
    config = make_config(**{"model.name": name, "data.image_size": size})
    return jax.device_get(build_network(config, CLASSES).variables)


def build(config, lowering: str = "auto") -> tuple:
    """The model of a config, its weights and its input scale."""
    model = models.build(config.model, CLASSES).clone(lowering=lowering)
    variables = initial_variables(config.model.name, config.data.image_size)
    return model, variables, Scale(*models.normalisation(config.model.name))


def begin(config, mesh, lowering: str = "auto") -> tuple:
    """(method, state on the devices) of a config, with the weights of all variants."""
    model, variables, scale = build(config, lowering)
    groups = config.mix.groups or mesh.size
    method = make_method(config, Network(model, variables, scale), TOTAL_STEPS, groups)
    state = method.init(jax.random.key(0), variables)
    return method, meshes.put_replicated(state, mesh)


def compile_timed(function: Callable, *arguments, **jit_options) -> tuple:
    """jit, with tracing and compilation timed apart: (compiled, about)."""
    hits, begun = CacheHits.count, time.monotonic()
    lowered = jax.jit(function, **jit_options).lower(*arguments)
    traced = time.monotonic()
    compiled = lowered.compile()
    done = time.monotonic()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    about = {
        "trace_s": traced - begun,
        "compile_s": done - traced,
        "cache_hit": CacheHits.count > hits,
        "bytes_xla": cost.get("bytes accessed"),
        "peak_bytes": None,
        "donated_bytes": None,
    }
    if memory is not None:
        about["donated_bytes"] = memory.alias_size_in_bytes
        about["peak_bytes"] = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return compiled, about


def step_program(
    *,
    batch: int,
    size: int = 224,
    lowering: str = "auto",
    devices: int = 1,
    steps_per_call: int = 1,
    count: int | None = None,
    **fields,
) -> Program:
    """The train step on a split that lies on the device.

    Args:
      batch: images per step, over all devices.
      size: pixels, side of the input.
      lowering: of models/lowering.py; "xla" is the reference.
      devices: how many take part.
      steps_per_call: steps in one dispatch.
      count: images in the split; default ROTATION batches.
      **fields: config fields by dotted name.
    """
    fields = {**NO_AUGMENTATION, "data.image_size": size, **fields}
    config = make_config(**{"train.batch_size": batch, **fields})
    mesh = meshes.make_mesh(devices)
    method, state = begin(config, mesh, lowering)
    steps = in_one_call(method.step)
    count = count or ROTATION * batch
    side = size if config.augment.crop == "none" else config.data.resize
    split = meshes.put_replicated(synthetic_split(count, side), mesh)
    splits = {name: split for name in method.streams}
    blocks = row_blocks(count, batch, steps_per_call, mesh)
    key = meshes.put_replicated(jax.random.key_data(jax.random.key(0)), mesh)

    def call(state, splits, rows, key):
        rows = {name: rows for name in splits}
        return steps(state, splits, rows, {}, jax.random.wrap_key_data(key))

    compiled, about = compile_timed(
        call,
        state,
        splits,
        blocks[0],
        key,
        donate_argnums=0,
        out_shardings=meshes.replicated(mesh),
    )
    about["state_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    done = 0

    def run(calls: int) -> float:
        nonlocal state, done
        for _ in range(calls):
            state, metrics = compiled(state, splits, blocks[done % len(blocks)], key)
            done += 1
        # Reading them waits for everything before.
        about["gradient_norm"] = float(metrics["gradient_norm"][-1])
        return float(metrics["loss"][-1])

    return Program(run, batch * steps_per_call, about, compiled.as_text())


def first_draw(batch: int, size: int) -> tuple[list, tuple, tuple]:
    """What the first step of a `step_program` on one device mixes.

    Returns:
      The row of each image's donor [B], the destination and the source box.
    """
    mix = make_config().mix
    key = jax.random.fold_in(jax.random.key(0), 0)  # As `methods/guided.py` does.
    drawn = mixing.draw(
        jax.random.split(key)[1],
        batch,
        prob=mix.prob,
        beta=mix.beta,
        boxes="batch",
        groups=1,
    )
    images = jnp.zeros((batch, size, size, 1))
    boxes = (
        mixing.sample_boxes(drawn.keys[i], drawn.lam[i], images)[0].tolist()
        for i in (0, 1)
    )
    return drawn.permutation[0].tolist(), *map(tuple, boxes)


def row_blocks(count: int, batch: int, steps_per_call: int, mesh) -> list:
    """Row numbers [S, B] of ROTATION calls, a shuffled walk through the split."""
    needed = ROTATION * steps_per_call * batch
    rng = np.random.default_rng(1)
    rows = np.concatenate(
        [rng.permutation(count) for _ in range(-(-needed // count))]
    ).astype(np.int32)[:needed]
    blocks = rows.reshape(ROTATION, steps_per_call, batch)
    return [meshes.put_rows(block, mesh, axis=1) for block in blocks]


def epoch_program(residency: str, *, batch: int, count: int, **fields) -> Program:
    """Training as `train` runs it, augmentation on, from a data set of `count` images.

    Args:
      residency: "device" or "host".
      **fields: config fields by dotted name.
    """
    config = make_config(
        **{"train.batch_size": batch, "data.residency": residency, **FULL, **fields}
    )
    images, labels = synthetic_images(count, config.data.resize)
    names = np.array([str(i) for i in range(count)])
    fit = Records(images, labels, np.zeros(count, np.int32), names, names)
    mesh = meshes.training_mesh()
    method, state = begin(config, mesh)
    rows = pipeline.row_stream(np.arange(count), batch, seed=0)
    streams = {name: Stream(fit, rows) for name in method.streams}
    advance, about = compile_step(method.step, state, streams, 0, config, mesh)

    def run(calls: int) -> float:
        nonlocal state
        for _ in range(calls):
            state, metrics, _ = advance(state)
        return float(np.asarray(metrics["loss"]).reshape(-1)[-1])

    return Program(run, batch * config.train.steps_per_call, about)


def in_turn(call: Callable[[int], object]) -> Callable[[int], None]:
    """`run(calls)` that calls with 0, 1, .. ROTATION - 1, 0, .. and waits once."""
    done = 0

    def run(calls: int) -> None:
        nonlocal done
        for _ in range(calls):
            out = call(done % ROTATION)
            done += 1
        jax.block_until_ready(out)

    return run


def ready(images: np.ndarray, size: int, model: str) -> np.ndarray:
    """Images as a network takes them, and the peer: normalised float32."""
    scale = build(make_config(**{"model.name": model, "data.image_size": size}))[2]
    return np.asarray(normalise(jnp.asarray(images), scale.mean, scale.std))


def peer_batches(batch: int, size: int, model: str) -> list:
    """The step programs' batches (images, labels), ready for the peer."""
    images, labels = synthetic_images(ROTATION * batch, size)
    rows = np.random.default_rng(1).permutation(len(images)).reshape(ROTATION, batch)
    images = ready(images, size, model)
    return [(images[r], labels[r]) for r in rows]


def inference_program(
    *, batch: int, size: int = 224, lowering: str = "auto", devices: int = 1, **fields
) -> Program:
    """The forward pass to logits that scoring and voting use, norms folded.

    `about` holds the logits of the first batch. Arguments as in `step_program`.
    """
    mesh = meshes.make_mesh(devices)
    config = make_config(**{"data.image_size": size, **fields})
    model, variables, _ = build(config, lowering)
    variables = meshes.put_replicated(variables, mesh)
    batches = peer_batches(batch, size, config.model.name)
    given = [meshes.put_rows(images, mesh) for images, _ in batches]
    compiled, about = compile_timed(
        lambda variables, x: model.apply(variables, x, "eval")[0], variables, given[0]
    )
    about["logits"] = np.asarray(compiled(variables, given[0])).tolist()
    run = in_turn(lambda number: compiled(variables, given[number]))
    return Program(run, batch, about, compiled.as_text())
