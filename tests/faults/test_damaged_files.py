"""Damaged small files of a run, of a prediction or of prepared data: one line each."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from untrained_run import make_run

from cxai_jax import config as configs
from cxai_jax import predict, writer
from cxai_jax.data import folder, novelty, store
from cxai_jax.inference import predictor, table
from cxai_jax.training import loop


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    config, _ = make_run(workdir)
    return workdir, config


@pytest.fixture
def workdir(finished, tmp_path):
    """The workdir of a finished run, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "run")


NOVELTY = '{"difference_hashes": [%s], "ranges": {%s}}'
DAMAGES = [
    ("results.json", "{}", "results.json is damaged: it lacks data"),
    ("results.json", "[]", "results.json holds a list, expected an object"),
    ("results.json", '{"data": 3}', "results.json is damaged: its classes are None"),
    (
        "results.json",
        '{"data": {"class_names": ["a", "b"], "positive": "a"}}',
        "results.json is damaged: its sites are None; score the run again",
    ),
    (
        "results.json",
        '{"data": {"class_names": ["a"], "site_names": ["s"], "positive": "c"}}',
        "results.json is damaged: its positive class is 'c'; score the run again",
    ),
    ("results.json", '{"data"', "results.json is damaged, no JSON"),
    ("results.json", "[" * 100_000, "results.json is damaged, no JSON"),
    ("config.json", "[]", "config.json holds a list, expected an object"),
    ("config.json", "{}", "config.json is damaged: it lacks data, eval, model"),
    ("config.json", b"\xff\xfe{", "config.json is damaged, no JSON"),
    (novelty.FILE, "[]", "training_images.json holds a list"),
    (novelty.FILE, '{"difference_hashes": []}', "training_images.json is damaged"),
    (novelty.FILE, NOVELTY % ('"zz"', ""), "training_images.json is damaged"),
    (novelty.FILE, NOVELTY % ('"ab"', ""), "training_images.json is damaged"),
    (novelty.FILE, NOVELTY % ("", '"aspect": [1]'), "training_images.json is damaged"),
]


@pytest.mark.parametrize("name,content,message", DAMAGES)
def test_a_damaged_run_is_one_line_and_code_2(
    workdir, tmp_path, capsys, name, content, message
):
    path = workdir / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        predictor.load(workdir)
        novelty.load(workdir)
    assert "\n" not in str(caught.value)
    arguments = [f"--workdir={workdir}", f"--images={workdir}", f"--out={tmp_path}/o"]
    assert predict.main(arguments) == 2
    assert str(path) in capsys.readouterr().err


def test_a_config_without_a_network_is_named(workdir):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    del config["model"]["name"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json does not describe a network"):
        predictor.load(workdir)


def test_a_damaged_config_is_named_by_a_training(workdir, finished):
    (workdir / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json holds a list"):
        configs.claim_workdir(finished[1], workdir)


def test_a_mistyped_workdir_is_not_created(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the workdir of a run"):
        loop.score(finished[1], tmp_path / "mistyped")
    assert not list(tmp_path.iterdir())


def test_damaged_lines_of_the_log_are_left_out(tmp_path):
    good = b'{"step": 1, "loss": 2.0}\n'
    bad = b'\xff\n{"step": 1e999}\n[1]\n{"step": "\x85"}\n{"st' + b"[" * 100_000
    (tmp_path / "metrics.jsonl").write_bytes(good + bad + b"\n" + good)
    assert writer.read_log(tmp_path) == [{"step": 1, "loss": 2.0}] * 2
    writer.Writer(tmp_path, start_step=1).close()
    assert writer.read_log(tmp_path) == [{"step": 1, "loss": 2.0}] * 2


def test_hostile_names_are_no_formulas_and_read_back(finished, tmp_path):
    images, out = tmp_path / "in", tmp_path / "out"
    images.mkdir()
    picture = Image.fromarray(np.arange(144, dtype=np.uint8).reshape(12, 12))
    for name in ("a.png", "b.png"):
        picture.save(images / name)
    (images / "patients.csv").write_text(
        "file,patient\na.png,=cmd|' /C calc'!A0\nb.png,'@x\n"
    )
    arguments = [f"--workdir={finished[0]}", f"--out={out}", "--votes=0"]
    arguments += ["--keep_ids"]
    assert predict.main([*arguments, f"--images={images}"]) == 0
    for name in ("predictions.csv", "patients.csv"):
        with (out / name).open(newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert "'=cmd|' /C calc'!A0" in cells and "''@x" in cells
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
    rows = table.read(out / "predictions.csv", ["non-COVID-19", "COVID-19"])
    assert [row["patient"] for row in rows] == ["=cmd|' /C calc'!A0", "'@x"]
    before = (out / "predictions.csv").read_bytes()
    assert predict.main([*arguments, f"--images={images}", "--resume"]) == 0
    assert (out / "predictions.csv").read_bytes() == before


@pytest.mark.parametrize(
    "label,chance,message",
    [
        ("a", "0.2", ""),
        ("c", "0.2", "is damaged in row 1: 'c' is not in list"),
        ("a", "x", "is damaged in row 1: could not convert string to float: 'x'"),
    ],
)
def test_the_columns_of_sites_are_checked_as_well(tmp_path, label, chance, message):
    path = tmp_path / "predictions.csv"
    row = {"probability": "0.5", "label_before": "b", "label": "a", "p_a": "0.5"}
    row |= {"calibrated": "0.5"}
    row |= {"p_b": "0.5", "label@s": label, "p_a@s": chance, "p_b@s": "0.8"}
    written = table.Table(path, ["a", "b"], [], ["s"])
    written.add([row])
    written.close()
    if not message:
        (got,) = table.read(path, ["a", "b"], ["s"])
        assert got["label@s"] == label and got["p_a@s"] == chance
        message, names = "is damaged in row 1: expected the columns file, patient", []
    else:
        names = ["s"]
    with pytest.raises(ValueError, match=message):
        table.read(path, ["a", "b"], names)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("about.json", "{", "about.json is damaged"),
        ("predictions.csv", b"a,b\n\xff", "predictions.csv: byte 4 is not UTF-8"),
        ("predictions.csv", b"file,error\nx,\n", "predictions.csv is damaged in row 1"),
    ],
)
def test_a_damaged_output_is_not_continued(
    finished, tmp_path, capsys, name, content, message
):
    images, out = tmp_path / "in", tmp_path / "out"
    images.mkdir()
    Image.new("L", (9, 9)).save(images / "a.png")
    arguments = [f"--workdir={finished[0]}", f"--out={out}", "--votes=0"]
    arguments += ["--keep_ids"]
    assert predict.main([*arguments, f"--images={images}"]) == 0
    content = content if isinstance(content, bytes) else content.encode()
    (out / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        predict.main([*arguments, f"--images={images}", "--resume"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert (out / name).read_bytes() == content


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    for k, name in enumerate(("=no", "yes")):
        (root / "source" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(9 * k + i).integers(0, 255, (9, 9), np.uint8)
            Image.fromarray(pixels).save(root / "source" / name / f"{i}.png")
    (root / "source" / "patients.csv").write_text("file,patient\n=no/0.png,@ann\n")
    store.build(folder.plan_folder(root / "source", "x"), root / "data")
    return root / "data"


def test_hostile_names_of_prepared_data_are_read_back(prepared):
    (index,) = prepared.glob("x/default/*/index.csv")
    assert "'=no/0.png" in index.read_text() and "'@ann" in index.read_text()
    records = store.load("x", "default", prepared).splits.values()
    names = {n: p for r in records for n, p in zip(r.names, r.patients, strict=True)}
    assert names["=no/0.png"] == "@ann" and len(names) == 6


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("summary.json", b"{}", "summary.json is damaged: it lacks name, counts"),
        ("summary.json", b"\xff", "summary.json is damaged"),
        ("index.csv", b"split,name,label,site,patient\ntrain,x,?,0,\n", "in row 1"),
        ("index.csv", b"split\ntrain\n", "index.csv is damaged in row 1"),
        ("index.csv", b"split\n\xff\n", "index.csv: byte 6 is not UTF-8"),
        ("features.json", b"{", "1.0.0 is damaged .*prepare the data set again"),
        ("dataset_info.json", b"[]", "1.0.0 is damaged .*prepare the data set again"),
    ],
)
def test_damaged_prepared_data(prepared, tmp_path, name, content, message):
    shutil.copytree(prepared, tmp_path / "data")
    (path,) = (tmp_path / "data").glob(f"x/default/*/{name}")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        store.load("x", "default", tmp_path / "data")
