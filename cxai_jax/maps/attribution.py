"""Attribution of a class to pixels by guided factorization (Gur, Ali, Wolf 2021).

"Visualization of Supervised and Self-Supervised Neural Networks via Attribution Guided
Factorization" (AAAI 2021), what Figures 5 and 6 of the CT paper show. Two streams walk
from the class back to the image, layer by layer: the gradient, and an attribution that
each convolution shares out among its inputs and then moves, without changing its sum,
to where features and gradient tell what speaks for the class from the rest.

The layers are read off the traced forward pass, so every network is explained whose
operations have a rule below; one without is named by the error. Where the paper leaves
a choice the rules are those of the published code.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.lax import Precision

from cxai_jax.maps.saliency import explained
from cxai_jax.types import Array

TINY = 1e-9  # Added to a divisor, as published.
STEEPNESS = 10.0  # Of the sigmoid that stands in for a step.

# Operations by rule. An attribution stays as it is behind a norm or an activation,
# travels as the values do, or is shared out in proportion to the values.
AFFINE = frozenset("add add_any sub mul div neg convert_element_type copy".split())
ACTIVATIONS = frozenset("max min clamp logistic tanh exp log select_n".split())
MOVES = frozenset(
    "reshape squeeze transpose broadcast_in_dim pad slice concatenate split".split()
)
SHARES = frozenset("reduce_sum reduce_max reduce_window_sum reduce_window_max".split())
SUMS = frozenset("add add_any sub".split())  # Where both sides depend on the image.
PRODUCTS = ("conv_general_dilated", "dot_general")


class Ref(NamedTuple):
    """A value that depends on the image: its place on the tape."""

    place: int


class Step(NamedTuple):
    """An operation of the forward pass as a function of what depends on the image."""

    name: str
    apply: Callable[..., list[Array]]
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref | None, ...]
    # Of a convolution or matrix product: (input, weights) -> output, and the weights.
    linear: Callable[[Array, Array], Array] | None
    weights: Array | None


class Tape(NamedTuple):
    """The forward pass: its operations, and the values that depend on the image."""

    steps: list[Step]
    values: list[Array]


class Flow(NamedTuple):
    """What arrives at a value on the way back."""

    gradient: Array
    attribution: Array | None  # None above the layer that makes the logits.
    summed: bool  # Whether the value enters a sum of two branches.


def guided_factorization(
    logits: Callable[[Array], Array],
    images: Array,
    labels: Array,
    *,
    target: str = "centred",
) -> Array:
    """AGF: a signed map of the class, whose sum is what its logit's layer attributes.

    Start, with t the explained logit, y all of them and x the pooled features:

        p = softmax_k(t exp(-(y_k - y_c)^2 / (2 max_k (y_k - y_c)^2)))_c,  C = x dp/dx

    A convolution shares C out by size, C' = |x| |w|^T(C / (|w| |x|)), and adds a
    residual R from which its mean is taken off where C' is not 0:

        R = (F_x + M) / (1 + exp(-C')) + F_dx + A

    M is the positive mean over channels of x dp/dx, over its maximum; F_x and F_dx
    factorise features and gradient (`_factors`); A is C shared out without the
    features. Where the image enters, the z^B rule of Montavon et al. (2017) stands
    instead, between the image's least and largest value.

    From the published code: a convolution whose window is one pixel, or whose output
    enters the sum of a residual block, shares C out and adds nothing.

    Deviations: the centred logit is t by default, as in `saliency` ("logit" is the
    published one); equal logits, there 0/0, count as 1 apart; the map is not divided by
    its maximum. Beyond the paper, which has VGG and ResNet: activations other than ReLU
    pass an attribution on as norms do, and a concatenation gives each part its own.

    Args:
      logits: images -> logits [B, K], in `eval` mode, of a network with
        `lowering="xla"`.
      images: normalised images [B, H, W, C], float.
      labels: class c to explain, int [B].
      target: "centred" or "logit"; see `saliency.explained`.

    Returns:
      Map [B, H, W], summed over channels.

    Raises:
      ValueError: an operation without a rule, or an unknown target.
    """
    tape, last = _record(logits, images)
    scores, back = jax.vjp(
        lambda y: _separated(y, labels, target), tape.values[last.place]
    )
    flows = {last: Flow(back(jnp.ones_like(scores))[0], None, False)}
    for step in reversed(tape.steps):
        arrived = [flows.pop(ref, None) for ref in step.outputs]
        if any(arrived):
            _back(step, arrived, tape.values, flows, channels=images.shape[-1])
    return flows[Ref(0)].attribution.sum(axis=-1)


def _separated(logits: Array, labels: Array, target: str) -> Array:
    """p of each image's class [B]: it falls with every logit that comes near."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    apart = jnp.abs(logits - own)
    widest = apart.max(1, keepdims=True)
    apart = apart / jnp.where(widest > 0, widest, 1.0)
    score = explained(logits, labels, target=target)[:, None]
    probs = jax.nn.softmax(score * jnp.exp(-(apart**2) / 2), axis=1)
    return jnp.take_along_axis(probs, labels[:, None], axis=1)[:, 0]


def _record(logits: Callable, images: Array) -> tuple[Tape, Ref]:
    """Runs the network; returns its tape and the place of the logits."""
    closed, tape = jax.make_jaxpr(logits)(images), Tape([], [images])
    (last,) = _run(closed.jaxpr, closed.consts, [Ref(0)], tape)
    if not isinstance(last, Ref):
        raise ValueError("these logits do not depend on the images")
    return tape, last


def _run(jaxpr: Jaxpr, consts: list, inputs: list, tape: Tape) -> list:
    """Evaluates a jaxpr, of operands that are arrays or Refs, onto the tape."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if isinstance(inner, ClosedJaxpr):  # A jit, or a function with its own rule.
            outputs = _run(inner.jaxpr, inner.consts, operands, tape)
        elif isinstance(inner, Jaxpr):  # A remat.
            outputs = _run(inner, [], operands, tape)
        else:
            outputs = _do(equation, operands, tape)
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _do(equation, operands: list, tape: Tape) -> list:
    """One operation; goes onto the tape if one of its operands is a Ref."""
    refs = tuple(operand for operand in operands if isinstance(operand, Ref))
    several = equation.primitive.multiple_results

    def apply(*values):
        given = iter(values)
        full = [next(given) if isinstance(one, Ref) else one for one in operands]
        out = equation.primitive.bind(*full, **equation.params)
        return list(out) if several else [out]

    results = apply(*(tape.values[ref.place] for ref in refs))
    if not refs:
        return results
    outputs = []
    for result in results:  # A comparison has no gradient: its result is a constant.
        outputs.append(result)
        if jnp.issubdtype(result.dtype, jnp.inexact):
            tape.values.append(result)
            outputs[-1] = Ref(len(tape.values) - 1)
    name, linear, weights = equation.primitive.name, None, None
    if name in PRODUCTS and len(refs) == 1:
        left = isinstance(operands[0], Ref)
        weights = operands[1 if left else 0]

        def linear(x, weights):
            pair = (x, weights) if left else (weights, x)
            return equation.primitive.bind(*pair, **equation.params)

    kept = tuple(ref if isinstance(ref, Ref) else None for ref in outputs)
    tape.steps.append(Step(name, apply, refs, kept, linear, weights))
    return outputs


def _back(step: Step, arrived: list, values: list, flows: dict, channels: int) -> None:
    """Hands both streams on from the outputs of an operation to its inputs."""
    inputs = [values[ref.place] for ref in step.inputs]
    outputs, back = jax.vjp(step.apply, *inputs)
    zeros = [jnp.zeros_like(out) for out in outputs]
    gradients = back(
        [z if f is None else f.gradient for z, f in zip(zeros, arrived, strict=True)]
    )
    if all(f is None or f.attribution is None for f in arrived):
        # Above the logits' layer there is a gradient alone; the layer starts with it.
        shares = [
            x * g if step.linear else None
            for x, g in zip(inputs, gradients, strict=True)
        ]
    else:
        given = [
            z if f is None else f.attribution
            for z, f in zip(zeros, arrived, strict=True)
        ]
        shares = _shares(step, inputs, outputs, given, back, arrived[0], channels)
    joined = step.name in SUMS and len(step.inputs) > 1
    kept = step.name in AFFINE and any(f is not None and f.summed for f in arrived)
    for ref, gradient, share in zip(step.inputs, gradients, shares, strict=True):
        flow = Flow(gradient, share, joined or kept)
        flows[ref] = _merged(flows[ref], flow) if ref in flows else flow


def _merged(a: Flow, b: Flow) -> Flow:
    """What arrives by two ways together."""
    parts = [f.attribution for f in (a, b) if f.attribution is not None]
    total = sum(parts[1:], parts[0]) if parts else None
    return Flow(a.gradient + b.gradient, total, a.summed or b.summed)


def _shares(step, inputs, outputs, given, back, flow, channels) -> list[Array]:
    """The attribution of each input of an operation, by its rule."""
    one = len(inputs) == 1
    if step.name in MOVES:
        return list(back(given))
    if step.name in SHARES or (step.name in SUMS and not one):
        spread = [_divide(c, y) for c, y in zip(given, outputs, strict=True)]
        return [x * part for x, part in zip(inputs, back(spread), strict=True)]
    same = one and inputs[0].shape == outputs[0].shape
    if step.name in AFFINE | ACTIVATIONS and same:
        return given
    if step.linear and step.name == "dot_general":
        return [_by_size(step, jnp.abs(inputs[0]), given[0])]
    if step.linear and inputs[0].shape[-1] == channels:
        return [_into_image(step, inputs[0], given[0])]
    if step.linear:
        return [_into_features(step, inputs[0], given[0], flow, back)]
    raise ValueError(
        f"guided factorization has no rule for {step.name!r} of "
        f"{', '.join(str(x.shape) for x in inputs)}; it knows ReLU networks of "
        "convolutions, norms, pools, sums and concatenations, without products of "
        "two branches (swish, squeeze and excitation)"
    )


def _by_size(step: Step, sizes: Array, given: Array) -> Array:
    """v |w|^T(C / (|w| v)), with `sizes` v >= 0: C shared out, its sum unchanged."""
    weights = jnp.abs(step.weights)
    total, back = jax.vjp(lambda v: step.linear(v, weights), sizes)
    return sizes * back(_divide(given, total))[0]


def _into_features(step: Step, x: Array, given: Array, flow: Flow, back) -> Array:
    """The rule of a convolution over features; see `guided_factorization`."""
    shared = _by_size(step, jnp.abs(x), given)
    if flow.summed or max(step.weights.shape[:2]) == 1:
        return shared
    (gradient,) = back([flow.gradient])
    positive = jax.nn.relu((x * gradient).mean(-1, keepdims=True))
    (attributed,) = back([flow.gradient * (given != 0)])
    phi = shared.mean(-1, keepdims=True)
    certain = _factors(x, phi) + _over_maximum(positive)
    residual = certain / (1 + jnp.exp(-shared)) + _factors(attributed, phi)
    residual = residual + _by_size(step, jnp.ones_like(x), given)
    place = (shared != 0).astype(x.dtype)
    residual = residual * place
    axes = (1, 2, 3)
    count = jnp.maximum(place.sum(axes, keepdims=True), 1)
    return shared + residual - residual.sum(axes, keepdims=True) / count * place


def _factors(values: Array, phi: Array) -> Array:
    """Where features look as they do where the attribution is positive: [B, H, W, 1].

    h = sigmoid(10 v / max v) is fitted at every place by two representatives, its means
    r where phi is negative and where it is positive, W = (R^T R + I)^-1 R^T h, and F is
    relu(relu(W_positive) - relu(W_negative)).

    Args:
      values: features or gradients v [B, H, W, D].
      phi: attribution, mean over channels [B, H, W, 1].
    """
    step = jax.nn.sigmoid(STEEPNESS * _over_maximum(values))

    def representative(place):  # bool [B, H, W, 1] -> [B, D]
        count = place.sum((1, 2, 3))[:, None]
        return (step * place).sum((1, 2)) / jnp.maximum(count, 1)

    both = jnp.stack([representative(phi < 0), representative(phi > 0)], axis=1)
    gram = _einsum("bid,bjd->bij", both, both)
    a, b, d = gram[:, 0, 0] + 1, gram[:, 0, 1], gram[:, 1, 1] + 1
    inverse = jnp.stack([d, -b, -b, a], axis=1).reshape(-1, 2, 2)
    inverse = inverse / (a * d - b * b)[:, None, None]
    fit = _einsum("bij,bjd,bhwd->bhwi", inverse, both, step)
    negative, positive = jax.nn.relu(fit[..., :1]), jax.nn.relu(fit[..., 1:])
    return jax.nn.relu(positive - negative)


def _into_image(step: Step, x: Array, given: Array) -> Array:
    """z^B (Montavon et al. 2017): C shared out by x w - low w+ - high w-."""
    axes = (1, 2, 3)
    low, high = (
        jnp.broadcast_to(f(x, axes, keepdims=True), x.shape) for f in (jnp.min, jnp.max)
    )
    terms = (
        (x, step.weights, 1),
        (low, jnp.maximum(step.weights, 0), -1),
        (high, jnp.minimum(step.weights, 0), -1),
    )
    passes = [
        jax.vjp(lambda v, w=weights: step.linear(v, w), values)
        for values, weights, _ in terms
    ]
    total = sum(t[2] * out for t, (out, _) in zip(terms, passes, strict=True))
    spread = _divide(given, total)
    return sum(
        sign * values * back(spread)[0]
        for (values, _, sign), (_, back) in zip(terms, passes, strict=True)
    )


def _over_maximum(x: Array) -> Array:
    """Each image's values [B, H, W, D] over their maximum."""
    return _divide(x, x.max((1, 2, 3), keepdims=True))


def _divide(a: Array, b: Array) -> Array:
    """a / (b + TINY), and 0 where b is 0."""
    divisor = jnp.where((b == 0) | (b == -TINY), 1.0, b + TINY)
    return jnp.where(b == 0, 0.0, a / divisor)


def _einsum(formula: str, *arrays: Array) -> Array:
    """In full precision: accelerators would otherwise round to fewer bits."""
    return jnp.einsum(formula, *arrays, precision=Precision.HIGHEST)
