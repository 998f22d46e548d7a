"""A bundle predicts as its run does, and no file of it can change unseen."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image
from untrained_run import make_run

from cxai_jax import predict
from cxai_jax.config import read_config
from cxai_jax.inference import bundle, export, predictor

pytest.importorskip("safetensors")
SCORES = dict.fromkeys(
    ("accuracy", "precision", "recall", "specificity", "f1", "auc", "ece"), 0.75
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(workdir, bundle folder) of an untrained run with scores."""
    root = tmp_path_factory.mktemp("bundle")
    make_run(root / "run")
    config = json.loads((root / "run" / "config.json").read_text())
    config["model"]["pretrained"] = "/home/me/w.npz"
    config["data"]["photographs"] = "/home/me/photographs"
    config["adapt"]["perceptual"] = "~/home/me/vgg.npz"
    (root / "run" / "config.json").write_text(json.dumps(config))
    file = root / "run" / "results.json"
    results = json.loads(file.read_text())
    results["data"] |= {"name": "phantom", "split_scheme": "patient-disjoint"}
    results["data"] |= {"counts": {"train": 30, "test": 9}}
    results["data"]["leakage"] = {"verdict": "LEAKS: 2 of 9 test images"}
    scored = {**SCORES, "number": 9, "intervals": {"accuracy": [0.5, 0.9]}}
    results["metrics"] = {"all": scored}
    results["pretrained"] = {"source": "/home/me/w.npz"}
    file.write_text(json.dumps(results))
    export.main([f"--workdir={root / 'run'}", f"--bundle={root / 'bundle'}"])
    return root / "run", root / "bundle"


def copy(made, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in made[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_bundle_is_the_model_of_its_run(made):
    live, read = predictor.load(made[0]), bundle.read(made[1])
    assert read.class_names == live.class_names and read.positive == live.positive
    assert read.site_names == live.site_names and read.step == live.step
    flat = [bundle.flatten_dict(m.variables, sep="/") for m in (live, read)]
    assert flat[0].keys() == flat[1].keys()
    for name, value in flat[0].items():
        np.testing.assert_array_equal(value, flat[1][name])
    names = {file.name for file in made[1].iterdir()}
    assert names == {*bundle.FILES, bundle.MANIFEST}
    assert not any(b"/home/me" in f.read_bytes() for f in made[1].iterdir())
    config = read_config(made[1])
    assert config.model.pretrained == "w.npz"
    assert config.data.photographs == "photographs"
    assert config.adapt.perceptual == "vgg.npz"


@pytest.mark.parametrize("name", ["", "lite0-imagenet", "owner/name", "w.npz"])
def test_what_is_no_place_of_this_machine_stays(name):
    assert bundle.without_folder(name) == name


def test_the_card_says_what_was_measured(made):
    card = (made[1] / "README.md").read_text()
    for words in (
        "positive class: COVID-19",
        "LEAKS: 2 of 9 test images",
        "split: patient-disjoint",
        "30 train, 9 test",
        "| all images | 9 | 75.0 (50.0-90.0) |",
        "no fitted thresholds",
        "weights: w.npz",
        "not a medical device",
    ):
        assert words in card, words


def test_predict_without_the_workdir(made, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tables = []
    for source in (f"--workdir={made[0]}", f"--model={made[1]}"):
        out = tmp_path / source[2:7]
        assert predict.main([source, str(tmp_path / "a.png"), f"--out={out}"]) == 0
        tables.append((out / "predictions.csv").read_text())
    assert tables[0] == tables[1]
    assert "probabilities are of COVID-19" in capsys.readouterr().out
    assert {f.name for f in made[1].iterdir()} == {*bundle.FILES, bundle.MANIFEST}


@pytest.mark.parametrize("name", bundle.FILES)
def test_a_changed_or_missing_file_is_named(made, tmp_path, name, capsys):
    folder = copy(made, tmp_path)
    file = folder / name
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ValueError, match=f"{name} is not the file that was exported"):
        bundle.read(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing from the bundle"):
        bundle.read(folder)
    code = predict.main([f"--model={folder}", str(file), f"--out={tmp_path / 'o'}"])
    assert code == 2 and f"{name} is missing from the bundle" in capsys.readouterr().err


def test_other_weights_under_a_new_manifest_do_not_fit(made, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = copy(made, tmp_path)
    tensors = load_file(folder / bundle.WEIGHTS)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, folder / bundle.WEIGHTS)
    manifest = json.loads((folder / bundle.MANIFEST).read_text())
    manifest[bundle.WEIGHTS] = bundle.digest(folder / bundle.WEIGHTS)
    (folder / bundle.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"does not fit the network.*{name}"):
        bundle.read(folder)
    (folder / bundle.MANIFEST).write_text("[]")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        bundle.read(folder)
    (folder / bundle.MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="is no bundle; write one"):
        bundle.read(folder)


def test_a_folder_with_files_is_not_written_into(made, capsys):
    with pytest.raises(SystemExit) as stopped:
        export.main([f"--workdir={made[0]}", f"--bundle={made[1]}"])
    assert stopped.value.code == 2
    assert "is there already; choose a new --bundle" in capsys.readouterr().err


def test_the_hub_is_asked_only_if_named(made, monkeypatch, capsys):
    calls = []

    class Hub:
        def create_repo(self, repository, **options):
            calls.append((repository, options))

        def upload_folder(self, *, repo_id, folder_path):
            calls.append((repo_id, folder_path))
            return "https://hub/me/x"

    def fetched(repository, allow_patterns):
        return made[1]

    hub = types.SimpleNamespace(HfApi=Hub, snapshot_download=fetched)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert bundle.push(made[1], "me/x") == "https://hub/me/x"
    assert calls[0] == ("me/x", {"private": True, "exist_ok": True})
    assert bundle.locate("me/x") == made[1]
    with pytest.raises(FileNotFoundError, match="--model=me does not exist"):
        bundle.locate("me")
    with pytest.raises(ValueError, match="--push=me is no hub id"):
        bundle.push(made[1], "me")
    with pytest.raises(SystemExit):
        export.main([f"--workdir={made[0]}", "--out=x", "--push=me/x"])
    assert "--push uploads a bundle" in capsys.readouterr().err


def test_config_of_a_bundle_is_read_as_one(made):
    assert read_config(made[1]).data.data_dir == "data"
