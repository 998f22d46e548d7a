"""The campaign: its jobs, verdicts, learning curves and picture from kept files."""

import json

import numpy as np
import pytest

from cxai_jax.training.results import OPTIMISTIC, versions
from experiments import compare, does_it_work


def plan(**changes):
    options = {
        "data_dir": "data",
        "sites": ["site_b", "site_a"],
        "rows": [*does_it_work.ROWS, *does_it_work.CONTROLS],
        "seeds": [0, 1],
        "folds": 5,
    }
    return does_it_work.plan(does_it_work.PROFILES["cpu"], **options | changes)


def test_whatever_is_finished_is_balanced():
    jobs = plan()
    assert len(jobs) == 2 * 2 * 5 * 8
    assert [job.system for job in jobs[:5]] == [*does_it_work.ROWS, "baseline"]
    assert [job.fold for job in jobs[:8]] == ["1of5"] * 4 + ["2of5"] * 4
    assert {job.seed for job in jobs[:20]} == {0}
    assert {job.config.data.name for job in jobs[:40]} == {"site_b"}
    assert {job.system for job in jobs[80:]} == set(does_it_work.CONTROLS)


def test_rows_differ_in_the_method_alone():
    def fields(job):
        config = job.config.to_dict()
        return {k: config[k] for k in ("data", "train", "augment", "model", "eval")}

    first = plan(folds=2)
    fold = [job for job in first if job.fold == "1of2" and job.seed == 0]
    on_b = [job for job in fold if job.config.data.name == "site_b"]
    assert len(on_b) == 8 and all(fields(j) == fields(on_b[0]) for j in on_b)
    raw = {job.system: job.config for job in on_b}
    for row in ("cpe_raw", "full_raw"):
        assert not raw[row].cpe.normalize and raw[row].optim.clip_norm == 1
    assert raw["full"].cpe.normalize and raw["full"].optim.clip_norm == 0
    assert raw["mixup"].mix.name == "mixup" and raw["mixup"].cpe.weight == 0
    assert raw["cutmix"].mix.name == "cutmix" and raw["cutmix"].cpe.weight == 0
    assert raw["full_raw"].mix.name == "snapmix" and raw["full_raw"].cpe.weight == 1
    assert "val" not in on_b[0].config.data.fit
    assert [row for row in raw if raw[row].tta.k] == [does_it_work.VOTING]
    assert raw["full"].tta.k == 31 and raw["full"].tta.patch == 4


def test_unknown_names_are_one_line():
    with pytest.raises(
        ValueError, match="'fulll' is unknown; known: baseline, cpe, sn"
    ):
        plan(rows=["fulll"])
    with pytest.raises(ValueError, match="'site_c' is unknown; known: site_b, site_a"):
        plan(sites=["site_c"])


def keep(folder, job, right, voted=None, fall=0.1):
    """A run in which the share `right` of 40 images is right."""
    labels = np.arange(40) % 2
    wrong = np.arange(40) >= round(40 * right)
    chosen = np.where(wrong, 1 - labels, labels)
    fold = job.fold[0]
    predictions = {
        "names": np.array([f"{fold}-{i:02d}.png" for i in range(40)]),
        "patients": np.array([""] * 40),
        "labels": labels,
        "sites": np.zeros(40, int),
        "probs": np.eye(2)[chosen],
        "chosen": chosen,
        "voted": chosen if voted is None else np.where(voted, labels, chosen),
        "opposing": np.zeros(40, int),
    }
    data = {
        "name": job.config.data.name,
        "class_names": ["non-COVID-19", "COVID-19"],
        "positive": "COVID-19",
        "site_names": [job.config.data.name],
        "split_scheme": f"fold {job.fold}",
        "fingerprint": "f",
        "leakage": {"verdict": "clean"},
    }
    noise = 0.001 * int(fold)
    curve = [(64, 0.9), (128, 0.8), (192, 0.7), (256, 0.7 - fall + noise)]
    results = {
        "data": data,
        "loss": [0.9, 0.3],
        OPTIMISTIC: None,
        "versions": versions(),
        "device": {"kind": "cpu"},
        "steps": 256,
        "curve": [
            {"step": s, "val": {"accuracy": 0.5, "cross_entropy": c}} for s, c in curve
        ],
    }
    compare.keep(folder / f"{job.name}.json", job, results, predictions)


def test_report_has_verdicts_tables_and_the_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(does_it_work, "RESULTS", tmp_path)
    folder = tmp_path / "cpu"
    right = {"baseline": 0.7, "cpe": 0.7, "snapmix": 0.95, "full": 0.4, "mixup": 0.7}
    for job in plan(sites=["site_b"], seeds=[0], folds=2):
        if job.system in right:
            keep(
                folder, job, right[job.system], fall=0.2 if job.system == "cpe" else 0.0
            )
    does_it_work.main(["--report", "--sites=site_b", "--seeds=0", "--folds=2"])
    said = capsys.readouterr().out
    assert "10 of 16 runs are finished" in said
    assert "CPE helps: not decided, nothing changed: +0.0 (+0.0 to +0.0) point" in said
    assert "over 80 test predictions; a difference of 3.8 would have been seen" in said
    assert "SnapMix helps: reproduced: +25.0" in said and "over 80 test pred" in said
    assert "both together help: refuted: -30.0" in said
    assert "voting helps: not decided, nothing changed: +0.0" in said
    assert "the whole method helps, votes included: refuted: -30.0" in said
    assert "cpe: validation cross-entropy still falling in the last quarter" in said
    found = json.loads((tmp_path / "cpu_site_b_verdicts.json").read_text())
    assert "both together help, CPE as Eq. 1 is written" not in found["claims"]
    rows = json.loads((tmp_path / "cpu_site_b_rows.json").read_text())
    assert rows["images"] == {"0": 80} and rows["runs"] == 8
    assert "| snapmix | 95.0" in (tmp_path / "cpu_site_b_rows.md").read_text()
    assert "| mixup | 70.0" in (tmp_path / "cpu_site_b_mixup.md").read_text()
    assert (tmp_path / "cpu_site_b_rows.tex").exists()
    assert (tmp_path / "cpu_curves.png").stat().st_size > 10_000


def test_controls_of_different_folds_are_compared_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(does_it_work, "RESULTS", tmp_path)
    jobs = plan(sites=["site_b"], seeds=[0], folds=2)
    for job in jobs:
        first = {"mixup": True, "full_raw": False}.get(job.system)
        if job.system == "baseline" or first == (job.fold == "1of2"):
            keep(tmp_path / "cpu", job, 0.7)
    assert "both together help, CPE as Eq. 1 is written" in does_it_work.report(
        jobs, tmp_path / "cpu"
    )
    for row, images in (("rows", 80), ("mixup", 40), ("full_raw", 40)):
        found = json.loads((tmp_path / f"cpu_site_b_{row}.json").read_text())
        assert found["images"] == {"0": images}
    assert not (tmp_path / "cpu_site_b_cutmix.json").exists()


def test_one_wrong_vote_refutes_nothing():
    gain = {"mean": -0.001, "sd": None, "low": -0.004, "high": 0.0, "detectable": 0.004}
    found = does_it_work.judged(gain, {0: {"labels": np.zeros(746)}})
    assert found["verdict"].startswith("not decided: -0.1 (-0.4 to +0.0) points")


def test_a_wide_interval_decides_nothing():
    gain = {"mean": 0.01, "sd": None, "low": -0.02, "high": 0.04, "detectable": 0.043}
    found = does_it_work.judged(gain, {0: {"labels": np.zeros(746)}})
    assert found["verdict"] == (
        "not decided: +1.0 (-2.0 to +4.0) points of accuracy over 746 test "
        "predictions; a difference of 4.3 would have been seen"
    )


def test_no_finished_run_is_no_report(tmp_path):
    assert does_it_work.report(plan(), tmp_path / "cpu") == ""
    assert not list(tmp_path.iterdir())
