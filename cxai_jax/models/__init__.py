"""The backbones by name, and how to build one from `config.model`."""

import jax.numpy as jnp

from cxai_jax.models import (
    covidnet,
    covidnet_ct,
    densenet,
    efficientnet,
    lenet,
    nasnet_mobile,
    resnet,
    tiny,
)
from cxai_jax.models.adapters import ADAPTERS
from cxai_jax.models.backbone import HEADS, Backbone, BackboneSpec
from cxai_jax.models.calibrated import Calibrated
from cxai_jax.models.norm import NORMS
from cxai_jax.types import Array, PyTree

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Fields that some backbones alone know (`BackboneSpec.options`): the value that all
# others need, and why.
OPTIONS = {
    "extra_bn": (False, "is published for ResNets (A10)"),
    "adapter": ("none", "sits at the 3x3 convolutions of a ResNet"),
    "stage4_input": ("published", "is the sum of a COVID-Net"),
}

MODELS: dict[str, BackboneSpec] = {
    "tiny": tiny.SPEC,
    "lenet": lenet.SPEC,
    **resnet.SPECS,
    **efficientnet.SPECS,
    "densenet121": densenet.SPEC,
    "nasnet_mobile": nasnet_mobile.SPEC,
    "covidnet_ct": covidnet_ct.SPEC,
    **covidnet.SPECS,
}


def build(model_config, num_classes: int, *, num_sites: int = 0) -> Backbone:
    """Builds the backbone that `config.model` names.

    Args:
      model_config: the fields of `config.model` (configs/common.py).
      num_classes: K.
      num_sites: S, sites of the data; read where `needs_site` alone.

    Raises:
      ValueError: unknown name, head, dtype or norm, a field the backbone has no use
        for, or no sites where it has parts for each.
    """
    spec = spec_of(model_config.name)
    known = {
        "head": HEADS,
        "dtype": DTYPES,
        "norm": NORMS,
        "adapter": ADAPTERS,
        "stage4_input": covidnet.STAGE4_INPUTS,
    }
    for field, values in known.items():
        if model_config[field] not in values:
            raise ValueError(
                f"config.model.{field} is {model_config[field]!r}; known: "
                f"{', '.join(values)}"
            )
    for option, (without, why) in OPTIONS.items():
        if model_config[option] != without and option not in spec.options:
            raise ValueError(
                f"config.model.{option} {why}; {model_config.name} has no place for "
                f"it, set it to {without!r}"
            )
    if model_config.norm not in spec.norms:
        raise ValueError(
            f"config.model.norm is {model_config.norm!r}, but {model_config.name} has "
            f"no norms; set it to {spec.norms[0]!r}"
        )
    if needs_site(model_config) and num_sites < 1:
        raise ValueError(
            f"config.model.norm={model_config.norm!r} with config.model.adapter="
            f"{model_config.adapter!r} needs the number of sites of the data; "
            f"num_sites is {num_sites}"
        )
    options = {option: model_config[option] for option in spec.options}
    if "adapter" in options:
        options["adapter"] = ADAPTERS[options["adapter"]](num_sites)
    network = spec.build(
        num_classes,
        head_kind=model_config.head,
        projection=model_config.projection,
        dtype=DTYPES[model_config.dtype],
        remat=model_config.remat,
        norm=NORMS[model_config.norm](num_sites),
        **options,
    )
    if not model_config.calibrator:
        return network
    return Calibrated(
        num_classes,
        network=network,
        width=model_config.calibrator,
        mean=spec.mean,
        std=spec.std,
    )


def needs_site(model_config) -> bool:
    """Whether the network has parts of its own for every site: calls need `site`."""
    return model_config.norm == "per_site" or model_config.adapter != "none"


def spec_of(name: str) -> BackboneSpec:
    """The declaration of a backbone; raises ValueError for an unknown name."""
    if name not in MODELS:
        raise ValueError(f"config.model.name is {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, grey levels 0..255, of a backbone."""
    spec = spec_of(name)
    return spec.mean, spec.std


def fresh_modules(name: str) -> set[str]:
    """Modules of a backbone that no pretrained weights fill."""
    return {"head", "projection", *spec_of(name).fresh}


def head_kernel(params: PyTree) -> Array:
    """The kernel [D, K] of the linear head, for `cam.class_activation_map`.

    Raises:
      ValueError: the head is mlp or flat; its maps are `Outputs.class_maps`.
    """
    head = params["head"]
    if "hidden_kernel" in head or head["kernel"].ndim != 2:
        raise ValueError(
            "a head of kind mlp or flat has no class kernel [D, K]; use "
            "Outputs.class_maps"
        )
    return head["kernel"]
