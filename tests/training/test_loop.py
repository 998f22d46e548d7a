"""End to end on the phantom: train, kill, resume, score; golden metrics of one step."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import logging as absl_logging
from small import small

from cxai_jax import disk
from cxai_jax.data import novelty
from cxai_jax.scoring import evaluate
from cxai_jax.training import loop

absl_logging.set_verbosity(absl_logging.ERROR)


def config_of(**changes):
    fields = {"data.phantom_images": 80, "train.batch_size": 16, "tta.patch": 2}
    return small(**fields | {"eval.batch_size": 16} | changes)


def rows_of(workdir):
    rows = [json.loads(r) for r in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, loop.train(config_of(), workdir)


NUMBER, MAYBE = (int, float), (int, float, type(None))
INTERVALS = {"accuracy": [MAYBE], "f1": [MAYBE]}
SCORES = {name: MAYBE for name in ("accuracy", "precision", "recall", "specificity")}
SCORES |= {"f1": MAYBE, "number": int, "intervals": INTERVALS}
DATA = {"name": str, "class_names": [str], "positive": str, "site_names": [str]}
DATA |= {"split_scheme": str, "fingerprint": str, "counts": {"test": int}}
POINT = {"threshold": MAYBE, "sensitivity": MAYBE, "specificity": MAYBE}
SET = {"coverage_wanted": NUMBER, "quantile": NUMBER, "coverage": MAYBE}
SET |= {"mean_set_size": NUMBER, "single_class_share": MAYBE, "empty_share": MAYBE}
CALIBRATION = {"temperature": NUMBER, "held_out": int, "ece_before": NUMBER}
CALIBRATION |= {"ece_after": NUMBER, "operating_points": [POINT], "conformal": [SET]}
SCHEMA = {  # Of results.json; a field that is not listed may come and go.
    "metrics": {"all": SCORES | {"auc": MAYBE, "ece": NUMBER}},
    "calibration": CALIBRATION,
    "maps": {"scale": NUMBER},
    "finished": str,
    "curve": list,
    "data": DATA | {"leakage": {"verdict": str}},
    "tested": DATA,
    "config": {"data": dict, "model": dict, "optim": dict, "train": dict, "seed": int},
    "versions": {"python": str, "jax": str, "cxai-jax": str},
    "device": {"kind": str, "count": int, "hosts": int},
    "selected": {"rule": str},
    "steps": int,
    "time": {"total_s": NUMBER},
}


def departures(value, schema, path="results"):
    """Where a value is not as a schema of types, lists and dicts says."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            yield f"{path} is {value!r}, expected an object"
            return
        for name, inner in schema.items():
            if name in value:
                yield from departures(value[name], inner, f"{path}.{name}")
            else:
                yield f"{path} lacks {name}"
    elif isinstance(schema, list):
        if not isinstance(value, list):
            yield f"{path} is {value!r}, expected a list"
            return
        for place, one in enumerate(value):
            yield from departures(one, schema[0], f"{path}[{place}]")
    elif not isinstance(value, schema):
        yield f"{path} is {value!r}, expected {schema}"


def test_results_are_strict_json_of_the_known_shape(finished):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (finished[0] / "results.json").read_text()
    found = json.loads(text, parse_constant=refuse)
    assert list(departures(found, SCHEMA)) == []
    found["metrics"]["all"]["number"] = "24"
    found["calibration"]["conformal"][0].pop("quantile")
    assert len(list(departures(found, SCHEMA))) == 2


def test_what_tells_a_foreign_image_is_left_behind(finished):
    known = novelty.load_features(finished[0])
    counts = finished[1]["data"]["counts"]
    assert known["reference"].shape[0] == counts["train"] and known["threshold"] > 0
    lengths = np.linalg.norm(known["reference"], axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-2)


def test_a_run_leaves_everything(finished):
    workdir, results = finished
    assert (
        json.loads((workdir / "results.json").read_text())["steps"] == results["steps"]
    )
    predictions = evaluate.load_predictions(workdir / "predictions_test.npz")
    number = results["data"]["counts"]["test"]
    assert predictions["probs"].shape == (number, 4, 2)
    np.testing.assert_allclose(predictions["probs"].sum(-1), 1, atol=1e-5)
    assert np.isfinite(results["metrics"]["all"]["accuracy"])
    assert results["data"]["leakage"]["verdict"]
    assert results["data"]["fingerprint"]
    assert results["time"]["donated_bytes"] > 0


@pytest.mark.parametrize(
    ("per_image", "per_step", "residency", "warned"),
    [
        (3.0, 1.0, "host", True),
        (1.0, 3.0, "host", False),  # The host runs ahead, then waits for the device.
        (3.0, 1.0, "device", False),
    ],
)
def test_a_host_bound_run_says_so(
    monkeypatch, caplog, per_image, per_step, residency, warned
):
    config = config_of(
        **{"train.log_every_steps": 5, "train.checkpoint_every_epochs": 0.0}
    )
    now, device_free = [0.0], [0.0]

    def advance(state):
        now[0] += per_image
        device_free[0] = max(device_free[0], now[0]) + per_step
        return state, {}, per_image

    def wait(pending):
        now[0] = max(now[0], device_free[0])

    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop.jax, "block_until_ready", wait)
    monkeypatch.setattr(loop, "log", lambda *_: None)
    monkeypatch.setattr(loop.finite, "check", lambda *_: None)
    checkpoints = SimpleNamespace(
        preempted=lambda step: False, save=lambda *_: None, wait=lambda: None
    )
    run = SimpleNamespace(config=config, checkpoints=checkpoints, about=dict)
    plan = SimpleNamespace(total_steps=20, steps_per_epoch=10)
    loop.loop(run, plan, None, advance, None, 0, residency)
    assert ("host-bound" in caplog.text) == warned


@pytest.mark.parametrize(("minutes", "saves"), [(1.0, [4, 8, 10]), (0.0, [10])])
def test_saves_by_minutes(monkeypatch, minutes, saves):
    changes = {"train.checkpoint_every_epochs": 0.0, "train.log_every_steps": 7}
    config = small(**changes, **{"train.checkpoint_every_minutes": minutes})
    now, saved = [0.0], []

    def advance(state):
        now[0] += 17.0
        return state, {"loss": np.array([0.5])}, 0.0

    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(loop, "log", lambda *_: None)
    checkpoints = SimpleNamespace(
        preempted=lambda step: False,
        save=lambda kind, step, *_: saved.append(step),
        wait=lambda: None,
    )
    run = SimpleNamespace(config=config, checkpoints=checkpoints, about=dict)
    plan = SimpleNamespace(total_steps=10, steps_per_epoch=10)
    loop.loop(run, plan, None, advance, None, 0, "device")
    assert saved == saves


def test_resume_is_exact_to_the_bit(finished, tmp_path):
    workdir, whole = finished
    middle = sorted(
        int(p.name) for p in (workdir / "checkpoints/latest").iterdir() if p.is_dir()
    )[0]
    assert middle < whole["steps"]
    killed_after(workdir, middle, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # The line it was writing.
    again = loop.train(config_of(), tmp_path)
    assert again["metrics"] == whole["metrics"]
    assert rows_of(tmp_path) == rows_of(workdir)
    first, second = (
        evaluate.load_predictions(d / "predictions_test.npz")
        for d in (workdir, tmp_path)
    )
    np.testing.assert_array_equal(first["logits"], second["logits"])


def killed_after(workdir, step, copy):
    """What a kill -9 leaves that came right after the save of `step`."""
    (copy / "checkpoints/latest").mkdir(parents=True)
    saved = f"checkpoints/latest/{step}"
    shutil.copytree(workdir / saved, copy / saved)
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(workdir / name, copy / name)


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        # Eight validation images can be right more often than before nine times at
        # most: within 12 epochs some evaluation is no gain.
        (
            {
                "train.patience": 1,
                "train.epochs": 12.0,
                "train.eval_every_epochs": 1.0,
            },
            "stopped_early",
        ),
        ({"train.ema": 0.9}, "rule"),
    ],
)
def test_resume_is_exact_with_patience_and_with_averaged_weights(
    tmp_path, changes, last
):
    few = {"train.keep_checkpoints": 20, "tta.k": 0, "mix.name": "none"}
    few |= {"cpe.weight": 0.0, "eval.bootstrap": 5, **changes}
    whole = loop.train(config_of(**few), tmp_path / "whole")
    assert last in whole["selected"]
    steps = [int(p.name) for p in (tmp_path / "whole/checkpoints/latest").iterdir()]
    assert len(steps) > 1 and max(steps) == whole["steps"]
    killed_after(tmp_path / "whole", min(steps), tmp_path / "again")
    again = loop.train(config_of(**few), tmp_path / "again")
    for field in ("steps", "metrics", "curve", "selected"):
        assert again[field] == whole[field], field
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "whole")
    first, second = (
        evaluate.load_predictions(tmp_path / name / "predictions_test.npz")["logits"]
        for name in ("whole", "again")
    )
    np.testing.assert_array_equal(first, second)


def test_host_and_device_residency_give_the_same_run(finished, tmp_path):
    workdir, whole = finished
    config = config_of(**{"data.residency": "host", "train.epochs": 2.0})
    results = loop.train(config, tmp_path)
    for ours, theirs in zip(rows_of(tmp_path), rows_of(workdir), strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=2e-4)
    assert results["time"]["residency"] == "host"


def test_several_steps_per_call_change_nothing(finished, tmp_path):
    workdir, _ = finished
    number = len(rows_of(workdir))
    config = config_of(**{"train.steps_per_call": 2})
    loop.train(config, tmp_path)
    paired = rows_of(tmp_path)
    assert [row["step"] for row in paired] == list(range(2, number + 1, 2))
    single = [row["loss"] for row in rows_of(workdir)]
    means = np.reshape(single, (-1, 2)).mean(1)
    np.testing.assert_allclose([row["loss"] for row in paired], means, rtol=2e-3)


def test_a_damaged_checkpoint_falls_back(finished, tmp_path, capsys):
    workdir, whole = finished
    shutil.copytree(workdir, tmp_path / "run")
    folder = tmp_path / "run/checkpoints/latest"
    steps = sorted(int(p.name) for p in folder.iterdir() if p.is_dir())
    for path in (folder / str(steps[-1])).rglob("*"):
        if path.is_file() and "about" not in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = loop.train(config_of(), tmp_path / "run")
    assert f"at step {steps[0]}" in capsys.readouterr().out
    assert again["metrics"] == whole["metrics"]


def test_eval_mode_reproduces_the_scores(finished, tmp_path):
    workdir, whole = finished
    shutil.copytree(workdir, tmp_path / "run")
    assert loop.score(config_of(), tmp_path / "run")["metrics"] == whole["metrics"]


def test_best_on_validation_is_selected_without_the_test_split(tmp_path):
    config = config_of(
        **{"train.selection": "best_val", "train.eval_every_epochs": 1.0, "tta.k": 0}
    )
    results = loop.train(config, tmp_path)
    scores = {row["step"]: row["val"]["accuracy"] for row in results["curve"]}
    assert scores[results["selected"]["step"]] == max(scores.values())


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"mix.name": "snapmux"}, ["config.mix.name", "snapmux", "snapmix"]),
        ({"data.name": "phantoms"}, ["phantoms", "phantom", "site_b"]),
        ({"model.name": "resnet"}, ["resnet", "resnet50", "tiny"]),
        ({"train.batch_size": 512}, ["config.train.batch_size=512", "lower it"]),
        ({"data.fit": "train+valid"}, ["config.data.fit", "valid", "val"]),
        ({"data.residency": "disk"}, ["config.data.residency", "device", "host"]),
        ({"optim.schedule": "step"}, ["config.optim.schedule", "multistep"]),
        ({"data.image_size": 64}, ["config.data.image_size=64", "config.data.resize"]),
        (
            {"train.selection": "best_val", "data.fit": "train+val"},
            ["best_val", "train+val"],
        ),
    ],
)
def test_errors_name_the_field_and_the_remedy(tmp_path, changes, words):
    with pytest.raises(ValueError) as error:
        loop.train(config_of(**changes), tmp_path)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_period_is_a_step_at_least_and_0_is_never():
    assert [loop.steps_of(e, 3) for e in (0.0, 0.01, 0.33, 1.0, 2.5)] == [0, 1, 1, 3, 8]


def test_a_workdir_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:
        loop.train(config_of(), tmp_path / "file")
    assert "a file where a folder is needed; choose" in disk.explain(error.value)


def test_a_workdir_of_another_config_is_refused(finished):
    workdir, _ = finished
    with pytest.raises(ValueError, match="config.optim.lr_fresh is 0.5 here and"):
        loop.train(config_of(**{"optim.lr_fresh": 0.5}), workdir)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="config.cpe.normalize"):
        loop.train(config_of(**{"optim.lr_fresh": 1e30, "tta.k": 0}), tmp_path)


def test_eval_of_a_mistyped_workdir_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the workdir of a run"):
        loop.score(config_of(), tmp_path / "mistyped")
    assert not any(tmp_path.iterdir())


def test_devices_were_not_changed():
    assert jax.device_count() == 1
