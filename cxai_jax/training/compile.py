"""One compiled program per run: the step, for where the images live."""

import time

import jax
from jax.sharding import Mesh

from cxai_jax import mesh as meshes
from cxai_jax import progress
from cxai_jax.data import pipeline
from cxai_jax.methods.method import in_one_call
from cxai_jax.training.finite import skip_not_finite
from cxai_jax.training.run import Plan, Run
from cxai_jax.types import Batch


def compile_run(run: Run, plan: Plan, state, step: int):
    """`compile_step` of a run's own step, to go on from `step`."""
    step_once = plan.method.step
    if run.config.train.on_nan == "skip":
        step_once = skip_not_finite(step_once)
    return compile_step(step_once, state, plan.streams, step, run.config, run.mesh)


def compile_step(train_step, state, streams, step: int, config, mesh: Mesh):
    """Compiles the step for where the images of each stream live.

    Args:
      train_step: of a `Method`.
      state: of the same.
      streams: {name: Stream}, those that the step takes.
      step: the first one to be run.
      config: the run's config.
      mesh: the devices.

    Returns:
      (advance, about): `advance(state) -> (state, metrics, seconds waited for data)`
      runs `steps_per_call` steps; `about` holds compile seconds, FLOPs and bytes.

    Raises:
      ValueError: if the step needs more memory than the device has.
    """
    key = meshes.put_replicated(jax.random.key_data(jax.random.key(config.seed)), mesh)
    splits, inputs = feed(streams, step, config, mesh)
    steps = in_one_call(train_step)

    def call(state, splits, rows, fed, key):
        return steps(state, splits, rows, fed, jax.random.wrap_key_data(key))

    first = next(inputs)
    # Donated: the new state takes the old one's memory. The output shardings are
    # fixed, so that the second call receives what the first was compiled for.
    jitted = jax.jit(call, donate_argnums=0, out_shardings=meshes.replicated(mesh))
    begun = time.monotonic()
    with progress.stage("compiling"):
        lowered = jitted.lower(state, splits, *first, key)
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
        "residency": "device" if len(splits) == len(streams) else "host",
    }
    queue = [first]

    def advance(state):
        begun = time.monotonic()
        rows, fed = queue.pop() if queue else next(inputs)
        waited = time.monotonic() - begun
        return *compiled(state, splits, rows, fed, key), waited

    return advance, about


def feed(streams, step: int, config, mesh: Mesh):
    """Puts each stream where it fits.

    Returns:
      (splits, inputs): the splits that lie on the devices, {name: Batch [N, ...]}, and
      an iterator over calls: ({name: row numbers [S, B]} of these, {name: Batch} of
      the streams that the host feeds).

    Raises:
      ValueError: if several steps a call are wanted of a stream that the host feeds.
    """
    transform = pipeline.fit_for_training(config)
    per_call, size = config.train.steps_per_call, config.train.batch_size
    budget = pipeline.device_budget(config.data.residency)
    splits, rows, fed = {}, {}, {}
    for name, stream in streams.items():
        masks = stream.labelled and config.align.mask_weight > 0
        records = stream.records
        canvas, split = pipeline.decode_all(records, transform, budget, masks)
        if split is None and per_call != 1:
            raise ValueError(
                f"config.train.steps_per_call={per_call} needs "
                "config.data.residency=device; set it to 1"
            )
        if split is None:
            batches = pipeline.host_batches(
                records, stream.rows, step, transform, canvas, masks, mesh
            )
            fed[name] = batches if stream.labelled else map(unlabelled, batches)
        else:
            budget -= split.images.nbytes
            split = split if stream.labelled else unlabelled(split)
            splits[name] = meshes.put_replicated(split, mesh)
            rows[name] = pipeline.row_blocks(stream.rows, step, per_call, size, mesh)

    def calls():
        while True:
            yield tuple({n: next(of[n]) for n in of} for of in (rows, fed))

    return splits, calls()


def unlabelled(batch: Batch) -> Batch:
    """The batch without its labels, so that no step can read them."""
    return batch._replace(labels=None)


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
