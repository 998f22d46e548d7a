"""External validation: fixed thresholds, overlap, both sites on a page, own files."""

import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO
from PIL import Image
from untrained_run import make_run

from cxai_jax import data
from cxai_jax.config import read_config
from cxai_jax.data import folder, store
from cxai_jax.inference.external import parse, score_external
from cxai_jax.inference.predictor import load
from cxai_jax.report.terminal import summary
from cxai_jax.scoring import calibration
from cxai_jax.writer import write_json

COPIED = 3  # Images of the other hospital that were trained on.


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """(root, config, workdir): a run, and `folder:b`, part of it known to the run."""
    root = tmp_path_factory.mktemp("external")
    config, train = make_run(root / "run")
    config.data.data_dir = str(root / "data")
    dataset = data.load(config.data)
    test = dataset.splits["test"]
    rows = [(test, i) for i in range(len(test))] + [(train, i) for i in range(COPIED)]
    for number, (records, i) in enumerate(rows):
        name = dataset.class_names[records.labels[i]]
        file = root / "b" / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(records.images[i][..., 0]).save(file)
    plan = folder.plan_folder(
        root / "b", "b", dataset.class_names[dataset.positive], "test"
    )
    store.build(plan, root / "data")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 2)), rng.integers(0, 2, 60)
    fitted = calibration.fit(logits, labels, positive=dataset.positive)
    results = json.loads((root / "run" / "results.json").read_text())
    results["data"] |= {"name": "phantom"}
    results["calibration"] = calibration.measure(
        fitted, logits, labels, positive=dataset.positive
    )
    write_json(root / "run" / "results.json", results)
    return root, config, root / "run"


def digests(workdir):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(workdir.rglob("*"))
        if path.is_file() and "eval" not in path.parts
    }


def test_another_hospital_is_scored_with_what_the_run_fixed(hospital):
    root, config, workdir = hospital
    before = digests(workdir)
    out, results = score_external(config, workdir, "folder:b")
    assert out == workdir / "eval" / "b" and digests(workdir) == before
    assert json.loads((out / "results.json").read_text())["on"] == "folder:b"
    number = results["metrics"]["all"]["number"]
    assert number == len(data.load(config.data).splits["test"]) + COPIED
    assert set(results["metrics"]["all"]["intervals"]) >= {"accuracy", "auc"}
    # The overlap is what was copied.
    assert results["overlap"]["seen_in_training"] == COPIED
    assert f"LEAKS: {COPIED} of {number}" in results["overlap"]["verdict"]
    # Thresholds and temperature are the run's; the rates are those of these images.
    own = json.loads((workdir / "results.json").read_text())["calibration"]
    with np.load(out / "predictions.npz") as found:
        logits, labels = found["logits"], found["labels"]
    scaled = np.exp(logits.astype(np.float64) / own["temperature"])
    positive = load(workdir).positive
    score = (scaled / scaled.sum(1, keepdims=True))[:, positive]
    for point, mine in zip(
        results["calibration"]["operating_points"], own["operating_points"], strict=True
    ):
        assert point["threshold"] == mine["threshold"]
        called = score >= mine["threshold"]
        assert point["sensitivity"] == pytest.approx(called[labels == positive].mean())
    for row, mine in zip(
        results["calibration"]["conformal"], own["conformal"], strict=True
    ):
        assert row["quantile"] == mine["quantile"]
    page = (out / "report.html").read_text()
    assert "Both data sets side by side" in page and "phantom (its own test)" in page
    assert "b (external)" in page and "Positive class: " in page
    told = summary(results)
    assert re.search(r"b, .*all for testing\), \d+ images", told) and "LEAKS: 3" in told


def test_splits_of_the_other_data(hospital):
    _, config, workdir = hospital
    out, results = score_external(read_config(workdir), workdir, "phantom:val")
    assert out.name == "phantom@val"
    count = len(data.load(config.data).splits["val"])
    assert results["metrics"]["all"]["number"] == count
    assert results["overlap"]["seen_in_training"] == 0
    with pytest.raises(ValueError, match="names the split 'odd'; phantom has train"):
        score_external(read_config(workdir), workdir, "phantom:odd")


@pytest.mark.parametrize(
    "on,place",
    [
        ("folder:b", ("folder:b", "test", "b")),
        ("folder:b:val+test", ("folder:b", "val+test", "b@val+test")),
        ("folder:b_val", ("folder:b_val", "test", "b_val")),
        ("site_b", ("site_b", "test", "site_b")),
        ("site_b:train", ("site_b", "train", "site_b@train")),
        ("tfds:chest", ("tfds:chest", "test", "tfds@chest")),
        ("tfds:chest:val", ("tfds:chest", "val", "tfds@chest@val")),
    ],
)
def test_what_on_names(on, place):
    assert parse(on) == (*place, "")


def test_the_path_of_a_prepared_data_set(hospital, tmp_path, monkeypatch):
    root, config, workdir = hospital
    config = config.copy_and_resolve_references()
    config.data.data_dir = str(tmp_path / "none")
    out, results = score_external(config, workdir, f"{root}/data/b:test")
    assert out == workdir / "eval" / "b" and results["data"]["name"] == "b"
    monkeypatch.chdir(root / "data")
    assert parse("b:val") == ("folder:b", "val", "b@val", str(root / "data"))
    monkeypatch.chdir("b")
    assert parse(".") == ("folder:b", "test", "b", str(root / "data"))
    summary = tmp_path / "site_b" / "official" / "1.0.0" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.touch()  # Of a data set with a name of its own.
    place = ("site_b", "test", "site_b", str(tmp_path))
    assert parse(f"{tmp_path}/site_b/") == place


@pytest.mark.parametrize(
    "on", ["", "nowhere", "site_b:a:b", "site_b:", "runs/b", "tests", "tfds:a:b:c"]
)
def test_what_is_no_data_set(on, monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(ValueError, match=f"^--on={on}: name a prepared data set"):
        parse(on)


def test_other_classes_are_refused(hospital):
    root, config, workdir = hospital
    for name in ("healthy", "sick"):
        (root / "c" / name).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 99, (30, 30), np.uint8)
            Image.fromarray(pixels).save(root / "c" / name / f"{i}.png")
    store.build(folder.plan_folder(root / "c", "c", split="test"), root / "data")
    with pytest.raises(ValueError, match="--on=folder:c has the classes healthy, sick"):
        score_external(config, workdir, "folder:c")
    with pytest.raises(FileNotFoundError, match="--dataset=folder --name=none"):
        score_external(config, workdir, "folder:none")
    assert not (workdir / "eval" / "c").exists()


def test_the_command_needs_a_run(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "cxai_jax.main", "--mode=eval", "--on=folder:b"],
        cwd=REPO,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and run.stderr.strip().splitlines()[-1] == (
        "error: --on=NAME scores a finished run on other data; give --mode=eval and "
        "--workdir=RUN with it"
    )
