"""A workdir belongs to its data: others are refused, and what is there stays."""

import dataclasses
import json
import shutil

import jax
import pytest
from untrained_run import make_run

from cxai_jax import data
from cxai_jax.inference import predictor
from cxai_jax.training import lock, loop, resume
from cxai_jax.training import run as runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, make_run(folder)[0]


@pytest.fixture
def run(made, tmp_path):
    """A run of its own: (workdir, config)."""
    folder, config = made
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run", config.copy_and_resolve_references()


@pytest.fixture
def swapped(run, monkeypatch):
    """Train and test have changed places since."""
    dataset = data.load(run[1].data)
    splits = dict(dataset.splits)
    splits["train"], splits["test"] = splits["test"], splits["train"]
    changed = dataclasses.replace(dataset, splits=splits)
    monkeypatch.setattr(runs, "load_sources", lambda config: {"": changed})


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_eval_of_another_config_is_refused(run):
    workdir, config = run
    before = contents(workdir)
    config.data.phantom_images = 40
    with pytest.raises(ValueError, match="config.data.phantom_images is 40 here and"):
        loop.score(config, workdir)
    assert contents(workdir) == before


def test_eval_on_other_data_is_refused(run, swapped):
    workdir, config = run
    before = contents(workdir)
    with pytest.raises(ValueError) as error:
        loop.score(config, workdir)
    assert str(error.value) == (
        f"{workdir} was trained on other data: test has 12 images there and 28 here; "
        "train has 28 images there and 12 here. Its results are left as they are; "
        "score it with its own data, at config.data.data_dir"
    )
    assert contents(workdir) == before


def test_training_on_other_data_is_refused_or_forced(run, swapped, caplog):
    workdir, config = run
    before = contents(workdir)
    with pytest.raises(ValueError, match="other data: test has .* --force_resume to"):
        loop.train(config, workdir)
    assert contents(workdir) == before
    opened = runs.open_run(config, workdir)
    method = runs.make_method(config, opened.network, total_steps=1)
    state = runs.initial_state(opened, method)
    assert resume.restore(opened, state, advice="", force=True)[1] == 1
    assert "continuing with these, as --force_resume says" in caplog.text


def test_a_second_training_is_refused(run):
    workdir, config = run
    with lock.training(workdir):
        before = contents(workdir)
        with pytest.raises(ValueError, match="is in use by process"):
            loop.train(config, workdir)
        assert contents(workdir) == before


def test_eval_beside_a_training_leaves_the_workdir_to_it(run):
    workdir, config = run
    config.eval.bootstrap, config.tta.k = 20, 0
    with lock.training(workdir):
        before = contents(workdir)
        results = loop.score(config, workdir)
        after = contents(workdir)
    assert {path for path in after if path.parts[0] != "eval"} == before.keys()
    assert before.items() <= after.items()
    written = json.loads((workdir / "eval/live/results.json").read_text())
    assert written["metrics"] == json.loads(json.dumps(results["metrics"]))
    assert (workdir / "eval/live/report.html").exists()


def test_class_names_are_those_of_the_training(run):
    workdir, _ = run
    told = json.loads((workdir / "results.json").read_text())
    names = told["data"]["class_names"]
    told["data"]["class_names"] = ["one", "two"]
    told["data"]["positive"] = "two"
    (workdir / "results.json").write_text(json.dumps(told))
    model = predictor.load(workdir)
    assert (model.class_names, jax.tree.leaves(model.variables) != []) == (names, True)


def test_prediction_leaves_a_damaged_checkpoint_where_it_is(run):
    workdir, _ = run
    latest = workdir / "checkpoints/latest"
    shutil.copytree(latest / "1", latest / "2")
    path = next((latest / "2/state").rglob("d/*"))
    path.write_bytes(path.read_bytes()[:-9])
    before = contents(workdir)
    assert predictor.load(workdir).step == 1
    assert contents(workdir) == before
