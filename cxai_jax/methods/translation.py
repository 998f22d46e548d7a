"""What the methods with several networks share: their state, updates and pictures."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from cxai_jax.data.augment import Scale
from cxai_jax.methods import parts
from cxai_jax.methods.method import Method, Network
from cxai_jax.types import Array, Batch, PyTree


@struct.dataclass
class Several:
    """All that a step of several networks changes, and all that a checkpoint holds."""

    step: Array  # int32 scalar
    params: dict  # By network.
    batch_stats: dict  # By network, for those that have some.
    opt_state: dict  # By optimiser.
    pools: dict  # ImagePool by domain.


class Setting(NamedTuple):
    """What stays the same over all steps of a run."""

    config: object
    network: Network
    nets: dict  # Module by name, beside the scored network.
    optimizers: dict  # Optimiser by name.
    groups: dict  # Optimiser -> names of the networks that it moves.
    total_steps: int


def setting_of(method: Method) -> Setting:
    """What the step of a method of this kind was made with."""
    return method.step.args[0]


def check_pictures(config) -> None:
    """Raises ValueError for images that the generators cannot take.

    Those of a side that cannot be halved twice, and those normalised one by one, whose
    gray levels are lost.
    """
    side = config.data.image_size
    if side % 4 or side < 32:
        raise ValueError(
            f"config.data.image_size={side}: config.method={config.method} translates "
            "images of 32 px or more, a multiple of 4"
        )
    if config.data.normalisation == "per_image":
        raise ValueError(
            f"config.method={config.method} translates gray levels, which config.data."
            "normalisation=per_image does away with; set it to model"
        )


def adam(rate: float, *, b1: float = 0.5) -> optax.GradientTransformation:
    """The optimiser of the published GAN codes."""
    return optax.adam(rate, b1=b1)


def pictures(key: Array, batch: Batch, config, scale: Scale) -> Array:
    """Augmented images in -1..1, as generators take them: [B, H, W, 3]."""
    return to_picture(parts.prepare(key, batch, config, scale)[..., :3], scale)


def to_picture(images: Array, scale: Scale) -> Array:
    """Images as the scored network takes them -> -1..1."""
    mean, std = (jnp.asarray(x, jnp.float32) for x in scale)
    return (images * std + mean) / 127.5 - 1


def to_input(images: Array, scale: Scale) -> Array:
    """Images in -1..1 -> as the scored network takes them."""
    mean, std = (jnp.asarray(x, jnp.float32) for x in scale)
    return ((images + 1) * 127.5 - mean) / std


def gradient(setting: Setting, state: Several, name: str, loss, *arguments) -> tuple:
    """(gradient of one optimiser's parameters, what `loss` returns beside its value).

    Args:
      loss: (setting, state, parameters, *arguments) -> (value, anything).
    """
    at = functools.partial(loss, setting, state)
    return jax.grad(at, has_aux=True)(of(state, name, setting), *arguments)


def updated(setting: Setting, state: Several, name: str, gradient: dict) -> Several:
    """The state after a step of one optimiser on its networks."""
    own = {net: state.params[net] for net in setting.groups[name]}
    updates, opt_state = setting.optimizers[name].update(
        gradient, state.opt_state[name], own
    )
    moved = optax.apply_updates(own, updates)
    return state.replace(
        params=state.params | moved,
        opt_state=state.opt_state | {name: opt_state},
    )


def first_variables(net: nn.Module, key: Array, *arguments) -> PyTree:
    """What a network starts from, in one program instead of one per layer."""
    return jax.jit(lambda key: net.init(key, *arguments))(key)


def first_state(
    setting: Setting, params: dict, batch_stats: dict, pools: dict
) -> Several:
    """A state before the first step."""
    return Several(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state={
            name: optimizer.init({net: params[net] for net in setting.groups[name]})
            for name, optimizer in setting.optimizers.items()
        },
        pools=pools,
    )


def of(state: Several, name: str, setting: Setting) -> dict:
    """The parameters that one optimiser moves."""
    return {net: state.params[net] for net in setting.groups[name]}


def scored(state: Several) -> PyTree:
    """Variables of the network `task`."""
    return {
        "params": state.params["task"],
        "batch_stats": state.batch_stats["task"],
    }


def finished(state: Several, metrics: dict) -> tuple[Several, dict]:
    """One step further, metrics as float32 scalars."""
    metrics = jax.tree.map(lambda m: jnp.asarray(m, jnp.float32), metrics)
    return state.replace(step=state.step + 1), metrics
