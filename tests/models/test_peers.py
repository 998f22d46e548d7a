"""Networks against the published PyTorch ones on made-up weights.

The peers' outputs, and a digest of their tensors' names and shapes, are in
golden/torch_networks.json. Here the names are made from ours by functions that are
independent of the rules under test.
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs.common import get_config
from cxai_jax import models
from cxai_jax.models import pretrained

GOLDEN = Path(__file__).parents[1] / "golden/torch_networks.json"
PEERS = json.loads(GOLDEN.read_text())["networks"]

_spec = importlib.util.spec_from_file_location("peers", GOLDEN.with_suffix(".py"))
peers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(peers)

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean"}
LEAVES["var"] = "running_var"
LITE_DEPTHS = {"0": (1, 2, 2, 3, 3, 4, 1)}
LITE_DEPTHS["1"] = LITE_DEPTHS["2"] = (1, 3, 3, 4, 4, 5, 1)


def densenet121(modules, norm):
    """Torchvision's module of ours: "block1_2", "conv1" -> its layer of its block."""
    top, *rest = modules
    if top == "head":
        return "classifier"
    if top == "stem":
        return "features.norm0" if norm else "features.conv0"
    if top.startswith("transition"):
        return f"features.{top}.conv"
    block, _, layer = top.removeprefix("block").partition("_")
    if layer == "norm":
        return "features.norm5" if block == "4" else f"features.transition{block}.norm"
    name = {(): "norm1", ("conv1",): "norm2" if norm else "conv1"}
    name = name.get(tuple(rest), "conv2")
    return f"features.denseblock{block}.denselayer{layer}.{name}"


def efficientnet_b0(modules, norm):
    """Torchvision's: layers of a block by number, one less where nothing expands."""
    top, *rest = modules
    if top == "head":
        return "classifier.1"
    if top in ("stem", "last"):
        return f"features.{0 if top == 'stem' else 8}.{int(norm)}"
    stage, block = top.removeprefix("stage").split("_")
    number = ["expand", "depthwise", "excite", "project"].index(rest[0])
    number -= stage == "0"
    inner = {"reduce": "fc1", "expand": "fc2"}[rest[1]] if rest[1:] else int(norm)
    return f"features.{int(stage) + 1}.{block}.block.{number}.{inner}"


def timm(modules, norm):
    """Timm's: norms by number, and other names where nothing expands."""
    top, *rest = modules
    whole = {"stem": ("conv_stem", "bn1"), "last": ("conv_head", "bn2")}
    if top == "head":
        return "classifier"
    if top in whole:
        return whole[top][norm]
    stage, block = top.removeprefix("stage").split("_")
    place = f"blocks.{stage}.{block}"
    if rest[0] == "excite":
        return f"{place}.se.conv_{rest[1]}"
    convs = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
    if stage == "0":
        convs = {"depthwise": "conv_dw", "project": "conv_pw"}
    number = list(convs).index(rest[0]) + 1
    return f"{place}.{f'bn{number}' if norm else convs[rest[0]]}"


def lite(modules, norm, depths):
    """The PyTorch port's: blocks in one row, norms by number, also where one lacks."""
    top, *rest = modules
    whole = {"stem": ("_conv_stem", "_bn0"), "last": ("_conv_head", "_bn1")}
    if top == "head":
        return "_fc"
    if top in whole:
        return whole[top][norm]
    stage, block = map(int, top.removeprefix("stage").split("_"))
    number = ["expand", "depthwise", "project"].index(rest[0])
    name = f"_bn{number}" if norm else f"_{rest[0]}_conv"
    return f"_blocks.{sum(depths[:stage]) + block}.{name}"


def nasnet_mobile(modules, norm):
    """Cadene's, where 'norm' of a separable convolution lies beside it."""
    top, *rest = modules
    if top == "head":
        return "last_linear"
    if top == "stem":
        return "conv0.bn" if norm else "conv0.conv"
    if rest == ["path_norm"]:
        return f"{top}.final_path_bn"
    if rest[0] in ("path1", "path2"):
        return f"{top}.path_{rest[0][-1]}.conv"
    if rest[0] in ("current", "previous"):
        fit = {"current": "conv_1x1", "previous": "conv_prev_1x1"}[rest[0]]
        return f"{top}.{fit}.{'bn' if norm else 'conv'}"
    branch, layer = rest[0].replace("branch", "comb_iter_"), rest[1]
    last = f"bn_sep_{layer[-1]}"
    if not norm:
        last = f"separable_{layer[-1]}.{layer[:-1]}_conv2d"
    return f"{top}.{branch}.{last}"


def peer_module(case, modules, norm):
    name, _, package = case.partition(" ")
    if package == "timm":
        return timm(modules, norm)
    if "lite" in name:
        return lite(modules, norm, LITE_DEPTHS[name[-1]])
    return globals()[name](modules, norm)


def built(name, num_classes=1000, dtype=jnp.float32):
    config = get_config().model
    config.name = name
    model = models.build(config, num_classes).clone(dtype=dtype)
    x = jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(lambda key: model.init(key, x, "eval"), jax.random.key(0))
    return model, jax.tree.map(lambda s: np.zeros(s.shape, dtype), shapes)


def tensors_of(case, variables):
    """The peer's state_dict, by the rule that filled the peer."""
    tensors = {}
    for path, value in flatten_dict(variables).items():
        _, *modules, leaf = path
        norm = modules[-1] == "norm"
        module = peer_module(case, modules[:-1] if norm else modules, norm)
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, range(value.ndim))
        shape = tuple(value.shape[i] for i in axes)
        name = f"{module}.{LEAVES.get(leaf, leaf)}"
        tensors[name] = peers.weight(name, shape)
        if leaf == "var":
            tensors[f"{module}.num_batches_tracked"] = np.array(0)
    return tensors


@pytest.mark.parametrize("case", PEERS)
def test_the_peers_tensors_fill_the_network_with_nothing_left_over(case):
    name = case.partition(" ")[0]
    _, variables = built(name)
    tensors = tensors_of(case, variables)
    shapes = {name: value.shape for name, value in tensors.items()}
    assert peers.digest(shapes) == PEERS[case]["names_and_shapes"]
    params = sum(p.size for p in jax.tree.leaves(variables["params"]))
    assert params == PEERS[case]["parameters"]
    filled, summary = pretrained.fill(tensors, name, variables)
    assert summary["fresh"] == []
    assert summary["loaded"] == len(jax.tree.leaves(variables))
    assert summary["loaded"] + summary["ignored"] == len(tensors)
    with pytest.raises(ValueError, match="surplus classifier.2.weight .*; missing "):
        first, *others = tensors
        broken = {key: tensors[key] for key in others}
        pretrained.fill(
            broken | {"classifier.2.weight": tensors[first]}, name, variables
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", PEERS)
def test_outputs_equal_the_peers(case, float64):
    """Evaluation and training forward pass, in float64; logits are float32 here."""
    name = case.partition(" ")[0]
    model, variables = built(name, dtype=jnp.float64)
    variables, _ = pretrained.fill(tensors_of(case, variables), name, variables)
    x = jnp.asarray(peers.images(), jnp.float64)

    @jax.jit
    def run(variables):
        (logits, trained), _ = model.apply(
            variables, x, "train", mutable=["batch_stats"]
        )
        return {
            "eval": model.apply(variables, x, "eval"),
            "train": (logits, trained),
        }

    for mode, (logits, out) in run(variables).items():
        golden, shown = PEERS[case][mode], peers.SHOWN
        scale = np.abs(golden["features"]).max()
        np.testing.assert_allclose(
            out.features[:, 1, 2, :shown], golden["features"], 1e-9, 1e-9 * scale
        )
        np.testing.assert_allclose(out.features.mean(), golden["features_mean"], 1e-9)
        scale = np.abs(golden["logits"]).max()
        np.testing.assert_allclose(
            logits[:, :shown], golden["logits"], 1e-5, 1e-6 * scale
        )
