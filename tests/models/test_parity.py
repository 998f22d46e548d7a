"""Backbones against networks written independently in torch, and known behaviour.

The torch networks below are built from the papers' tables and use torch's own layers
and names, so that padding, epsilon, stride, order of blocks and name rules all count.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import get_config
from cxai_jax import models
from cxai_jax.models import pretrained

LITE0_FILE = Path(__file__).parents[3] / (
    "shared/weights/efficientnet_lite0_imagenet.npz"
)
# The largest logits of `waves()` by class, from `torch_lite0`.
GOLDEN_WAVES = (
    [823, 645, 714, 723, 418, 518],
    [6.8822, 6.1359, 5.6257, 5.5172, 5.3533, 5.1255],
)


def build(name, num_classes):
    config = get_config().model
    config.name = name
    model = models.build(config, num_classes)
    shapes = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 64, 64, 3)), "eval"),
        jax.random.key(0),
    )
    return model, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


@pytest.fixture(scope="module")
def lite0_tensors():
    if LITE0_FILE.exists():
        return pretrained.read_tensors(str(LITE0_FILE))
    return packaged("lite0-imagenet")


def packaged(spec):
    pytest.importorskip(pretrained.PACKAGED[spec][0])
    return pretrained.read_tensors(spec)


def waves():
    """A fixed image [1, 224, 224, 3] in about [-1, 1], made of a few sines."""
    row, column = np.mgrid[:224, :224] / 224
    channels = [
        np.sin(2 * np.pi * (3 * row + (c + 1) * column**2)) * np.cos(9 * row * column)
        for c in range(3)
    ]
    return np.stack(channels, -1)[None].astype(np.float32)


def photograph():
    """Grace Hopper in uniform, the picture that matplotlib carries."""
    matplotlib = pytest.importorskip("matplotlib")
    from PIL import Image

    path = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"
    with Image.open(path) as image:
        width, height = image.size
        top = (height - width) // 2
        square = image.convert("RGB").crop((0, top, width, top + width))
        pixels = np.asarray(square.resize((224, 224), Image.Resampling.BILINEAR))
    mean, std = models.normalisation("efficientnet_lite0")
    return ((pixels - np.array(mean)) / np.array(std)).astype(np.float32)[None]


@pytest.mark.slow
def test_lite0_knows_a_military_uniform_and_its_golden_logits(lite0_tensors):
    model, variables = build("efficientnet_lite0", 1000)
    variables, _ = pretrained.fill(lite0_tensors, "efficientnet_lite0", variables)
    x = np.concatenate([photograph(), waves()])
    logits, out = jax.jit(lambda v, x: model.apply(v, x, "eval"))(variables, x)
    probs = jax.nn.softmax(logits[0])
    assert int(probs.argmax()) == 652  # ImageNet's "military uniform"
    assert 0.25 < probs[652] < 0.35
    # From the torch network below, with the same weights.
    order, golden = GOLDEN_WAVES
    np.testing.assert_array_equal(np.argsort(-logits[1])[: len(order)], order)
    np.testing.assert_allclose(logits[1][np.array(order)], golden, atol=2e-3)
    bias = variables["params"]["head"]["bias"]
    np.testing.assert_allclose(out.class_maps.mean((1, 2)) + bias, logits, atol=1e-4)


# The likeliest classes of `photograph()` and their probabilities, by
# efficientnet_lite_pytorch 0.1.0 on torch 2.14.1: 652 is the military uniform, 834 a
# suit, 906 a Windsor tie, 457 a bow tie.
PHOTOGRAPH = {
    "lite1": {652: 0.352, 834: 0.086, 906: 0.039, 457: 0.030},
    "lite2": {906: 0.256, 834: 0.240, 652: 0.196, 457: 0.138},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PHOTOGRAPH)
def test_packaged_weights_say_what_the_port_says(name):
    tensors = packaged(f"{name}-imagenet")
    model, variables = build(f"efficientnet_{name}", 1000)
    variables, summary = pretrained.fill(tensors, f"efficientnet_{name}", variables)
    norms = sum(key.endswith("running_var") for key in tensors)
    assert (summary["ignored"], summary["fresh"]) == (norms, [])
    logits, _ = jax.jit(lambda v, x: model.apply(v, x, "eval"))(variables, photograph())
    probs = jax.nn.softmax(logits[0])
    for label, golden in PHOTOGRAPH[name].items():
        assert abs(probs[label] - golden) < 0.01, label


def torch_lite0(torch):
    """EfficientNet-Lite0 from the table of Tan and Le, in the names of the weights."""
    nn, functional = torch.nn, torch.nn.functional

    def same(x, k, stride):
        total = max((-(-x.shape[-1] // stride) - 1) * stride + k - x.shape[-1], 0)
        low = total // 2
        return functional.pad(x, (low, total - low, low, total - low))

    class Block(nn.Module):
        def __init__(self, k, stride, expansion, before, after):
            super().__init__()
            inner = before * expansion
            self.k, self.stride, self.skips = k, stride, before == after and stride == 1
            if expansion > 1:
                self._expand_conv = nn.Conv2d(before, inner, 1, bias=False)
                self._bn0 = nn.BatchNorm2d(inner, eps=1e-3)
            self._depthwise_conv = nn.Conv2d(
                inner, inner, k, stride, groups=inner, bias=False
            )
            self._bn1 = nn.BatchNorm2d(inner, eps=1e-3)
            self._project_conv = nn.Conv2d(inner, after, 1, bias=False)
            self._bn2 = nn.BatchNorm2d(after, eps=1e-3)

        def forward(self, x):
            y = x
            if hasattr(self, "_expand_conv"):
                y = functional.relu6(self._bn0(self._expand_conv(y)))
            y = self._depthwise_conv(same(y, self.k, self.stride))
            y = self._bn2(self._project_conv(functional.relu6(self._bn1(y))))
            return x + y if self.skips else y

    class Lite0(nn.Module):
        def __init__(self):
            super().__init__()
            self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
            self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
            table = "3 1 1 16 1,3 2 6 24 2,5 2 6 40 2,3 2 6 80 3,5 1 6 112 3,"
            table += "5 2 6 192 4,3 1 6 320 1"
            blocks, before = [], 32
            for row in table.split(","):
                k, stride, expansion, after, count = map(int, row.split())
                for index in range(count):
                    step = stride if index == 0 else 1
                    blocks.append(Block(k, step, expansion, before, after))
                    before = after
            self._blocks = nn.ModuleList(blocks)
            self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
            self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
            self._fc = nn.Linear(1280, 1000)

        def forward(self, x):
            x = functional.relu6(self._bn0(self._conv_stem(same(x, 3, 2))))
            for block in self._blocks:
                x = block(x)
            x = functional.relu6(self._bn1(self._conv_head(x)))
            return self._fc(x.mean((2, 3)))

    return Lite0()


def torch_resnet(torch, depths, bottleneck, num_classes):
    """torchvision's ResNet v1.5, in its names."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, before, width, stride):
            super().__init__()
            after = width * (4 if bottleneck else 1)
            sizes = (
                [(before, width, 1, 1), (width, width, 3, stride), (width, after, 1, 1)]
                if bottleneck
                else [(before, width, 3, stride), (width, width, 3, 1)]
            )
            self.count = len(sizes)
            for i, (a, b, k, s) in enumerate(sizes, 1):
                setattr(self, f"conv{i}", nn.Conv2d(a, b, k, s, k // 2, bias=False))
                setattr(self, f"bn{i}", nn.BatchNorm2d(b))
            self.downsample = None
            if stride > 1 or before != after:
                conv = nn.Conv2d(before, after, 1, stride, bias=False)
                self.downsample = nn.Sequential(conv, nn.BatchNorm2d(after))

        def forward(self, x):
            y = x
            for i in range(1, self.count + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = y.relu() if i < self.count else y
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.bn1, before = nn.BatchNorm2d(64), 64
            for i, depth in enumerate(depths):
                blocks = []
                for j in range(depth):
                    stride = 2 if i and not j else 1
                    blocks.append(Block(before, 64 * 2**i, stride))
                    before = 64 * 2**i * (4 if bottleneck else 1)
                setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            self.fc = nn.Linear(before, num_classes)

        def forward(self, x):
            x = self.bn1(self.conv1(x)).relu()
            x = nn.functional.max_pool2d(x, 3, 2, 1)
            for i in range(1, 5):
                x = getattr(self, f"layer{i}")(x)
            return self.fc(x.mean((2, 3)))

    return ResNet()


def to_torch(torch, x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.mark.slow
def test_lite0_equals_an_independent_torch_network(lite0_tensors):
    torch = pytest.importorskip("torch")
    peer = torch_lite0(torch)
    peer.load_state_dict({k: torch.from_numpy(v) for k, v in lite0_tensors.items()})
    x = np.concatenate([waves(), photograph()])
    with torch.no_grad():
        expected = peer.eval()(to_torch(torch, x)).numpy()
    model, variables = build("efficientnet_lite0", 1000)
    variables, _ = pretrained.fill(lite0_tensors, "efficientnet_lite0", variables)
    logits, _ = jax.jit(lambda v, x: model.apply(v, x, "eval"))(variables, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_equals_an_independent_torch_network(name):
    """Evaluation, the training forward pass and the running statistics it leaves."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    depths, bottleneck = {
        "resnet18": ((2, 2, 2, 2), False),
        "resnet50": ((3, 4, 6, 3), True),
    }[name]
    peer = torch_resnet(torch, depths, bottleneck, 5)
    for module in peer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.data.uniform_(0.5, 1)
    tensors = {k: v.numpy().copy() for k, v in peer.state_dict().items()}
    model, variables = build(name, 5)
    variables, _ = pretrained.fill(tensors, name, variables)
    x = np.random.default_rng(0).normal(size=(4, 96, 96, 3)).astype(np.float32)
    with torch.no_grad():
        evaluated = peer.eval()(to_torch(torch, x)).numpy()
        trained = peer.train()(to_torch(torch, x)).numpy()
    expected = {k: v.numpy() for k, v in peer.state_dict().items()}

    @jax.jit
    def run(variables, x):
        logits, _ = model.apply(variables, x, "eval")
        (train_logits, _), updated = model.apply(
            variables, x, "train", mutable=["batch_stats"]
        )
        return logits, train_logits, updated["batch_stats"]

    logits, train_logits, stats = run(variables, x)
    np.testing.assert_allclose(logits, evaluated, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(train_logits, trained, rtol=1e-3, atol=1e-3)
    after, _ = pretrained.fill(expected, name, variables)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        stats,
        after["batch_stats"],
    )
