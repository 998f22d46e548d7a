"""Configs: every row builds, unknown words and fields name the known ones."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import common, from_json, rows
from cxai_jax import train
from cxai_jax.config import (
    PACKAGED,
    check_overrides,
    claim_workdir,
    config_path,
    flatten,
    load_config_file,
    read_config,
)
from cxai_jax.training.validate import check_config

REPO = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["demo", "siteA", "siteB", "joint"])
@pytest.mark.parametrize("row", ["baseline", "cpe", "snapmix", "full", "full,lite0"])
def test_every_row_keeps_the_fields_of_common(name, row):
    config = importlib.import_module(f"configs.{name}").get_config(row)
    fields = set(flatten(config.to_dict()))
    assert fields == set(flatten(common.get_config().to_dict()))
    assert (config.mix.name == "none") == (row in ("baseline", "cpe"))
    assert (config.cpe.weight == 0) == (row in ("baseline", "snapmix"))


def test_unknown_row_names_the_known_ones():
    with pytest.raises(ValueError, match="'fulll'; known: baseline, cpe, snapmix"):
        rows.apply_rows(common.get_config(), "fulll")


def test_unknown_override_names_the_known_fields():
    config = common.get_config()
    check_overrides(["--config.train.epochs=3", "--config=x.py"], config)
    with pytest.raises(
        ValueError, match="config.train.epoch is not a field; known: co"
    ):
        check_overrides(["--config.train.epoch=3"], config)


def test_a_workdir_belongs_to_the_run_that_saved_there(tmp_path):
    config = common.get_config()
    claim_workdir(config, tmp_path)
    config.model.name = "tiny"  # The first start failed: its config may be mended.
    claim_workdir(config, tmp_path)
    (tmp_path / "checkpoints" / "latest" / "7").mkdir(parents=True)
    config.eval.batch_size = 5  # Leaves the training as it is.
    claim_workdir(config, tmp_path)
    config.seed = 3
    with pytest.raises(ValueError, match="config.seed is 3 here and 0 there. Choose"):
        claim_workdir(config, tmp_path)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--config=configs/siteB.py:fulll"], ["fulll", "baseline"]),
        (["--config=configs/nowhere.py"], ["configs/nowhere.py", "siteB"]),
        (["--config=configs/demo.py", "--config.train.epoch=1"], ["train.epochs"]),
        ([], ["--config", "configs/demo.py"]),
        (["--config=configs/siteB.py"], ["cxai-prepare", "site_b"]),
        (["--config=absent.json"], ["absent.json: cannot be read (No such file"]),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, arguments, words):
    run = subprocess.run(
        [sys.executable, "-m", "cxai_jax.main", *arguments, f"--workdir={tmp_path}/w"]
        + [f"--config.data.data_dir={tmp_path}/none"] * bool(arguments),
        cwd=REPO,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode not in (0, None)
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("error: "), run.stderr
    assert "Traceback" not in run.stderr
    for word in words:
        assert word in message


def test_a_run_from_before_a_field_reads_as_it_was(tmp_path):
    config = common.get_config()
    config.tta.theta = 0.3
    del config.tta["prefix_reuse"]
    claim_workdir(config, tmp_path)
    read = read_config(tmp_path)
    assert (read.tta.prefix_reuse, read.tta.theta) == ("off", 0.3)
    claim_workdir(common.get_config(), tmp_path, write=False)  # May be continued.


def test_settings_from_json_change_fields_and_run_nothing(tmp_path):
    path = tmp_path / "settings.json"
    settings = {"train": {"epochs": 3}, "data": {"site_repeats": [1, 4]}, "seed": 7}
    path.write_text(json.dumps(settings))
    config = from_json.get_config(str(path))
    assert (config.seed, config.data.site_repeats) == (7, (1, 4))
    assert type(config.train.epochs) is float
    whole = json.loads(config.to_json())
    path.write_text(json.dumps(whole))  # As the config.json of a run.
    assert json.loads(from_json.get_config(str(path)).to_json()) == whole


@pytest.mark.parametrize(
    "content,message",
    [
        ({"train": {"epoch": 3}}, "'train.epoch' is not a field; known: config.train"),
        ({"train": 3}, "'train' is not a field"),
        ({"seed": {"x": 1}}, "'seed.x' is not a field"),
        ({"seed": 1.5}, "seed is 1.5, expected a value like 0"),
        ({"seed": True}, "seed is True, expected"),
        ({"seed": None}, "seed is None, expected"),
        ({"train": {"epochs": 10**400}}, "train.epochs is 10000.*, expected"),
        ({"model": {"name": ["a"]}}, r"model.name is \['a'\], expected"),
        ({"data": {"site_repeats": [[1]]}}, "site_repeats is .*expected a value like"),
        ([], "holds a list, expected an object"),
        ("import os", "holds a str"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, content, message):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"settings.json.*{message}"):
        from_json.get_config(str(path))


def test_values_from_json_are_validated_as_all_others(tmp_path):
    path = tmp_path / "settings.json"
    for content, message in (
        ({"mix": {"prob": 2.0}}, "config.mix.prob is 2.0"),
        ({"data": {"site_repeats": ["a"]}}, "config.data.site_repeats is"),
        ({"train": {"epochs": float("nan")}}, "config.train.epochs is nan"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            check_config(from_json.get_config(str(path)))


def test_a_json_file_is_a_config_of_the_command():
    read = "--config=configs/from_json.py:a/b.json"
    assert train.through_json("--config=a/b.json") == read
    for argument in (read, "--config=configs/demo.py", "--config.seed=x.json"):
        assert train.through_json(argument) == argument


def test_a_config_is_a_file_or_the_name_of_one_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo.py", "configs/demo.py"):
        assert config_path(name) == PACKAGED / "demo.py"
    assert load_config_file("folder:full").augment.vflip is False
    (tmp_path / "demo.py").write_text(
        "from configs import common\n\n\ndef get_config():\n"
        "    config = common.get_config()\n    config.seed = 7\n    return config\n"
    )
    assert load_config_file("demo.py").seed == 7  # A file comes first.
    with pytest.raises(FileNotFoundError, match="^nope does not exist; found: demo.py"):
        config_path("nope")
    with pytest.raises(FileNotFoundError, match="^x/demo.py does not exist; .*siteB"):
        config_path("x/demo.py")


@pytest.mark.parametrize("name", ["my.yaml", "demo", "demo.yaml", "my.json"])
def test_a_file_that_is_no_python_is_no_config(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name != "demo":
        with pytest.raises(FileNotFoundError, match=f"^{name} does not exist; found"):
            load_config_file(name)
    (tmp_path / name).write_text("seed: 3")
    with pytest.raises(ValueError, match=f"^{name} is no .py or .json config") as error:
        load_config_file(name)
    assert "\n" not in str(error.value)
    assert ("configs/demo.py" in str(error.value)) == name.startswith("demo")


def test_a_file_that_is_no_config_says_so():
    with pytest.raises(ValueError, match=r"rows.py has no get_config\(\)"):
        load_config_file("configs/rows.py")
