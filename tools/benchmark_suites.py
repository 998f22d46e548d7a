"""What the benchmark measures, suite by suite.

A fast wrong step cannot pass: from the same weights the loss and the gradient's norm of
the first step must agree with those of its reference, the float32 step in XLA's own
lowering; else its row says so, and the command and any comparison with the row fail.
Later losses would tell nothing: an untrained ResNet-50 amplifies a change of its
weights by 1e-7 to a tenth of the third loss.
"""

import functools
import gc
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cxai_jax.models import lowering
from tools import benchmark_programs as programs
from tools.benchmark_peer import Peer
from tools.benchmark_session import Session, add_row
from tools.benchmark_timing import Contender

WARMUP = 3  # Steps before the first round; the first of them is checked.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.08}  # Relative, of loss and norm.


class Case(NamedTuple):
    """A train step to be timed.

    Args:
      works: passes of `roofline.kernels` that it is made of.
      peers: kinds of `peer_torch.make_step` to compare with.
    """

    name: str
    fields: dict
    works: tuple[str, ...]
    peers: tuple[str, ...] = ()


STEPS = {
    "step_plain": (Case("plain", programs.PLAIN, ("train",), ("plain",)),),
    "step_cam": (
        Case(
            "snapmix, eval maps",
            {**programs.SNAPMIX, **programs.EVAL_MAPS},
            ("train", "infer_folded"),
        ),
        Case("snapmix, train maps", programs.SNAPMIX, ("train", "forward")),
    ),
    "step_full": (
        Case(
            "full, eval maps",
            {**programs.FULL, **programs.EVAL_MAPS},
            ("train", "infer_folded"),
            ("published", "fair_eval"),
        ),
    ),
    "step_train_maps": (
        Case(
            "full, train maps",
            programs.FULL,
            ("train", "forward"),
            ("published", "fair_train"),
        ),
    ),
    "step_align": (
        Case(
            "full + alignment",
            {**programs.ALIGN, **programs.EVAL_MAPS},
            ("train", "infer_folded"),
        ),
    ),
}
STEPS["smoke"] = STEPS["step_full"]
VOTING = (
    "all",
    programs.LOOP,
    "early_unanimous",
    "early_5_percent",
    "early_undecided",
    "all_reuse",
    "early_unanimous_reuse",
)


def agrees(dtype: str, found: tuple, reference: tuple) -> bool:
    """Whether (loss, gradient norm) are finite and the reference's, up to rounding."""
    return all(
        math.isfinite(a) and abs(a - b) <= TOLERANCE[dtype] * max(abs(b), 0.1)
        for a, b in zip(found, reference, strict=True)
    )


def first_step(program: programs.Program) -> tuple[float, float]:
    """Loss and gradient norm of the first step; makes the other warm-up steps too."""
    found = program.run(1), program.about["gradient_norm"]
    program.run(WARMUP - 1)
    return found


def measure_steps(session: Session, suite: str) -> None:
    """The train steps of a suite with their references and peers, interleaved."""
    for batch in session.batches:
        if not session.time_left(f"{suite} bs {batch}"):
            return
        made, found, references, compare, contenders = {}, {}, {}, {}, []
        shape = {"batch": batch, "size": session.size}
        # One reference per case, at the smallest batch: compiling it is the cost.
        with_reference = batch == min(session.batches)
        for case in STEPS[suite]:
            fields = {**session.fields, **case.fields}
            made[case.name] = programs.step_program(**shape, **fields)
            found[case.name] = first_step(made[case.name])
            contenders.append(Contender(case.name, made[case.name].run))
            compare[case.name] = {}
            if with_reference:
                naive = f"{case.name}, xla"
                fields["model.dtype"] = "float32"
                program = programs.step_program(**shape, lowering="xla", **fields)
                references[case.name] = first_step(program)
                contenders.append(Contender(naive, program.run))
                compare[case.name]["naive"] = naive
        peers = step_peers(session, suite, batch)
        contenders += [
            Contender(f"torch {name}", peer.run, peer.cpu)
            for name, peer in peers.items()
        ]
        for case in STEPS[suite]:
            compare[case.name] |= {
                name: f"torch {name}"
                for name in peers
                if name.split(", ")[0] in case.peers
            }
        rounds = session.interleave(contenders, warmup=0)
        for case in STEPS[suite]:
            loss, norm = found[case.name]
            reference = references.get(case.name, found[case.name])
            made[case.name].about |= {
                "loss": loss,
                "gradient_norm": norm,
                "reference": reference,
                "wrong": not agrees(session.dtype, found[case.name], reference),
            }
            add_row(
                session,
                suite,
                case.name,
                made[case.name],
                rounds,
                works=case.works,
                trains=True,
                compare=compare[case.name],
            )
        contenders.clear()
        for peer in peers.values():
            peer.close()
        gc.collect()


def step_peers(session: Session, suite: str, batch: int) -> dict[str, Peer]:
    """PyTorch's side: as published and fair; on a GPU the fair ones compiled too."""
    if not session.peer:
        return {}
    from tools import peer_torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    batches = programs.peer_batches(batch, session.size)
    variables = programs.initial_variables("resnet50", session.size)
    peers = {}
    for kind in dict.fromkeys(kind for case in STEPS[suite] for kind in case.peers):
        for compiled in (False, True):
            if compiled and (device == "cpu" or kind == "published"):
                continue
            name = f"{kind}, compiled" if compiled else kind
            peers[name] = peer = Peer(
                peer_torch.make_step,
                kind=kind,
                batches=batches,
                device=device,
                bf16=session.dtype == "bfloat16" and kind != "published",
                compiled=compiled,
                variables=variables,
                rate=0.001,
            )
            if not math.isfinite(peer.run(WARMUP)):
                raise RuntimeError(f"the peer's loss is not finite: {name}")
    return peers


def measure_tta(session: Session, kinds: tuple[str, ...] = VOTING) -> None:
    """Test-time voting: every mask in one graph, stopping early, reusing layers."""
    if not session.time_left("tta"):
        return
    if not session.model.startswith("resnet"):  # Others declare no prefix.
        kinds = tuple(kind for kind in kinds if not kind.endswith(programs.REUSE))
    if session.voting_images > 1:  # A thousand calls per call: minutes on a GPU.
        kinds = tuple(kind for kind in kinds if kind != programs.LOOP)
    made = programs.tta_programs(
        kinds, images=session.voting_images, size=session.size, **session.fields
    )
    contenders = [Contender(kind, program.run) for kind, program in made.items()]
    peers = {}
    if session.peer:
        peers = voting_peers(session)
        # One call of ours votes on all images.
        each = session.voting_images
        contenders += [
            Contender(n, lambda calls, run=peer.run: run(calls * each), peer.cpu)
            for n, peer in peers.items()
        ]
    rounds = session.interleave(contenders, warmup=1)
    for kind, program in made.items():
        add_row(
            session,
            "tta",
            kind,
            program,
            rounds,
            # With reuse most of a forward pass is not run: no floor of ours fits.
            works=() if kind.endswith(programs.REUSE) else ("infer_folded",),
            forwards=program.about.get("forwards_per_image", 32.0),
            compare={n: n for n in ("all", programs.LOOP) if n in made and n != kind}
            | {n: n for n in peers},
        )
    for peer in peers.values():
        peer.close()


def voting_peers(session: Session) -> dict[str, Peer]:
    from tools import peer_torch

    images = programs.peer_batches(session.voting_images, session.size)[0][0]
    return {
        kind: Peer(
            peer_torch.make_voting,
            kind=kind,
            images=images,
            device="cuda" if jax.default_backend() == "gpu" else "cpu",
            bf16=session.dtype == "bfloat16" and kind == "batched",
            variables=programs.initial_variables("resnet50", session.size),
        )
        for kind in ("published", "batched")
    }


def measure_epoch(session: Session) -> None:
    """Steps of the whole method as `train` runs them, images on device or host."""
    batch = min(session.batches)
    made = {}
    for residency in ("device", "host"):
        if not session.time_left(f"epoch, {residency}"):
            break
        made[residency] = programs.epoch_program(
            residency,
            batch=batch,
            count=session.epoch_images,
            **session.fields,
            **programs.EVAL_MAPS,
            **{"data.image_size": session.size, "data.resize": session.size * 8 // 7},
        )
    contenders = [Contender(name, program.run) for name, program in made.items()]
    rounds = session.interleave(contenders, warmup=1)
    for name, program in made.items():
        add_row(
            session,
            "epoch",
            name,
            program,
            rounds,
            works=("train", "infer_folded"),
            trains=True,
            compare={} if name == "device" else {"device": "device"},
        )


def measure_ops(session: Session) -> None:
    """Forward and gradient of each rewritten operation against XLA's own.

    These rows decide `models.lowering.AUTO` for a backend.
    """
    key, dtype = jax.random.key(0), jnp.dtype(session.dtype)
    batch = min(session.batches)

    def array(*shape):
        return jax.random.normal(key, shape).astype(dtype)

    side = session.size // 4
    vector = jnp.ones(4 * side)
    operations = {
        "conv1x1, wide map": (lowering.conv, array(1, 1, 64, 256), (side, 64)),
        "conv1x1, deep map": (
            lowering.conv,
            array(1, 1, 1024, 256),
            (side // 4, 1024),
        ),
        "conv3x3, small map": (lowering.conv, array(3, 3, 512, 512), (2, 512)),
        "stem": (
            functools.partial(lowering.conv, stride=2, padding=3),
            array(7, 7, 3, 64),
            (session.size, 3),
        ),
        "depthwise 3x3": (lowering.conv, array(3, 3, 1, 4 * side), (side, 4 * side)),
        "max_pool": (lambda x, _, **kw: lowering.max_pool(x, **kw), None, (side, 64)),
        "batch_norm": (
            lambda x, scale, **kw: lowering.batch_norm(x, scale, scale, eps=1e-5, **kw)[
                0
            ],
            vector,
            (side, 4 * side),
        ),
    }
    for name, (operation, weights, (pixels, channels)) in operations.items():
        if not session.time_left(f"op {name}"):
            return
        x = array(batch, pixels, pixels, channels)
        made = {}
        for variant in ("tuned", "xla"):
            made[f"{name}, {variant}"] = op_program(operation, x, weights, variant)
        rounds = session.interleave(
            [Contender(n, program.run) for n, program in made.items()], warmup=2
        )
        tuned, naive = made
        compare = {"naive": naive}
        add_row(session, "op", tuned, made[tuned], rounds, compare=compare)


def op_program(operation, x, weights, variant: str) -> programs.Program:
    """Value and gradients of sum(op(x, weights)^2); a sum alone is linear, and XLA
    would not run the forward pass."""

    def loss(x, weights):
        y = operation(x, weights, lowering=variant)
        return jnp.square(y.astype(jnp.float32)).mean()

    argnums = (0,) if weights is None else (0, 1)
    compiled, about = programs.compile_timed(
        jax.value_and_grad(loss, argnums), x, weights
    )

    def run(calls: int) -> None:
        for _ in range(calls):
            out = compiled(x, weights)
        jax.block_until_ready(out)

    return programs.Program(run, len(x), about)


def measure_scale(session: Session) -> None:
    """Weak scaling over devices; on virtual CPU devices for correctness only."""
    for devices in (1, 2, 4, 8):
        if devices > jax.device_count() or not session.time_left(f"scale {devices}"):
            return
        program = programs.step_program(
            batch=devices * min(session.batches),
            size=session.size,
            devices=devices,
            **session.fields,
            **programs.FULL,
        )
        name = f"{devices} devices"
        rounds = session.interleave([Contender(name, program.run)], warmup=1)
        row = add_row(session, "scale", name, program, rounds)
        row["devices"] = devices


def measure_smoke(session: Session) -> None:
    """One step and one vote of each kind, on the tiny network."""
    measure_steps(session, "smoke")
    measure_tta(session, ("all", "early_undecided"))


SUITES = {
    **{name: lambda s, name=name: measure_steps(s, name) for name in STEPS},
    "smoke": measure_smoke,
    "tta": measure_tta,
    "epoch": measure_epoch,
    "op": measure_ops,
    "scale": measure_scale,
    "roof": lambda session: None,  # Measured before every run.
}
