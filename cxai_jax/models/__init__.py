"""The backbones by name, and how to build one from `config.model`."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from cxai_jax.models import efficientnet_lite0, resnet, tiny
from cxai_jax.models.backbone import HEADS, Backbone
from cxai_jax.types import Array, PyTree

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Modules that no pretrained file fills.
FRESH = {"head", "projection", "extra_bn2", "extra_bn4"}


def _plain(module: type[Backbone], num_classes: int, config) -> Backbone:
    if config.extra_bn:
        raise ValueError(
            f"config.model.extra_bn is published for ResNets (A10); {config.name} has "
            "no place for it, set it to False"
        )
    return module(num_classes, **_common(config))


def _resnet(num_classes: int, config) -> resnet.ResNet:
    depths, bottleneck = resnet.DEPTHS[config.name]
    return resnet.ResNet(
        num_classes,
        depths=depths,
        bottleneck=bottleneck,
        extra_bn=config.extra_bn,
        **_common(config),
    )


def _common(config) -> dict:
    return {
        "head_kind": config.head,
        "projection": config.projection,
        "dtype": DTYPES[config.dtype],
        "remat": config.remat,
    }


# Name -> function of (num_classes, config.model).
MODELS: dict[str, Callable[..., Backbone]] = {
    "tiny": functools.partial(_plain, tiny.Tiny),
    **dict.fromkeys(resnet.DEPTHS, _resnet),
    "efficientnet_lite0": functools.partial(
        _plain, efficientnet_lite0.EfficientNetLite0
    ),
}


def build(model_config, num_classes: int) -> Backbone:
    """Builds the backbone that `config.model` names.

    Args:
      model_config: the fields of `config.model` (configs/common.py).
      num_classes: K.

    Raises:
      ValueError: unknown name, head or dtype, or a field the backbone has no use for.
    """
    known = {"name": MODELS, "head": HEADS, "dtype": DTYPES}
    for field, values in known.items():
        if model_config[field] not in values:
            raise ValueError(
                f"config.model.{field} is {model_config[field]!r}; known: "
                f"{', '.join(values)}"
            )
    return MODELS[model_config.name](num_classes, model_config)


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, grey levels 0..255, of a backbone."""
    module = {"tiny": tiny, "efficientnet_lite0": efficientnet_lite0}.get(name, resnet)
    return module.MEAN, module.STD


def is_trunk(path: Sequence) -> bool:
    """Whether the parameter at `path`, names or tree keys, may hold pretrained weights.

    False for the head and for norms that the pretraining did not have; these take
    `config.optim.lr_fresh`.
    """
    return FRESH.isdisjoint(str(getattr(key, "key", key)) for key in path)


def head_kernel(params: PyTree) -> Array:
    """The kernel [D, K] of the linear head, for `cam.class_activation_map`.

    Raises:
      ValueError: the head is an mlp; its maps are `Outputs.class_maps`.
    """
    if "hidden_kernel" in params["head"]:
        raise ValueError("an mlp head has no class kernel; use Outputs.class_maps")
    return params["head"]["kernel"]
