"""One compiled program per run: the step, for where the images live."""

import time

import jax
from jax.sharding import Mesh

from cxai_jax import mesh as meshes
from cxai_jax import setup, steps
from cxai_jax.data import pipeline
from cxai_jax.mixing import group_count


def compile_run(run: setup.Run, plan: setup.Plan, state: steps.TrainState, step: int):
    """`compile_step` of a run's own step, to go on from `step`."""
    mix, batch = run.config.mix, run.config.train.batch_size
    mixed_at_once = batch // run.config.train.accumulate
    paired = mix.name not in ("none", "cutout")
    train_step = steps.make_train_step(
        run.network.model,
        plan.optimizer,
        run.config,
        scale=run.network.scale,
        total_steps=plan.total_steps,
        groups=group_count(mix.groups, mixed_at_once, run.mesh.size) if paired else 1,
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
