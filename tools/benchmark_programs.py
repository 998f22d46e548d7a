"""What the benchmark times: the library's own steps, compiled as in training.

Synthetic uint8 images, random weights, fixed seeds. A `Program` holds what compilation
told about itself and a `run(calls)` that waits once, at the end.
"""

import functools
import itertools
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
from cxai_jax.types import Array, Batch
from cxai_jax.voting import early_exit, rules
from cxai_jax.voting.forward import (
    make_first_look,
    make_next_votes,
    make_predict_step,
    make_vote_forward,
    prefix_crops,
)

CLASSES = 2
ROTATION = 4  # Batches that take turns, so that no call repeats the one before.
TOTAL_STEPS = 1000  # Only schedules read it.
LOOP, REUSE = "loop", "_reuse"
OPPOSING = {"early_unanimous": 0.0, "early_5_percent": 0.05, "early_undecided": 0.5}

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
    mesh = meshes.make_mesh()
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


def tta_programs(
    kinds: tuple[str, ...], *, images: int, size: int = 224, **fields
) -> dict[str, Program]:
    """Test-time voting, k = 31 unless given, as one Program per kind.

    Args:
      kinds: "all" runs every mask in one graph; a key of OPPOSING stops when the label
        is certain, at a threshold that makes that share of the votes oppose. Either
        with "_reuse" at its end runs the first layers on crops. "loop" calls the same
        compiled forward pass once per mask.
      images: images voted on per call.
      size: pixels, side of the input.
      **fields: config fields by dotted name.

    Raises:
      ValueError: for an unknown kind, or reuse where it is impossible.
      RuntimeError: if stopping early or reuse gives another label than all votes do.
    """
    if unknown := {k.removesuffix(REUSE) for k in kinds} - {"all", LOOP, *OPPOSING}:
        known = ", ".join(("all", LOOP, *OPPOSING))
        raise ValueError(f"unknown kinds {unknown}; known: {known}")
    defaults = {"tta.k": 31, "tta.patch": max(1, size // 28)}  # 8 pixels of 224.
    plain = Voting(size, {"data.image_size": size, **defaults, **fields}, "off")
    reuse = None
    if any(kind.endswith(REUSE) for kind in kinds):
        reuse = Voting(size, {"data.image_size": size, **defaults, **fields}, "on")
    given = [
        jnp.asarray(synthetic_images(images, size, seed)[0]) for seed in range(ROTATION)
    ]
    compiled, about = plain.compile(given[0])
    probs = [np.asarray(compiled(batch)["probs"]) for batch in given]
    thetas = {
        kind: threshold(np.concatenate(probs), share)
        for kind, share in OPPOSING.items()
    }

    def check(kind: str, number: int, labels: Array, theta: float) -> None:
        expected = rules.vote(probs[number], theta=theta, k=plain.config.k)
        if (np.asarray(labels) != np.asarray(expected)).any():
            raise RuntimeError(f"{kind}: a label differs from that of all votes")

    def check_probs(kind: str, found: list[np.ndarray]) -> None:
        for number, theta in itertools.product(range(ROTATION), thetas.values()):
            labels = rules.vote(found[number], theta=theta, k=plain.config.k)
            check(kind, number, labels, theta)

    result = {}
    for kind in kinds:
        chosen = reuse if kind.endswith(REUSE) else plain
        if kind == LOOP:
            check_probs(kind, [np.asarray(plain.one_by_one(b)) for b in given])
            run = in_turn(lambda number: plain.one_by_one(given[number]))
            result[kind] = Program(run, images)
            continue
        if kind.removesuffix(REUSE) == "all":
            call, found = compiled, probs
            if chosen is reuse:
                call, about = reuse.compile(given[0])
                found = [np.asarray(call(batch)["probs"]) for batch in given]
            pairs = list(zip(found, probs, strict=True))
            difference = max(float(np.abs(a - b).max()) for a, b in pairs)
            check_probs(kind, found)
            run = in_turn(lambda number, call=call: call(given[number]))
            told = about | {"largest_difference": difference}
            told["probs"] = found[0][0, 0].tolist()
            result[kind] = Program(run, images, told, chosen.hlo)
            continue
        theta, forwards = thetas[kind.removesuffix(REUSE)], []
        for number, batch in enumerate(given):
            votes = chosen.early(batch, theta=theta)
            check(kind, number, votes.labels, theta)
            forwards.append(1 + votes.forwards / images)
        early = functools.partial(chosen.early, theta=theta)
        run = in_turn(lambda number, early=early: early(given[number]))
        told = {"forwards_per_image": float(np.mean(forwards))}
        result[kind] = Program(run, images, told)
    return result


class Voting:
    """Both ways to vote, with the first layers of the network reused or not."""

    def __init__(self, size: int, fields: dict, reuse: str):
        config = make_config(**{**fields, "tta.prefix_reuse": reuse})
        self.config, self.size, self.hlo = config.tta, size, ""
        model, variables, scale = build(config)
        self.variables = jax.device_put(variables)
        self.predict = make_predict_step(model, scale, config.tta)
        self.look = jax.jit(make_first_look(model, scale, config.tta))
        if crops := prefix_crops(model, size, config.tta):
            votes = make_next_votes(model, crops)
            votes = jax.jit(votes, donate_argnums=3)
            self.forward = functools.partial(votes, self.variables, None)
        else:
            forward = jax.jit(make_vote_forward(model))
            self.forward = lambda images, rows: forward(self.variables, images)

    def compile(self, images) -> tuple:
        """Every vote in one graph: (images -> outputs, about)."""
        compiled, about = compile_timed(self.predict, self.variables, images)
        self.hlo = compiled.as_text()
        return functools.partial(compiled, self.variables), about

    def one_by_one(self, images) -> Array:
        """Probabilities of all variants, each from a call with one image."""
        seen = self.look(self.variables, images)

        def probs(row: int, masked: int) -> Array:
            chosen = np.array([row]), np.array([masked])
            variant = early_exit.masked_rows(seen["masks"], *chosen)
            return self.forward(variant, np.array([row]))[0]

        votes = [
            jnp.stack([probs(row, 1 + turn) for turn in range(self.config.k)])
            for row in range(len(images))
        ]
        return jnp.concatenate([seen["probs"][:, None], jnp.stack(votes)], 1)

    def early(self, images, *, theta: float) -> early_exit.EarlyVotes:
        """Votes until the labels are certain."""
        seen = self.look(self.variables, images)
        return early_exit.vote_early(
            self.forward,
            seen["masks"],
            seen["probs"],
            theta=theta,
            chunk=self.config.chunk,
            carried=seen.get("prefix"),
        )


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


def threshold(probs: np.ndarray, share: float) -> float:
    """A theta at which about that share of the votes [B, k+1, 2] oppose."""
    original = probs[:, 0].argmax(-1)
    own = np.take_along_axis(probs[:, 1:], original[:, None, None], axis=2)
    # Between two votes, so that rounding decides none.
    values = np.sort(own.ravel())
    place = round(share * len(values))
    return float(values[place - 1 : place + 1].mean()) if place else 0.0


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


def voting_images(count: int, size: int, model: str) -> np.ndarray:
    """The images of all calls of `tta_programs`, ready for the peer."""
    given = [synthetic_images(count, size, seed)[0] for seed in range(ROTATION)]
    return ready(np.concatenate(given), size, model)


def inference_program(
    *, batch: int, size: int = 224, lowering: str = "auto", **fields
) -> Program:
    """The forward pass to logits that scoring and voting use, norms folded.

    `about` holds the logits of the first batch. Arguments as in `step_program`.
    """
    config = make_config(**{"data.image_size": size, **fields})
    model, variables, _ = build(config, lowering)
    variables = jax.device_put(variables)
    batches = peer_batches(batch, size, config.model.name)
    given = [jnp.asarray(images) for images, _ in batches]
    compiled, about = compile_timed(
        lambda variables, x: model.apply(variables, x, "eval")[0], variables, given[0]
    )
    about["logits"] = np.asarray(compiled(variables, given[0])).tolist()
    run = in_turn(lambda number: compiled(variables, given[number]))
    return Program(run, batch, about, compiled.as_text())
