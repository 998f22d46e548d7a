"""The programs of test-time voting that the benchmark times, by how votes are cast."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax.types import Array
from cxai_jax.voting import early_exit, rules
from cxai_jax.voting.forward import (
    make_first_look,
    make_next_votes,
    make_predict_step,
    make_vote_forward,
    prefix_crops,
)
from tools.benchmark_programs import (
    ROTATION,
    Program,
    build,
    compile_timed,
    in_turn,
    make_config,
    ready,
    synthetic_images,
)

LOOP, REUSE = "loop", "_reuse"
OPPOSING = {"early_unanimous": 0.0, "early_5_percent": 0.05, "early_undecided": 0.5}


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


def threshold(probs: np.ndarray, share: float) -> float:
    """A theta at which about that share of the votes [B, k+1, 2] oppose."""
    original = probs[:, 0].argmax(-1)
    own = np.take_along_axis(probs[:, 1:], original[:, None, None], axis=2)
    # Between two votes, so that rounding decides none.
    values = np.sort(own.ravel())
    place = round(share * len(values))
    return float(values[place - 1 : place + 1].mean()) if place else 0.0


def voting_images(count: int, size: int, model: str) -> np.ndarray:
    """The images of all calls of `tta_programs`, ready for the peer."""
    given = [synthetic_images(count, size, seed)[0] for seed in range(ROTATION)]
    return ready(np.concatenate(given), size, model)
