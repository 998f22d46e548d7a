"""Several systems: jobs, kept files, pooled folds, paired differences, tables."""

import json

import numpy as np
import pytest

from cxai_jax.training.results import OPTIMISTIC, versions
from experiments import compare, kept_runs, paired


def a_run(labels, positive_probs, patients=None, voted=None, names=None, sites=None):
    labels, p = np.array(labels), np.array(positive_probs, float)
    count = len(labels)
    run = {
        "labels": labels,
        "probs": np.stack([1 - p, p], -1),
        "chosen": (p > 0.5).astype(int),
        "names": np.array(names or [f"{i}.png" for i in range(count)]),
        "patients": np.array([""] * count if patients is None else patients),
        "sites": np.zeros(count, int) if sites is None else np.array(sites),
        "positive": 1,
        "site_names": ["here", "there"] if sites is not None else ["here"],
    }
    return run | ({} if voted is None else {"voted": np.array(voted)})


def compared(**systems):
    return paired.compare({name: dict(enumerate(r)) for name, r in systems.items()})


def test_scores_mean_deviation_and_paired_difference():
    labels = [1, 1, 0, 0]
    good, fair = [0.9, 0.8, 0.1, 0.2], [0.9, 0.4, 0.1, 0.2]  # Accuracy 1 and 0.75.
    table = compared(
        a=[a_run(labels, fair), a_run(labels, good)],
        b=[a_run(labels, good), a_run(labels, good)],
    )
    assert table["a"]["accuracy"]["mean"] == pytest.approx(0.875)
    assert table["a"]["accuracy"]["sd"] == pytest.approx(np.std([0.75, 1], ddof=1))
    assert table["a"]["f1"]["seeds"] == pytest.approx([2 / 3, 1])
    assert table["a"]["recall"]["seeds"] == pytest.approx([0.5, 1])
    assert table["a"]["precision"]["seeds"] == pytest.approx([1, 1])
    assert table["a"]["auc"]["seeds"] == pytest.approx([1, 1])
    assert table["a"]["auprc"]["seeds"] == pytest.approx([1, 1])
    assert table["a"]["balanced_accuracy"]["seeds"] == pytest.approx([0.75, 1])
    assert "difference" not in table["a"]["accuracy"]
    gain = table["b"]["accuracy"]["difference"]
    assert gain["seeds"] == pytest.approx([0.25, 0])
    # Drawing seed 1 twice leaves no difference, seed 0 twice up to one half and more.
    assert gain["low"] == 0 and 0.25 < gain["high"] <= 1
    text = paired.describe(table)
    assert "a" in text.splitlines()
    assert f"detectable {100 * gain['detectable']:.1f}" in text


def test_rates_are_those_of_weighted_counts():
    rng = np.random.default_rng(0)
    labels, chosen = rng.integers(0, 2, (2, 30))
    weights = rng.integers(0, 4, (5, 30))
    found = paired.decisions(weights, labels, chosen, positive=1)
    for row, weight in enumerate(weights):
        y, z = np.repeat(labels, weight), np.repeat(chosen, weight)
        hits = np.sum(y * z)
        recalls = [np.mean(z[y == label] == label) for label in (0, 1)]
        expected = (np.mean(y == z), np.mean(recalls))
        expected += (hits / z.sum(), hits / y.sum())
        expected += (2 * hits / (y.sum() + z.sum()),)
        assert [found[name][row] for name in paired.RATES] == pytest.approx(expected)


def test_the_detectable_difference_is_that_of_a_paired_z_test():
    # Of 400 images 40 are right only with b, 20 only with a.
    labels = np.ones(400, int)
    a, b = np.full(400, 0.9), np.full(400, 0.9)
    a[:40] = 0.1
    b[40:60] = 0.1
    gain = compared(a=[a_run(labels, a)], b=[a_run(labels, b)])["b"]["accuracy"]
    per_image = np.r_[np.ones(40), -np.ones(20), np.zeros(340)]
    error = per_image.std() / 20
    assert gain["difference"]["mean"] == pytest.approx(0.05)
    assert gain["difference"]["detectable"] == pytest.approx(2.8 * error, rel=0.06)
    assert gain["difference"]["low"] == pytest.approx(0.05 - 1.96 * error, abs=0.004)


def test_the_interval_holds_the_seeds_too():
    # Every image behaves alike, so that only the seeds vary.
    labels = np.ones(50, int)
    right, wrong = a_run(labels, np.full(50, 0.9)), a_run(labels, np.full(50, 0.1))
    table = compared(a=[wrong, wrong], b=[right, wrong])
    gain = table["b"]["accuracy"]["difference"]
    assert (gain["mean"], gain["low"], gain["high"]) == (0.5, 0, 1)
    assert gain["detectable"] == pytest.approx(2.8 * np.sqrt(1 / 8), rel=0.05)


def test_interval_resamples_whole_patients():
    # Two patients, one right and one wrong: a resample has accuracy 0, a half or 1.
    labels, probs = [1] * 50 + [0] * 50, [0.9] * 100
    patients = ["p"] * 50 + ["q"] * 50
    whole = compared(a=[a_run(labels, probs, patients)])
    single = compared(a=[a_run(labels, probs)])
    assert (whole["a"]["accuracy"]["low"], whole["a"]["accuracy"]["high"]) == (0, 1)
    assert single["a"]["accuracy"]["low"] > 0.35
    assert whole["a"]["accuracy"]["sd"] is None  # One seed says nothing about it.


def test_difference_of_equal_systems_is_zero_in_every_resample():
    runs = [a_run([1, 0, 1, 0], [0.9, 0.8, 0.4, 0.1])]
    gain = compared(a=runs, b=runs)["b"]["f1"]["difference"]
    assert (gain["mean"], gain["low"], gain["high"], gain["detectable"]) == (0,) * 4


def test_votes_and_sites_are_scored_where_there_are_some():
    run = a_run([0, 1, 1], [0.9, 0.9, 0.4], voted=[0, 1, 0], sites=[0, 0, 1])
    table = compared(a=[run])["a"]
    assert table["accuracy"]["mean"] == pytest.approx(1 / 3)
    assert table["accuracy after voting"]["mean"] == pytest.approx(2 / 3)
    assert table["gain in accuracy by voting"]["mean"] == pytest.approx(1 / 3)
    assert table["accuracy, here"]["mean"] == 0.5
    assert table["accuracy, there"]["mean"] == 0
    assert table["gain in accuracy by voting, here"]["mean"] == 0.5
    assert "auc after voting" not in table


def test_systems_must_share_their_test_images():
    one, other = a_run([1, 0], [0.9, 0.1]), a_run([1, 0], [0.9, 0.1], names=["x", "y"])
    with pytest.raises(ValueError, match="b were tested on different images"):
        compared(a=[one], b=[other])


def test_folds_are_pooled_and_overlap_is_an_error():
    one = a_run([1, 0], [0.9, 0.1], names=["c", "a"])
    two = a_run([1], [0.4], names=["b"])
    pooled = paired.pool([one, two])
    assert pooled["names"].tolist() == ["a", "b", "c"]
    assert pooled["chosen"].tolist() == [0, 0, 1] and pooled["positive"] == 1
    with pytest.raises(ValueError, match="'b' was tested in two folds"):
        paired.pool([two, two])


def test_networks_are_averaged_before_they_decide():
    labels = [1, 1, 0]
    runs = {  # Each errs once, where the other is surer.
        3: a_run(labels, [0.9, 0.4, 0.1], voted=[1, 0, 0]),
        5: a_run(labels, [0.45, 0.8, 0.3], voted=[0, 1, 0]),
    }
    (seed,), (run,) = zip(*paired.averaged(runs).items(), strict=True)
    assert seed == "all" and "voted" not in run
    np.testing.assert_allclose(run["probs"][:, 1], [0.675, 0.6, 0.2])
    table = paired.compare({"one": runs, "both": {seed: run}})
    assert table["one"]["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert table["both"]["accuracy"]["mean"] == 1
    assert "difference" not in table["both"]["accuracy"]
    assert "both" in paired.describe(table)
    with pytest.raises(ValueError, match="different test images cannot be averaged"):
        paired.averaged({0: runs[3], 1: a_run(labels, [0, 0, 0], names=list("xyz"))})


def test_only_what_all_systems_have_finished_is_compared():
    def cell(name):
        return a_run([1], [0.9], names=[name])

    every = {(s, f): cell(f) for s in (0, 1) for f in ("1of2", "2of2")}
    part = {key: run for key, run in every.items() if key != (1, "2of2")}
    runs = compare.balanced({"a": every, "b": part})
    assert {s: list(by_seed) for s, by_seed in runs.items()} == {"a": [0], "b": [0]}
    assert runs["b"][0]["names"].tolist() == ["1of2", "2of2"]
    with pytest.raises(
        ValueError, match="a, b have no finished fold and seed in commo"
    ):
        compare.balanced({"a": {(0, "1of2"): cell("x")}, "b": {(0, "2of2"): cell("y")}})


def test_tables_hold_every_row_and_the_detectable_difference():
    labels = [1, 1, 0, 0]
    table = compared(
        base_line=[a_run(labels, [0.9, 0.4, 0.1, 0.2], voted=[1, 1, 0, 0])],
        full=[a_run(labels, [0.9, 0.8, 0.1, 0.2], voted=[1, 1, 0, 0])],
    )
    text = paired.markdown(paired.pages(table))
    detectable = 100 * table["full"]["accuracy"]["difference"]["detectable"]
    assert f"[{detectable:.1f}]" in text and "| full | 100.0 (100.0 to 100.0)" in text
    assert "**Gain by voting [smallest detectable]**" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = [i for i, line in enumerate(lines) if line.startswith("|---")]
    assert all(lines[i].count("---") == lines[i - 1].count(" | ") + 1 for i in heads)
    latex = paired.latex(paired.pages(table))
    assert r"base\_line & 75.0" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 5


def test_a_system_is_rows_and_fields():
    file = "configs/siteB.py"
    config = compare.make_config(
        file, "full,short+cam.mode=eval+cpe.weight=1", ["seed=3", "model.name=tiny"]
    )
    assert (config.cam.mode, config.cpe.weight, config.seed) == ("eval", 1.0, 3)
    assert config.model.name == "tiny" and config.train.epochs == 12
    with pytest.raises(
        ValueError, match="'cam.mod=eval' is not FIELD=VALUE .*cam.mode"
    ):
        compare.make_config(file, "full+cam.mod=eval", [])
    with pytest.raises(ValueError, match="seed is like 0, not 'three'"):
        compare.make_config(file, "full", ["seed=three"])
    with pytest.raises(ValueError, match="no row 'ful'"):
        compare.make_config(file, "ful", [])


def test_a_value_may_hold_a_plus_and_text_may_look_like_numbers():
    config = compare.make_config(
        "configs/siteB.py",
        "full+data.fit=train+val+mix.prob=0.5",
        ["train.class_weights=1,3", "data.fold='2of5'"],
    )
    assert (config.data.fit, config.mix.prob) == ("train+val", 0.5)
    assert config.train.class_weights == "1,3" and config.data.fold == "2of5"


@pytest.mark.parametrize("size", [28, 64, 96, 112, 128, 144, 152, 160, 224, 256])
def test_cells_divide_the_image(size):
    fields = dict(field.split("=") for field in compare.sized(size))
    patch = int(fields["tta.patch"])
    assert size % patch == 0 and 19 <= size // patch <= 38
    if size % 28 == 0:
        assert size // patch == 28


def test_fewer_than_two_folds_are_one_line():
    for folds in (-1, 0, 1):
        with pytest.raises(ValueError, match=f"--folds={folds}; expected 2 or more"):
            compare.fold_names(folds)
    assert compare.fold_names(None) == [""]


def jobs(systems=("baseline", "full"), seeds=(0,), folds=2, fields=()):
    return compare.plan(
        "configs/demo.py",
        {system: system for system in systems},
        seeds=seeds,
        folds=compare.fold_names(folds),
        fields=fields,
    )


def test_jobs_go_seed_by_seed_and_fold_by_fold():
    planned = jobs(seeds=(0, 1))
    assert [job.name for job in planned[:3]] == [
        "phantom_baseline_1of2_s0",
        "phantom_full_1of2_s0",
        "phantom_baseline_2of2_s0",
    ]
    assert [job.config.seed for job in planned] == [0] * 4 + [1] * 4
    single = jobs(("full+mix.prob=0.5",), folds=None)[0]
    assert single.name == "phantom_full_mix.prob=0.5_s0" and single.fold == ""
    lite = compare.plan(
        "configs/siteB.py",
        {"a": "baseline"},
        seeds=[0],
        folds=[""],
        fields=compare.sized(112),
        backbone="lite0",
    )[0].config
    assert lite.model.pretrained == "lite0-imagenet"
    assert (lite.data.image_size, lite.data.resize, lite.tta.patch) == (112, 120, 4)


def predictions(count=500):
    rng = np.random.default_rng(0)
    p = rng.random(count)
    return {
        "names": np.array([f"non-COVID/Non-Covid ({i}).png" for i in range(count)]),
        "patients": np.array([f"medpix_patient_{i // 2}" for i in range(count)]),
        "labels": rng.integers(0, 2, count),
        "sites": np.zeros(count, int),
        "probs": np.stack([1 - p, p], -1),
        "chosen": (p > 0.5).astype(int),
        "voted": (p > 0.6).astype(int),
        "opposing": rng.integers(0, 31, count),
    }


def results(fingerprint="f" * 64):
    return {
        "data": {
            "name": "phantom",
            "class_names": ["healthy", "ill"],
            "positive": "ill",
            "site_names": ["here"],
            "split_scheme": "fold 1 of 2, patient-disjoint",
            "fingerprint": fingerprint,
            "counts": {"test": 500},
            "leakage": {"verdict": "clean", "pairs": {"many": "things"}},
        },
        "versions": versions(),
        "device": {"kind": "cpu", "count": 1, "hosts": 1},
        "steps": 100,
        "curve": [
            {
                "step": s,
                "val": {"accuracy": 0.5 + s / 1e3, "cross_entropy": 0.7, "f1": 0},
            }
            for s in range(10, 101, 10)
        ],
        "loss": [0.9, 0.3],
        OPTIMISTIC: 0.75,
        "time": {"total_s": 61.4},
    }


def test_a_run_of_500_images_is_kept_in_less_than_20_kb(tmp_path):
    job, path = jobs()[0], tmp_path / "some" / "run.json"
    compare.keep(path, job, results(), predictions())
    assert path.stat().st_size < 20_000
    kept, given = kept_runs.read(path), predictions()
    for name in given.keys() - {"probs"}:
        assert kept["predictions"][name].tolist() == given[name].tolist()
    rounded = kept["predictions"]["probs"]
    np.testing.assert_allclose(rounded, given["probs"], atol=0.00005 + 1e-12)
    assert kept["curve"]["accuracy"][0] == 0.51 and kept["seconds"] == 61
    assert "data_dir" not in kept["config"]["data"]
    assert kept["data"]["leakage"] == "clean"
    assert kept["loss"] == [0.9, 0.3] and kept["best test epoch"] == 0.75


def wanted(job, **changes):
    return {
        "config": compare.config_of(job),
        "versions": versions(),
        "fingerprint": "f" * 64,
    } | changes


def test_a_file_of_another_run_is_refused_in_one_line(tmp_path):
    job, path = jobs()[0], tmp_path / "run.json"
    compare.keep(path, job, results(), predictions(4))
    kept = kept_runs.read(path)
    kept_runs.check(path, kept, wanted(job))
    spoken = ["data.data_dir=elsewhere", "train.log_every_steps=1"]
    spoken += ["train.checkpoint_every_minutes=3", "train.on_nan=skip"]
    kept_runs.check(path, kept, wanted(jobs(fields=spoken)[0]))
    longer = jobs(fields=["train.epochs=41"])[0]
    with pytest.raises(
        ValueError,
        match=r"run.json is of another run: config.train.epochs is 41.0 here and 40.0 "
        r"there\. Delete it, or keep the new runs in another folder$",
    ):
        kept_runs.check(path, kept, wanted(longer))
    newer = versions() | {"cxai-jax": "9.9"}
    with pytest.raises(ValueError, match=r"it is of cxai-jax 0.*, this is 9\.9\. Dele"):
        kept_runs.check(path, kept, wanted(job, versions=newer))
    with pytest.raises(ValueError, match=r"images or folds are others \(data finger"):
        kept_runs.check(path, kept, wanted(job, fingerprint="0" * 64))
    old = json.loads(path.read_text()) | {"format": 0}
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="has the format 0, this version reads 1; del"):
        kept_runs.read(path)
    path.write_text(json.dumps(old | {"format": 1, "predictions": "!!"}))
    with pytest.raises(ValueError, match="its predictions are damaged .*delete it"):
        kept_runs.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no file of a run .*delete it to run it a"):
        kept_runs.read(path)


def test_a_field_that_came_later_has_its_old_meaning(tmp_path):
    job, path = jobs(folds=None)[0], tmp_path / "run.json"
    compare.keep(path, job, results(), predictions(4))
    kept = kept_runs.read(path)
    del kept["config"]["data"]["fold"]
    kept_runs.check(path, kept, wanted(job))


def test_files_of_another_run_are_in_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    for job in jobs(("baseline",), folds=None):
        path = tmp_path / "small" / f"{job.name}.json"
        compare.keep(path, job, results(), predictions())
    command = ["configs/demo.py", "--rows", "baseline", "--seeds=0", "--name=small"]
    compare.main([*command, "--list"])
    assert not (tmp_path / "small.json").exists()
    with pytest.raises(SystemExit, match=r"config.train.epochs is 7.0 here and"):
        compare.finished(jobs(("baseline",), folds=None), tmp_path / "small")
        monkeypatch.setattr(compare, "run_all", lambda *args, **options: None)
        compare.main([*command, "--epochs=7"])
    assert not (tmp_path / "small.json").exists()
    kept = json.loads(path.read_text())
    del kept["versions"]
    path.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="is no file of a run .it lacks 'versions'."):
        compare.finished(jobs(("baseline",), folds=None), tmp_path / "small")


def test_neighbouring_slices_of_site_a_are_drawn_together():
    names = [f"COVID/Covid ({i}).png" for i in (1, 19, 20)]
    names += ["non-COVID/Non-Covid (1).png", "a.png", "b.png"]
    found = {
        "names": np.array(names),
        "patients": np.array(["", "", "", "", "p", ""]),
        "sites": np.array([0, 0, 0, 0, 1, 1]),
    }
    stacks = compare.stacks(found, ["site_a", "site_b"]).tolist()
    assert stacks == [
        *["COVID/Covid stack 0"] * 2,
        "COVID/Covid stack 1",
        "non-COVID/Non-Covid stack 0",
        "p",
        "",
    ]


def test_validation_images_of_several_folds_are_pooled(tmp_path):
    planned = jobs(("baseline",), fields=["data.test=val"])
    for job in planned:  # The same images in both.
        path = tmp_path / f"{job.name}.json"
        compare.keep(path, job, results(), predictions())
    cells = compare.finished(planned, tmp_path)
    (pooled,) = compare.balanced(cells)["baseline"].values()
    assert len(pooled["names"]) == 1000 and len(set(pooled["patients"])) == 250
    assert pooled["names"][0].startswith("1of2 non-COVID/")


def test_a_campaign_goes_on_and_does_not_repeat(tmp_path, monkeypatch):
    ran = []

    def run(config, workdir):
        ran.append((config.data.fold, config.mix.name))
        if (config.data.fold, config.mix.name) == ("2of2", "none") and len(ran) < 4:
            raise FloatingPointError("the loss is nan")
        workdir.mkdir(parents=True)
        return results(f"print of {config.data.fold}"), predictions(4)

    class Loaded:
        def __init__(self, fold):
            self.fingerprint = f"print of {fold}"

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(compare.data, "load", lambda given: Loaded(given.fold))
    planned, said = jobs(), []
    place = (tmp_path / "kept", tmp_path / "out")
    compare.run_all(planned, *place, minutes=0, say=said.append)
    assert ran == [] or len(ran) == 1  # Only if no time at all has passed.
    assert "0 minutes are over" in said[-1]
    compare.run_all(planned, *place, say=said.append)
    assert any("baseline_2of2_s0 FAILED: the loss is nan" in text for text in said)
    assert "3 of 4 runs are finished" in compare.listed(planned, place[0])
    assert "baseline                 seed 0: 1of2 -" in compare.listed(
        planned, place[0]
    )
    before = len(ran)
    compare.run_all(planned, *place, say=said.append)
    assert ran[before:] == [("2of2", "none")]
    assert not any(place[1].glob("phantom*"))  # Workdirs go when the file is there.
    other = jobs(fields=["train.epochs=1"])
    with pytest.raises(ValueError, match="is of another run: config.train.epochs"):
        compare.run_all(other, *place, say=said.append)


@pytest.mark.slow
def test_the_seeds_networks_are_averaged_on_demand(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    command = ["configs/demo.py", "--rows", "baseline", "--seeds=0,1", "--name=small"]
    for job in jobs(("baseline",), seeds=(0, 1), folds=None):
        compare.keep(
            tmp_path / "small" / f"{job.name}.json", job, results(), predictions()
        )
    monkeypatch.setattr(compare, "run_all", lambda *args, **options: None)
    for flags, names in (
        ([], ["baseline"]),
        (["--average"], ["baseline", "baseline, 2 networks averaged"]),
    ):
        compare.main([*command, *flags])
        table = json.loads((tmp_path / "small.json").read_text())["table"]
        assert list(table) == names


def test_two_folds_of_a_real_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RESULTS", tmp_path / "results")
    command = ["configs/demo.py", "--rows", "baseline", "--folds=2", "--seeds=0"]
    command += [f"--out={tmp_path / 'runs'}", "--name=small", "--epochs=1", "--size=32"]
    command += ["--set", "data.phantom_images=96", "tta.k=3", "tta.patch=4"]
    compare.main(command)
    table = json.loads((tmp_path / "results" / "small.json").read_text())
    assert table["images"] == {"0": 96} and table["runs"] == 2
    sites = [
        s for s in table["table"]["baseline"] if s.startswith("accuracy after voting")
    ]
    assert len(sites) == 3  # Of all images and of each site.
    kept = sorted((tmp_path / "results" / "small").glob("*.json"))
    assert [path.name for path in kept] == [
        "phantom_baseline_1of2_s0.json",
        "phantom_baseline_2of2_s0.json",
    ]
    times = [path.stat().st_mtime for path in kept]
    compare.main(command)  # Nothing is repeated.
    assert times == [path.stat().st_mtime for path in kept]
    assert "2 of 2 runs are finished" in capsys.readouterr().out
