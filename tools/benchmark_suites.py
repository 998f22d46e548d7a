"""What the benchmark measures, suite by suite.

A fast wrong step cannot pass: from the same weights the loss and the gradient's norm of
the first step must agree with those of its reference, the float32 step in XLA's own
lowering, and of the peer, which mixes the same images and boxes; else its row says so,
and the command and any comparison with the row fail. Later losses would tell nothing:
an untrained ResNet-50 amplifies a change of its weights by 1e-7 to a tenth of the third
loss.
"""

import gc
import math
from typing import NamedTuple

import jax

from tools import benchmark_programs as programs
from tools import benchmark_voting as voting
from tools.benchmark_parts import measure_conv, measure_infer, measure_ops
from tools.benchmark_peer import Peer, where
from tools.benchmark_session import Session, add_row, wrong_values
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
    voting.LOOP,
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


def wrong_step(dtype: str, found: tuple, expected: dict[str, tuple]) -> str:
    """What disagrees with (loss, gradient norm) of a first step; "" if nothing."""
    return "; ".join(
        "loss {:.6g}, gradient {:.6g}".format(*found)
        + f", but {name} "
        + "{:.6g}, {:.6g}".format(*other)
        for name, other in expected.items()
        if not agrees(dtype, found, other)
    )


def first_of(peer: Peer) -> tuple[float, float]:
    """Loss and gradient norm of the peer's first step."""
    return peer.about["loss"], peer.about["gradient_norm"]


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
                "wrong": wrong_step(
                    session.dtype,
                    found[case.name],
                    {"reference": reference}
                    | {n: first_of(peers[n]) for n in compare[case.name] if n in peers},
                ),
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

    device = where()
    batches = programs.peer_batches(batch, session.size, session.model)
    peers = {}
    # No two cases of a suite share a peer. The published step mixes differently, so
    # its network is checked by the loss of the fair one.
    kinds = {kind: case.peers[-1] for case in STEPS[suite] for kind in case.peers}
    for kind, check in kinds.items():
        for compiled in (False, True):
            if compiled and (device == "cpu" or kind == "published"):
                continue
            name = f"{kind}, compiled" if compiled else kind
            peers[name] = peer = Peer(
                peer_torch.make_step,
                kind=kind,
                batches=batches,
                model=session.model,
                check=check,
                draw=programs.first_draw(batch, session.size),
                device=device,
                bf16=session.dtype == "bfloat16" and kind != "published",
                compiled=compiled,
                variables=programs.initial_variables(session.model, session.size),
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
        kinds = tuple(kind for kind in kinds if not kind.endswith(voting.REUSE))
    if session.voting_images > 1:  # A thousand calls per call: minutes on a GPU.
        kinds = tuple(kind for kind in kinds if kind != voting.LOOP)
    made = voting.tta_programs(
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
    made["all"].about["wrong"] = wrong_values(
        session.dtype,
        made["all"].about["probs"],
        {n: peer.about["probs"] for n, peer in peers.items()},
    )
    rounds = session.interleave(contenders, warmup=1)
    for kind, program in made.items():
        add_row(
            session,
            "tta",
            kind,
            program,
            rounds,
            # With reuse most of a forward pass is not run: no floor of ours fits.
            works=() if kind.endswith(voting.REUSE) else ("infer_folded",),
            forwards=program.about.get("forwards_per_image", 32.0),
            compare={n: n for n in ("all", voting.LOOP) if n in made and n != kind}
            | {n: n for n in peers},
        )
    for peer in peers.values():
        peer.close()


def voting_peers(session: Session) -> dict[str, Peer]:
    from tools import peer_voting

    images = voting.voting_images(session.voting_images, session.size, session.model)
    return {
        kind: Peer(
            peer_voting.make_voting,
            kind=kind,
            images=images,
            model=session.model,
            device=where(),
            bf16=session.dtype == "bfloat16" and kind == "batched",
            variables=programs.initial_variables(session.model, session.size),
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
    "infer": measure_infer,
    "op": measure_ops,
    "conv": measure_conv,
    "scale": measure_scale,
    "roof": lambda session: None,  # Measured before every run.
}
