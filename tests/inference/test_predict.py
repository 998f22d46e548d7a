"""The predict command end to end on a small untrained network, and what feeds it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPO
from PIL import Image
from untrained_run import make_run

from cxai_jax import predict
from cxai_jax.data import (
    folder,
    inputs,
    novelty,
    pipeline,
    store,
)
from cxai_jax.data.augment import PER_IMAGE, normalise
from cxai_jax.inference import predictor, shown_maps
from cxai_jax.maps import cam, saliency
from cxai_jax.mesh import make_mesh
from cxai_jax.models import tiny
from cxai_jax.report import pictures
from cxai_jax.scoring.evaluate import Evaluator
from cxai_jax.training.run import build_network
from cxai_jax.voting import rules
from cxai_jax.voting.forward import make_predict_step


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, config, training records) of an untrained run."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, *make_run(workdir)


@pytest.fixture(scope="module")
def scans(run, tmp_path_factory):
    """A folder with nine scans, the first one from the training split."""
    folder = tmp_path_factory.mktemp("scans")
    random = np.random.default_rng(0)
    pictures = [run[2].images[0][..., 0]]
    pictures += [random.integers(0, 255, (40, 50), np.uint8) for _ in range(8)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i} <b>.png")
    return folder


def command(run, out, *more):
    return predict.main([f"--workdir={run[0]}", f"--out={out}", *map(str, more)])


def table(out):
    with (out / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(run, scans, tmp_path_factory):
    """The output of an uninterrupted prediction of `scans`."""
    out = tmp_path_factory.mktemp("whole")
    assert command(run, out, "--images", scans) == 0
    return out


def test_the_predict_step_runs_every_mask(run):
    model = predictor.load(run[0])
    images = np.stack([run[2].images[i][:32, :32] for i in range(2)])
    step = jax.jit(make_predict_step(model.model, model.scale, model.config.tta))
    out = step(model.variables, images)
    x = normalise(images, model.scale.mean, model.scale.std)
    logits, seen = model.model.apply(model.variables, x, "eval")
    maps = cam.of_class(seen.class_maps, logits.argmax(-1))
    cells = rules.rank_cells(maps, grid=4, k=3, patch=8)
    variants = rules.masked_images(x, cells, grid=4, fill="min")
    masked, _ = model.model.apply(
        model.variables, variants.reshape(-1, 32, 32, 3), "eval"
    )
    expected = np.exp(masked) / np.exp(masked).sum(-1, keepdims=True)
    assert out["probs"].shape == (2, 4, 2)
    np.testing.assert_allclose(out["probs"], expected.reshape(2, 4, 2), atol=1e-5)
    np.testing.assert_allclose(out["logits"], logits, atol=1e-4)


def test_early_exit_gives_the_labels_of_the_full_pass(run):
    model = predictor.load(run[0])
    images = np.random.default_rng(3).integers(0, 255, (3, 32, 32, 1), np.uint8)
    mesh = make_mesh()
    early = predictor.Predictor(model, mesh)(images)
    model.config.tta.early_exit = False
    full = predictor.Predictor(model, mesh)(images)
    np.testing.assert_array_equal(early.after, full.after)
    np.testing.assert_array_equal(early.before, full.before)
    np.testing.assert_allclose(early.probs, full.probs, atol=1e-5)
    assert (early.cast <= full.cast).all() and (full.cast == 3).all()
    assert early.class_maps.shape == full.class_maps.shape


def test_images_normalised_by_themselves_vote_alike_at_any_brightness(run):
    config = run[1].copy_and_resolve_references()
    config.data.normalisation = "per_image"
    assert build_network(config, 2, abstract=True).scale == PER_IMAGE
    model = predictor.load(run[0])._replace(scale=PER_IMAGE)
    dark = np.random.default_rng(3).integers(0, 127, (3, 32, 32, 1), np.uint8)
    voter = predictor.Predictor(model, make_mesh())
    one, other = voter(dark), voter(2 * dark + 1)
    np.testing.assert_allclose(one.probs, other.probs, atol=1e-5)
    np.testing.assert_allclose(one.class_maps, other.class_maps, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(one.after, other.after)
    assert len(np.unique(one.probs)) > 2


def test_everything_is_written(whole, scans):
    rows = table(whole)
    assert [row["file"] for row in rows] == sorted(map(str, scans.iterdir()))
    for row in rows:
        assert row["error"] == "" and 0 <= float(row["probability"]) <= 1
        assert row["label"] in ("COVID-19", "non-COVID-19")
        assert int(row["opposing_votes"]) <= int(row["votes_cast"]) <= 3
        with Image.open(whole / row["overlay"]) as overlay:
            image, mapped = pictures.halves(np.asarray(overlay))
            assert image.shape == mapped.shape and len(image) <= 50
            colour = np.ptp(image.astype(int), axis=2)  # JPEG: blocks share one.
            assert np.median(colour) <= 1 and colour.mean() < 3
    assert "seen in training" in rows[0]["flags"]
    assert not any("seen in training" in row["flags"] for row in rows[1:])
    page = (whole / "report.html").read_text()
    assert page.count("<tr data-tags=") == 9
    assert page.count("&lt;b&gt;.png</a>") == 9


def test_overlays_of_some_or_of_none(run, scans, whole, tmp_path):
    """What is not drawn has a row and a place on the page, without pictures."""
    expected = table(whole)
    for overlays in ("flagged", "none"):
        out = tmp_path / overlays
        told = [f"--overlays={overlays}", "--images", scans]
        assert command(run, out, *told) == 0
        rows = table(out)
        drawn = [bool(row["overlay"]) for row in rows]
        assert drawn == [overlays == "flagged" and bool(row["flags"]) for row in rows]
        assert len(list((out / "overlays").iterdir())) == sum(drawn)
        for row, whole_row in zip(rows, expected, strict=True):
            assert row | {"overlay": ""} == whole_row | {"overlay": ""}
        page = (out / "report.html").read_text()
        assert page.count('<img src="data:image/jpeg') == sum(drawn)
        assert page.count("<tr data-tags=") == 9
    flagged = [bool(row["flags"]) for row in expected]
    assert 0 < sum(flagged)


def test_a_file_scores_the_same_in_a_data_set_and_alone(run, tmp_path, monkeypatch):
    """One path from file to network input (A18): the same bytes, the same scores."""
    random = np.random.default_rng(4)
    shapes = [(40, 50), (300, 420), (700, 256), (31, 90, 3)]
    for i, shape in enumerate(shapes * 2):
        file = tmp_path / "files" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(90, 125, shape, np.uint8)).save(file)
    plan = folder.plan_folder(tmp_path / "files", name="scans", positive="b")
    store.build(plan, tmp_path / "data")
    splits = store.load("scans", plan.split, tmp_path / "data").splits
    model, fed, call = predictor.load(run[0]), [], predictor.Predictor.__call__
    evaluator = Evaluator(model.model, model.scale, model.config, make_mesh())

    def recorded(self, images):
        fed.extend(images)
        return call(self, images)

    monkeypatch.setattr(predictor.Predictor, "__call__", recorded)
    assert command(run, tmp_path / "out", "--images", tmp_path / "files") == 0
    rows = table(tmp_path / "out")
    names = [os.path.relpath(row["file"], tmp_path / "files") for row in rows]
    alone = dict(zip(names, zip(fed, rows, strict=True), strict=True))
    scored = 0
    for records in splits.values():
        found = evaluator.predict(model.variables, records)
        fit = pipeline.fit_for_scoring(model.config)
        for i, name in enumerate(records.names):
            image, row = alone[str(name)]
            np.testing.assert_array_equal(image, fit(records.images[i]))
            probability = found["probs"][i, 0, model.positive]
            assert float(row["probability"]) == pytest.approx(probability, abs=2e-6)
            scored += 1
    assert scored == len(fed) == 8


def test_a_file_is_prepared_as_data_of_their_own_size_are(run, tmp_path, monkeypatch):
    """Digits are stored as they are and in colour: a file is then, too."""
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)
    written = json.loads((workdir / "config.json").read_text())
    written["data"]["name"] = "mnist"
    (workdir / "config.json").write_text(json.dumps(written))
    random, fed, call = np.random.default_rng(5), [], predictor.Predictor.__call__
    stored = [random.integers(0, 255, (28, 28), np.uint8)]
    stored.append(random.integers(0, 255, (40, 40, 3), np.uint8))
    for name, image in zip("ab", stored, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")

    def recorded(self, images):
        fed.extend(images)
        return call(self, images)

    monkeypatch.setattr(predictor.Predictor, "__call__", recorded)
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    out = tmp_path / "out"
    assert command((workdir,), out, "--map=occlusion", "--images", *files) == 0
    fit = pipeline.fit_for_scoring(run[1])
    stored[0] = np.repeat(stored[0][..., None], 3, axis=2)
    for image, expected in zip(fed, stored, strict=True):
        np.testing.assert_array_equal(image, fit(expected))


def test_an_output_that_is_a_file_is_refused(run, scans, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(SystemExit) as stopped:
            command(run, out, "--images", scans)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert f"--out={out}: there is a file where a folder is needed" in error


def test_an_image_without_finite_probabilities_is_an_error(
    run, scans, tmp_path, monkeypatch, capsys
):
    call = predictor.Predictor.__call__

    def broken(self, images):
        found = call(self, images)
        probs = found.probs.copy()
        probs[1] = np.nan
        return found._replace(probs=probs)

    monkeypatch.setattr(predictor.Predictor, "__call__", broken)
    files = sorted(scans.iterdir())[:4]
    assert command(run, tmp_path, "--images", *files) == 1
    rows = {row["file"]: row for row in table(tmp_path)}
    assert len(rows) == 4
    bad = rows[str(files[1])]
    assert "probabilities are not finite" in bad["error"] and not bad["probability"]
    assert all(rows[str(f)]["error"] == "" for i, f in enumerate(files) if i != 1)
    said = capsys.readouterr()
    assert f"error: {files[1]}: the network's" in said.err
    assert "4 files found: 3 predicted, 1 failed, 0 ignored;" in said.out


def test_every_column_is_explained(whole):
    explained = (REPO / "experiments" / "README.md").read_text(encoding="utf-8")
    for column in table(whole)[0]:
        name = "p_CLASS" if column.startswith("p_") else column
        assert f"`{name}`" in explained, column
    assert "`label@SITE`, `p_CLASS@SITE`" in explained


@pytest.fixture(scope="module")
def run_of_sites(tmp_path_factory):
    """As `run`, with norms of each site."""
    workdir = tmp_path_factory.mktemp("run_of_sites")
    return workdir, *make_run(workdir, norm="per_site")


def test_a_network_of_sites_answers_as_the_named_one_or_as_each(
    run_of_sites, scans, tmp_path
):
    model = predictor.load(run_of_sites[0])
    first, second = model.site_names
    answers = {}
    for wanted in (first, second, "each"):
        out = tmp_path / wanted
        assert command(run_of_sites, out, f"--site={wanted}", "--images", scans) == 0
        answers[wanted] = table(out)
    chances = [f"p_{name}" for name in model.class_names]
    for alone, other, both in zip(*answers.values(), strict=True):
        assert "label@" not in "".join(alone)
        assert alone[chances[0]] != other[chances[0]]
        for site, row in ((first, alone), (second, other)):
            assert both[f"label@{site}"] == row["label"]
            assert [both[f"{c}@{site}"] for c in chances] == [row[c] for c in chances]
        means = [(float(alone[c]) + float(other[c])) / 2 for c in chances]
        found = [float(both[c]) for c in chances]
        np.testing.assert_allclose(found, means, atol=1e-6)
        assert both["label_before"] == model.class_names[np.argmax(found)]
        assert both["label"] in (alone["label"], other["label"])
        assert both["opposing_votes"] == both["votes_cast"] == ""
    page = (tmp_path / "each" / "report.html").read_text()
    assert "By site" in page and f"{first}: " in page
    assert "By site" not in (tmp_path / first / "report.html").read_text()


def test_a_site_that_the_run_does_not_know_is_one_line(
    run, run_of_sites, scans, tmp_path, capsys
):
    names = ", ".join(predictor.load(run_of_sites[0]).site_names)
    ending = f"of its own for every site; give --site=each or one of {names}\n"
    for given, options, said in (
        (run_of_sites, [], "--site is missing: the network of this run"),
        (run_of_sites, ["--site=C"], "--site=C is no site: the network of this run"),
        (run, ["--site=A"], "--site=A: this run's network is the same for every site"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command(given, tmp_path / "out", *options, "--images", scans)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and said in error
        assert given is run or error.endswith(ending)
    assert not (tmp_path / "out").exists()


def test_every_image_is_voted_on_as_of_its_own_site(run_of_sites):
    """A batch of both sites in one graph, and with early exit, as one by one."""
    model = predictor.load(run_of_sites[0])
    images = np.random.default_rng(3).integers(0, 255, (3, 32, 32, 1), np.uint8)
    site, mesh = np.array([1, 0, 1]), make_mesh()
    step = jax.jit(make_predict_step(model.model, model.scale, model.config.tta))
    out = step(model.variables, images, site)
    early = predictor.Predictor(model, mesh)(images, site)
    for i in range(3):
        alone = step(model.variables, images[i : i + 1], site[i : i + 1])
        np.testing.assert_allclose(out["probs"][i], alone["probs"][0], atol=1e-5)
    votes = rules.votes_for(out["probs"], theta=model.config.tta.theta, k=3)
    np.testing.assert_array_equal(early.after, votes.labels)
    np.testing.assert_allclose(early.probs, out["probs"][:, 0], atol=1e-5)
    with pytest.raises(ValueError, match="pass site"):
        predictor.Predictor(model, mesh)(images)


def test_a_stopped_prediction_continues(run, scans, whole, tmp_path, monkeypatch):
    call = predictor.Predictor.__call__

    def stop_after_first(self, images):
        os.kill(os.getpid(), signal.SIGINT)
        return call(self, images)

    monkeypatch.setattr(predictor.Predictor, "__call__", stop_after_first)
    assert command(run, tmp_path, "--images", scans) == 128 + signal.SIGINT
    assert len(table(tmp_path)) == 4  # One batch.
    assert (tmp_path / "report.html").exists()
    monkeypatch.undo()
    with (tmp_path / "predictions.csv").open("a") as file:
        file.write("half a row,")  # What a crash leaves.
    with pytest.raises(SystemExit):
        command(run, tmp_path, "--images", scans)
    with pytest.raises(SystemExit):
        command(run, tmp_path, "--images", scans, "--resume", "--votes=1")
    assert command(run, tmp_path, "--images", scans, "--resume") == 0
    assert table(tmp_path) == table(whole)


def test_bad_files_are_named_and_the_others_predicted(run, scans, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "good.png").write_bytes(next(scans.iterdir()).read_bytes())
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("hello")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:300])
    (folder / "notes.txt").write_text("not meant to be an image")
    colour = np.zeros((30, 30, 3), np.uint8)
    colour[..., 0] = 200
    Image.fromarray(colour).save(folder / "photo.png")
    frames = [Image.fromarray(np.full((9, 9), i, np.uint8)) for i in (0, 255)]
    frames[0].save(folder / "volume.tif", save_all=True, append_images=frames[1:])
    (folder / "link.png").symlink_to("nowhere")
    (folder / "volume.nii.gz").write_bytes(b"\x1f\x8b")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")  # An index, no image.
    (folder / "patients.csv").write_text("file,patient\ngood.png,ann\n")
    paths = [f"--images={folder}", tmp_path / "*.gone"]
    code = command(run, out, "--votes=0", "--keep_ids", *paths)
    assert code == 1
    rows = table(out)
    errors = {row["file"].rpartition("/")[2]: row["error"] for row in rows[1:]}
    assert [row["error"] for row in rows[:1]] == [""]
    expected = {
        "empty.png": "empty",
        "text.png": "not an image",
        "link.png": "cannot be opened (No such file or directory)",
        "cut.png": "cannot be read",
        "photo.png": "colour picture",
        "volume.tif": "2 frames",
        "volume.nii.gz": "a volume; save its slices",
        "*.gone": "no such file",
    }
    assert errors.keys() == expected.keys()
    page, said = (out / "report.html").read_text(), capsys.readouterr().err
    for name, reason in expected.items():
        assert reason in errors[name] and name in page and name in said
    assert rows[0]["patient"] == "ann" and rows[0]["votes_cast"] == ""
    patients = (out / "patients.csv").read_text().splitlines()
    assert patients[0] == "patient,images,probability,label"
    assert patients[1].startswith("ann,1,")
    ignored = json.loads(
        page.split("<pre>")[1].split("</pre>")[0].replace("&quot;", '"')
    )
    assert [os.path.basename(n) for n in ignored["ignored files"]] == [
        "DICOMDIR",
        "notes.txt",
    ]


def test_nothing_that_is_found_is_dropped(run, scans, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    picture = Image.open(next(scans.iterdir()))
    for name in ("a.png", "b.webp", "deep/c.bmp", "deep/a.png", "d.gif"):
        picture.save(folder / name)
    os.mkfifo(folder / "fifo.png")
    os.mkfifo(folder / "pipe")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "linked").symlink_to(scans)
    (folder / "notes.txt").write_text("no image")
    (folder / "patients.csv").write_text(
        "file,patient\na.png,ann\nc.bmp,bob\nd.gif,cy\ngone.png,dan\n"
    )
    told = ("--votes=0", "--keep_ids", f"--images={folder}")
    assert command(run, out, *told) == 1
    rows = table(out)
    good = {r["file"].removeprefix(f"{folder}/"): r["patient"] for r in rows[:5]}
    assert good == {
        "a.png": "ann",
        "b.webp": "",
        "d.gif": "cy",
        "deep/a.png": "",
        "deep/c.bmp": "bob",
    }
    errors = {r["file"].removeprefix(f"{folder}/"): r["error"] for r in rows[5:]}
    assert errors == {
        "linked": "a link to a folder, not followed; name the folder itself",
        "fifo.png": "not a regular file but a FIFO, device or folder",
        "loop.png": "cannot be opened (Too many levels of symbolic links)",
    }
    said = capsys.readouterr()
    sentence = (
        "10 files found: 5 predicted, 3 failed, 2 ignored; "
        "1 rows of patients.csv unmatched"
    )
    assert sentence in said.out and sentence in (out / "report.html").read_text()
    assert f"{folder}/patients.csv: gone.png: no such image" in said.err


def test_bare_names_of_patients_must_be_unique(scans, tmp_path):
    picture = Image.open(next(scans.iterdir()))
    for name in ("x/a.png", "y/a.png", "y/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / name)
    (tmp_path / "patients.csv").write_text("file,patient\na.png,ann\n./y/b.png,bob\n")
    found = inputs.find([str(tmp_path)])
    assert found.patients == {tmp_path / "y/b.png": "bob"}
    (row, reason) = found.unmatched[0]
    assert row == f"{tmp_path}/patients.csv: a.png"
    assert reason == "2 images have this name; write x/a.png"


def test_the_counts_of_a_stopped_prediction_add_up(
    run, scans, tmp_path, monkeypatch, capsys
):
    call = predictor.Predictor.__call__

    def stop_after_first(self, images):
        os.kill(os.getpid(), signal.SIGINT)
        return call(self, images)

    monkeypatch.setattr(predictor.Predictor, "__call__", stop_after_first)
    assert command(run, tmp_path, "--images", scans) == 128 + signal.SIGINT
    said = capsys.readouterr().out
    assert "9 files found: 4 predicted, 0 failed, 0 ignored, 5 left;" in said
    monkeypatch.undo()
    assert command(run, tmp_path, "--images", scans, "--resume") == 0
    said = capsys.readouterr().out
    assert "9 files found: 9 predicted, 0 failed, 0 ignored;" in said


@pytest.mark.parametrize("missing", ["run", "checkpoint", "images"])
def test_nothing_to_predict_is_code_2_and_a_page(run, scans, tmp_path, missing):
    workdir, images, out = run[0], scans, tmp_path / "out"
    if missing == "images":
        images = tmp_path / "empty"
        images.mkdir()
    else:
        workdir = tmp_path / "workdir"
        workdir.mkdir()
        if missing == "checkpoint":
            for name in ("config.json", "results.json", novelty.FILE):
                (workdir / name).write_bytes((run[0] / name).read_bytes())
    code = predict.main([f"--workdir={workdir}", f"--images={images}", f"--out={out}"])
    assert code == 2
    page = (out / "report.html").read_text()
    reason = {
        "run": "is not the workdir of a run",
        "checkpoint": "holds no checkpoint",
        "images": "the folder holds no image files",
    }
    assert reason[missing] in page


def test_flags_tell_what_is_unusual(run):
    known = novelty.load(run[0])
    image = run[2].images[1]
    assert novelty.flags(image, known, 32) == ["seen in training"]
    assert "brighter than every training image" in novelty.flags(
        np.full((64, 64, 1), 255, np.uint8), known, 32
    )
    gray = Image.fromarray(image[..., 0])
    larger = np.asarray(gray.resize((131, 90), Image.Resampling.BICUBIC))[..., None]
    assert novelty.is_known(larger, known["difference_hashes"])
    assert not novelty.is_known(image[:, ::-1], known["difference_hashes"])
    blank = np.zeros((9, 9, 1), np.uint8)
    of_blank = novelty.difference_hash(blank)[None]
    assert not novelty.is_known(blank, of_blank) and not of_blank.any()
    tiny = novelty.flags(np.full((5, 60, 1), 90, np.uint8), known, 32)
    assert tiny[0].startswith("small: 60 x 5 pixels")
    assert "wider than every training image" in tiny
    assert "less contrast than every training image" in tiny


def test_names_that_are_not_utf8_are_predicted_and_written(run, scans, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    out = folder / "out"  # Its overlays are no new images when it is resumed.
    name = os.fsdecode(b"\xe4.png")  # Latin-1, as old archives have.
    try:
        (folder / name).write_bytes(next(scans.iterdir()).read_bytes())
    except OSError:
        pytest.skip("this file system wants UTF-8")
    (folder / os.fsdecode(b"\xe4.nii")).touch()
    assert command(run, out, "--votes=0", f"--images={folder}") == 1
    good, bad = table(out)
    assert good["file"] == f"{folder}/\\xe4.png" and good["error"] == ""
    assert bad["file"] == f"{folder}/\\xe4.nii" and "volume" in bad["error"]
    assert command(run, out, "--votes=0", f"--images={folder}", "--resume") == 1
    assert table(out) == [good, bad]


def test_votes_are_shared_out_over_devices(run, tmp_path):
    images = np.random.default_rng(3).integers(0, 255, (4, 32, 32, 1), np.uint8)
    model = predictor.load(run[0])
    here = predictor.Predictor(model, make_mesh())(images)
    np.save(tmp_path / "images.npy", images)
    program = """
import sys
import jax, numpy as np
from pathlib import Path
from hlo import collectives

from cxai_jax import mesh
from cxai_jax.inference.predictor import Predictor, load
from cxai_jax.voting.forward import make_voting_step
model = load(Path(sys.argv[1]))
images = np.load(sys.argv[2])
predictor = Predictor(model, mesh.make_mesh())
forward, shares = predictor._forward, set()
def watched(variables, masked, site):
    shares.add(len(masked) // masked.sharding.shard_shape(masked.shape)[0])
    return forward(variables, masked, site)
predictor._forward = watched
print(*predictor(images).after, shares)
devices = mesh.make_mesh()
step = make_voting_step(model.model, model.scale, model.config.tta)
arrays = mesh.put_replicated(model.variables, devices), mesh.put_rows(images, devices)
hlo = jax.jit(step).lower(*arrays).compile().as_text()
print(max((np.prod(dims) for _, dims in collectives(hlo)), default=0))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, run[0], tmp_path / "images.npy"],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # Compiles faster.
            "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *labels, shares, largest = " ".join(done.stdout.splitlines()[-2:]).split()
    assert labels == [*map(str, here.after)] and shares == "{4}"
    assert int(largest) < 32 * 32  # The full pass moves no image either.


def test_nothing_that_names_a_person_leaves_a_dicom_file(run, dicom, tmp_path):
    secrets = {
        "PatientName": "Doe^Jane",
        "PatientID": "MRN-4711-0815",
        "PatientBirthDate": "19610407",
        "AccessionNumber": "ACC9876543",
        "OtherPatientIDs": "OLD-ID-77",
        "ReferringPhysicianName": "Smith^John",
        "InstitutionName": "Saint Elsewhere",
        "PatientAddress": "Elm Street 12",
        "StudyDate": "20200229",
        "StudyID": "STUDY-31337",
        "Modality": "MR",
        "BodyPartExamined": "KNEE",
    }
    pixels = np.random.default_rng(0).integers(0, 900, (1, 40, 40))
    path = dicom(pixels, **secrets)
    out = tmp_path / "out"
    assert command(run, out, "--votes=0", "--images", path) == 0
    (row,) = table(out)
    assert row["patient"].startswith("patient-")
    assert "DICOM modality MR" in row["flags"] and "body part KNEE" in row["flags"]
    held = {"Modality", "BodyPartExamined"}  # What the flags are about.
    told = [value for name, value in secrets.items() if name not in held]
    told += ["Jane", "Doe", "Smith"]
    written = [file for file in out.rglob("*") if file.is_file()]
    assert len(written) >= 5
    for file in written:
        for secret in told:
            assert secret.encode() not in file.read_bytes(), (file.name, secret)
    assert command(run, tmp_path / "kept", "--votes=0", "--keep_ids", path) == 0
    assert table(tmp_path / "kept")[0]["patient"] == "MRN-4711-0815"


@pytest.mark.parametrize("kind", ["gradcam", "hirescam", "gradient", "occlusion"])
def test_every_map_is_drawn_in_one_unit(run, kind):
    model = predictor.load(run[0])
    model.config.tta.k = 0
    images = np.random.default_rng(3).integers(0, 255, (3, 32, 32, 1), np.uint8)
    look = predictor.Predictor(model, make_mesh())
    found = look(images)
    draw = shown_maps.make_maps(model, kind, look.batch_size, make_mesh())
    maps = draw(images, found, {})
    assert maps.shape[0] == 3 and np.isfinite(maps).all()
    x = normalise(images, model.scale.mean, model.scale.std)
    stages = saliency.stages(model.model, model.variables, "eval")
    labels = found.before.astype(np.int32)
    if kind == "gradient":
        assert (maps >= 0).all()
        means = maps.mean((1, 2)) * shown_maps.MULTIPLE
        np.testing.assert_allclose(means, model.map_scale, rtol=1e-4)
    elif kind == "occlusion":
        fill = sum(model.scale.mean) / 3
        cell = 32 // maps.shape[1]
        covered = images.astype(np.float32)
        covered[:, :cell, :cell] = fill
        target = [
            saliency.explained(
                stages.logits(normalise(one, model.scale.mean, model.scale.std)), labels
            )
            for one in (images, covered)
        ]
        drop = (target[0] - target[1]) * maps[0].size
        np.testing.assert_allclose(maps[:, 0, 0], drop, rtol=1e-3, atol=1e-2)
    else:
        form = shown_maps.FORMS[kind]
        signed = saliency.gradcam_lower(
            stages.upper_head, stages.lower(x, None), labels, form=form
        )
        np.testing.assert_allclose(maps, signed * signed[0].size, rtol=1e-3, atol=1e-2)


def test_a_map_or_point_that_cannot_be_had_is_one_line(run, scans, tmp_path, capsys):
    for option, said in (
        ("--map=lime", "--map=lime is unknown; known: cam, gradcam"),
        ("--operating_point=spec90", "the run held out no validation images"),
        ("--operating_point=often", "a threshold between 0 and 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command(run, tmp_path / "out", option, "--images", scans)
        assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["-600", "0,0", "a,b"])
def test_a_bad_window_is_refused(run, scans, tmp_path, text):
    with pytest.raises(SystemExit) as stopped:
        command(run, tmp_path, f"--images={scans}", f"--window={text}")
    assert stopped.value.code == 2


@pytest.fixture
def executables(run, tmp_path):
    """Predicts two images with programs kept in a folder: (predict, folder)."""
    images = np.random.default_rng(3).integers(0, 255, (2, 32, 32, 1), np.uint8)

    def predict():
        model = predictor.load(run[0])
        return predictor.Predictor(model, make_mesh(), tmp_path / "programs")(images)

    return predict, tmp_path / "programs"


def test_stored_programs_are_neither_traced_nor_compiled(
    executables, monkeypatch, caplog
):
    predict, folder = executables
    calls, apply = [], tiny.Tiny.apply

    def counted(self, *arguments, **options):
        calls.append(arguments[1].shape)
        return apply(self, *arguments, **options)

    monkeypatch.setattr(tiny.Tiny, "apply", counted)
    first, traced = predict(), len(calls)
    assert traced >= 2, "the first look and the votes"
    assert len(list(folder.iterdir())) == traced
    second = predict()
    assert len(calls) == traced
    for name, value in first._asdict().items():
        np.testing.assert_array_equal(getattr(second, name), value)
    assert not caplog.records
