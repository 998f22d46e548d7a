"""Configs: every row builds, unknown words and fields name the known ones."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import common
from cxai_jax.config import check_overrides, claim_workdir, flatten, read_config

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
        common.apply_rows(common.get_config(), "fulll")


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
