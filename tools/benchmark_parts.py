"""The benchmark's suites of parts: forward passes, operations, single convolutions.

Values are compared before anything is timed; a row whose values differ says so.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax import mesh as meshes
from cxai_jax.models import lowering
from tools import benchmark_programs as programs
from tools.benchmark_peer import NETWORKS, Peer, where
from tools.benchmark_session import Session, add_row, wrong_values
from tools.benchmark_timing import Contender

CONV_CALLS = 8  # A convolution takes milliseconds: fewer would not show the load.


class Convolution(NamedTuple):
    """A convolution of a network at 224 pixels, padded by half its window."""

    k: int  # side of the window
    pixels: int  # side of the input
    channels: int
    features: int
    stride: int = 1
    depthwise: bool = False

    @property
    def name(self) -> str:
        kind = "depthwise " if self.depthwise else ""
        side = f"{self.pixels}x{self.pixels}x{self.channels}"
        step = f"/{self.stride}" if self.stride > 1 else ""
        return f"{kind}{self.k}x{self.k}{step} {side} to {self.features}"


# Of ResNet-50 and Lite0.
CONVOLUTIONS = (
    Convolution(3, 56, 64, 64),
    Convolution(3, 28, 128, 128),
    Convolution(3, 14, 256, 256),
    Convolution(3, 7, 512, 512),
    Convolution(1, 56, 64, 256),
    Convolution(1, 14, 1024, 256),
    Convolution(7, 224, 3, 64, stride=2),
    Convolution(3, 112, 32, 32, depthwise=True),
    Convolution(5, 14, 480, 480, depthwise=True),
)


def measure_infer(session: Session, models: tuple[str, ...] = tuple(NETWORKS)) -> None:
    """Evaluation forward passes, logits only, of every network that the peer has."""
    for model in models:
        if session.time_left(f"infer {model}"):
            measure_forward(replace(session, model=model))


def measure_forward(session: Session) -> None:
    """The forward pass of the session's network against XLA's own and the peer's.

    On a CPU as scoring makes it, on devices of its cores (mesh.py); XLA's own on one.
    """
    shape = {"batch": min(session.batches), "size": session.size}
    on_cpu = jax.default_backend() == "cpu"
    devices = meshes.scoring_mesh(shape["batch"]).size if on_cpu else 1
    ours = programs.inference_program(**shape, devices=devices, **session.fields)
    naive = programs.inference_program(
        **shape, lowering="xla", **{**session.fields, "model.dtype": "float32"}
    )
    values = {"naive": naive.about["logits"]}
    contenders = [Contender(session.model, ours.run), Contender("naive", naive.run)]
    if devices > 1:
        alone = programs.inference_program(**shape, **session.fields)
        values["one device"] = alone.about["logits"]
        contenders.append(Contender("one device", alone.run))
    if session.peer:
        peer = inference_peer(session)
        values["torch"] = peer.about["logits"]
        contenders.append(Contender("torch", peer.run, peer.cpu))
    wrong = wrong_values(session.dtype, ours.about.pop("logits"), values)
    ours.about["wrong"] = wrong
    rounds = session.interleave(contenders, warmup=2)
    add_row(
        session,
        "infer",
        session.model,
        ours,
        rounds,
        works=("infer_folded",),
        compare={name: name for name in values},
    )["devices"] = devices
    if session.peer:
        peer.close()


def inference_peer(session: Session) -> Peer:
    from tools import peer_networks

    batch = min(session.batches)
    return Peer(
        peer_networks.make_inference,
        model=session.model,
        batches=programs.peer_batches(batch, session.size, session.model),
        variables=programs.initial_variables(session.model, session.size),
        device=where(),
        bf16=session.dtype == "bfloat16",
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


def measure_conv(
    session: Session, convolutions: tuple[Convolution, ...] = CONVOLUTIONS
) -> None:
    """Forward, input and weight gradient of single convolutions, then a table.

    At another size than 224 the maps shrink with the image; channels do not.
    """
    session = replace(session, calls=max(session.calls, CONV_CALLS))
    rows = []
    for convolution in convolutions:
        if not session.time_left(f"conv {convolution.name}"):
            break
        pixels = max(1, convolution.pixels * session.size // 224)
        rows += measure_convolution(session, convolution._replace(pixels=pixels))
    print_weakest(rows)


def measure_convolution(session: Session, convolution: Convolution) -> list[dict]:
    """A row for every pass: ours, XLA's own and the peer's."""
    arrays = conv_arrays(convolution, min(session.batches))
    window = {"stride": convolution.stride, "padding": convolution.k // 2}
    given = [jnp.asarray(a, session.dtype) for a in arrays]
    peer, rows = None, []
    if session.peer:
        peer = conv_peer(session, arrays, window)
    for name in PASSES:
        made = {
            label: conv_program(name, given, {**window, "lowering": variant})
            for label, variant in (("ours", "auto"), ("naive", "xla"))
        }
        values = {n: program.about.pop("value") for n, program in made.items()}
        contenders = [Contender(n, program.run) for n, program in made.items()]
        if peer:
            values["torch"] = peer.about[name]
            run = functools.partial(run_pass, peer, name)
            contenders.append(Contender("torch", run, peer.cpu))
        made["ours"].about["wrong"] = wrong_values(
            session.dtype, values.pop("ours"), values
        )
        rounds = session.interleave(contenders, warmup=2)
        variant = f"{convolution.name}, {name}"
        rounds = [{variant: r.pop("ours"), **r} for r in rounds]
        compare = {other: other for other in values}
        rows.append(
            add_row(session, "conv", variant, made["ours"], rounds, compare=compare)
        )
    if peer:
        peer.close()
    return rows


def conv_arrays(convolution: Convolution, batch: int) -> list[np.ndarray]:
    """Random input, kernel and gradient of the output, float32."""
    k, pixels, channels, features, stride, depthwise = convolution
    out = -(-pixels // stride)
    shapes = (
        (batch, pixels, pixels, channels),
        (k, k, 1 if depthwise else channels, features),
        (batch, out, out, features),
    )
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


PASSES: dict[str, Callable] = {
    "forward": lambda conv, x, kernel, dy: conv(x, kernel),
    "input gradient": lambda conv, x, kernel, dy: jax.vjp(lambda x: conv(x, kernel), x)[
        1
    ](dy)[0],
    "weight gradient": lambda conv, x, kernel, dy: jax.vjp(
        lambda kernel: conv(x, kernel), kernel
    )[1](dy)[0],
}


def conv_program(name: str, given: list, window: dict) -> programs.Program:
    """One of PASSES, compiled; `about["value"]` is what it computes, in float32."""
    conv = functools.partial(lowering.conv, **window)
    compiled, about = programs.compile_timed(
        functools.partial(PASSES[name], conv), *given
    )
    about["value"] = np.asarray(compiled(*given).astype(jnp.float32))
    run = programs.in_turn(lambda _: compiled(*given))
    return programs.Program(run, len(given[0]), about)


def conv_peer(session: Session, arrays: list[np.ndarray], window: dict) -> Peer:
    from tools import peer_convolutions

    names = ("x", "kernel", "dy")
    return Peer(
        peer_convolutions.make_convolution,
        **dict(zip(names, arrays, strict=True)),
        **window,
        device=where(),
        bf16=session.dtype == "bfloat16",
    )


def run_pass(peer: Peer, name: str, calls: int) -> None:
    """`calls` of one pass over there."""
    peer.run((name, calls))


def print_weakest(rows: list[dict]) -> None:
    """The table of `conv`: milliseconds and ratios, the weakest of ours first.

    Weak is what others do in less time: the peer, or XLA where there is no peer.
    """

    def weakness(row: dict) -> float:
        ratios = row["ratios"]
        return ratios.get("torch", ratios["naive"])["median"]

    others = list(rows[0]["ratios"]) if rows else []
    titles = [f"{name:>9} ms" for name in ("ours", *others)]
    titles += [f"{name:>8} x" for name in others]
    print(f"{'convolution':48}" + "".join(titles) + "  weakest", flush=True)
    for place, row in enumerate(sorted(rows, key=weakness), 1):
        times = [row["ms"]["p50"], *(row["ratios"][n]["ms"] for n in others)]
        cells = [f"{t:12.2f}" for t in times]
        cells += [f"{row['ratios'][n]['median']:10.2f}" for n in others]
        print(f"{row['variant']:48}" + "".join(cells) + f"{place:9}", flush=True)
