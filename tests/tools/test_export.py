"""The exported file computes what the live model computes, and needs only jax."""

import errno
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import REPO
from untrained_run import make_run

from cxai_jax.inference import bundle, export, predictor
from cxai_jax.voting import rules
from cxai_jax.voting.forward import make_predict_step

pytest.importorskip("flatbuffers")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    make_run(workdir)
    return workdir


@pytest.mark.parametrize("votes", [0, 3])
def test_exported_equals_live(run, tmp_path, votes):
    file = tmp_path / "model.bin"
    export.main([f"--workdir={run}", f"--out={file}", f"--votes={votes}"])
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    assert exported.platforms == export.PLATFORMS
    model = predictor.load(run)
    model.config.tta.k = votes
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32), np.uint8)
    predict = make_predict_step(model.model, model.scale, model.config.tta)
    live = jax.jit(predict)(model.variables, images[..., None])
    for batch in (images, images[:1]):  # One file serves every batch size.
        out = jax.jit(exported.call)(batch)
        number = len(batch)
        expected = np.asarray(live["probs"][:number, 0].argmax(-1))
        if votes:
            voted = rules.votes_for(live["probs"][:number], theta=0.45, k=votes)
            expected = np.asarray(voted.labels)
            np.testing.assert_array_equal(out["opposing"], voted.opposing)
        for i, name in enumerate(model.class_names):
            np.testing.assert_allclose(
                out["probability"][name], live["probs"][:number, 0, i], atol=1e-5
            )
            np.testing.assert_allclose(
                out["class_map"][name],
                live["class_maps"][:number, ..., i],
                atol=1e-5,
                rtol=1e-5,
            )
            np.testing.assert_array_equal(out["label"][name], expected == i)


def test_a_file_is_for_one_site(tmp_path, capsys):
    workdir, file = tmp_path / "run", tmp_path / "model.bin"
    workdir.mkdir()
    make_run(workdir, norm="per_site")
    options = [f"--workdir={workdir}", f"--out={file}"]
    model = predictor.load(workdir)
    images = np.random.default_rng(0).integers(0, 255, (2, 32, 32), np.uint8)
    export.main([*options, f"--site={model.site_names[1]}"])
    exported = jax.export.deserialize(bytearray(file.read_bytes()))
    model.config.tta.k = 0
    predict = jax.jit(make_predict_step(model.model, model.scale, model.config.tta))
    live = predict(model.variables, images[..., None], np.ones(2, np.int32))
    chances_of = exported.call(images)["probability"]
    for i, name in enumerate(model.class_names):
        chances = chances_of[name]
        np.testing.assert_allclose(chances, live["probs"][:, 0, i], atol=1e-5)
    with pytest.raises(SystemExit):
        export.main([*options, "--site=each"])
    assert "a file is for one site; export one for each" in capsys.readouterr().err


def test_the_reader_needs_no_package_of_ours(run, tmp_path):
    file, images = tmp_path / "model.bin", tmp_path / "images.npy"
    export.main([f"--workdir={run}", f"--out={file}"])
    np.save(images, np.zeros((2, 32, 32), np.uint8))
    reader = REPO / "tools" / "run_exported.py"
    assert "cxai_jax" not in reader.read_text()
    said = subprocess.run(
        [sys.executable, reader, file, images],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(said) == 2 and said[0].startswith("0 ") and "COVID-19" in said[0]


def test_a_place_that_cannot_be_is_refused_before_any_work(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(export, "load", lambda _: pytest.fail("the model was loaded"))
    monkeypatch.setattr(bundle, "load", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()

    def refused(option):
        with pytest.raises(SystemExit) as stopped:
            export.main([f"--workdir={tmp_path}", option])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        return error

    file = "there is a file where a folder is needed; choose another path"
    assert "is a folder; name a file" in refused(f"--out={tmp_path}")
    assert "there is no such folder" in refused(f"--out={tmp_path / 'none' / 'x'}")
    assert file in refused(f"--out={tmp_path / 'file' / 'x'}")
    assert file in refused(f"--bundle={tmp_path / 'file' / 'x'}")

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", denied)
    for option in ("--out", "--bundle"):
        told = refused(f"{option}={tmp_path / 'new'}")
        assert f"error: {tmp_path}: there is no permission to write" in told
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_workdir_without_a_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        export.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'x'}"])
    assert stopped.value.code == 2
    assert "is not the workdir of a run" in capsys.readouterr().err


def test_without_flatbuffers_the_file_is_refused_before_any_work(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.setattr(export, "load", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as stopped:
        export.main([f"--workdir={tmp_path}", f"--out={tmp_path / 'x'}"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: this needs flatbuffers: pip install flatbuffers\n"
