"""The scripts behind the paper's figures, on an untrained run and its predictions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from untrained_run import make_run

from cxai_jax import data
from cxai_jax.inference import predictor
from cxai_jax.mesh import make_mesh
from cxai_jax.scoring import evaluate
from experiments import early_exit, figure3, figure5, figure6, run_files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with the predictions of its test split, four images and three masks."""
    workdir = tmp_path_factory.mktemp("run")
    config, _ = make_run(workdir)
    model = predictor.load(workdir)
    records = data.load(config.data).splits[config.data.test]
    evaluator = evaluate.Evaluator(model.model, model.scale, config, make_mesh())
    predictions = evaluator.predict(model.variables, records)
    plain = evaluator.predict(model.variables, records, votes=False)
    assert plain["probs"].shape[1] == 1 and predictions["probs"].shape[1] == 4
    np.testing.assert_allclose(plain["probs"], predictions["probs"][:, :1], atol=1e-6)
    evaluate.save_predictions(workdir / "predictions_test.npz", predictions)
    results = json.loads((workdir / "results.json").read_text())
    results["metrics"] = {"all": {"accuracy": 0.75}}
    results["config"] = {"cpe": {"num_patches": 3}}
    (workdir / "results.json").write_text(json.dumps(results))
    return workdir


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_the_sweep_equals_counting_every_vote():
    random = np.random.default_rng(0)
    positive = random.random((40, 6))
    labels = random.integers(0, 2, 40)
    probs = np.stack([1 - positive, positive], axis=2).astype(np.float32)
    predictions = {"probs": probs, "labels": labels}
    swept = figure3.sweep(predictions, k=4, theta=0.3)

    def accuracy(k, theta):
        before = positive[:, 0] > 0.5
        p, theta = probs[:, 1 : k + 1, 1], np.float32(theta)
        against = np.where(before[:, None], p < theta, p >= 1 - theta).sum(1)
        return ((before ^ (against > k / 2)) == labels).mean()

    np.testing.assert_allclose(swept["by_k"], [accuracy(k, 0.3) for k in swept["ks"]])
    np.testing.assert_allclose(
        swept["by_theta"], [accuracy(4, theta) for theta in swept["thetas"]]
    )
    assert swept["without"] == ((positive[:, 0] > 0.5) == labels).mean()
    assert swept["ks"].tolist() == [1, 2, 3, 4, 5] and len(set(swept["by_k"])) > 1
    with pytest.raises(ValueError, match="hold 5 masks, 6 were asked for"):
        figure3.sweep(predictions, k=6, theta=0.3)


def test_figure_3_is_drawn_from_files_alone(run, tmp_path, capsys):
    out = tmp_path / "figure3.png"
    file = f"--predictions={run / 'predictions_test.npz'}"
    figure3.main([file, "--k=3", f"--out={out}"])
    two = size_of(out)
    figure3.main([file, "--k=3", f"--out={out}", "--runs", str(run), str(run)])
    three = size_of(out)
    assert 2 * three[0] == 3 * two[0]  # Panel c.
    assert "n   3  0.7500  (2 runs)" in capsys.readouterr().out


def test_figure_5_takes_images_by_name_or_by_difference(run, tmp_path, capsys):
    labels = np.array([0, 1, 1])
    first = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    second = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7]])
    assert figure5.most_different(labels, [first, second], 2) == [1, 2]
    out = tmp_path / "figure5.png"
    name = str(evaluate.load_predictions(run / "predictions_test.npz")["names"][2])
    command = ["--runs", str(run), str(run), "--titles", "a", "b", f"--out={out}"]
    figure5.main([*command, "--images", name])
    one = size_of(out)
    figure5.main([*command, "--count=3"])
    assert size_of(out) == (one[0], 3 * one[1])
    with pytest.raises(SystemExit):
        figure5.main([*command[:3], f"--out={out}"])  # Four titles for two runs.


def test_figure_6_draws_a_row_per_image(run, tmp_path):
    out = tmp_path / "figure6.png"
    figure6.main([f"--run={run}", "--count=1", f"--out={out}"])
    one = size_of(out)
    figure6.main([f"--run={run}", "--count=2", f"--out={out}"])
    assert size_of(out) == (one[0], 2 * one[1])


def test_rows_of_names_says_what_there_is():
    predictions = {"names": np.array(["x/1.png", "x/11.png"])}
    assert run_files.rows_of(predictions, ["11.png", "/1.png"]) == [1, 0]
    with pytest.raises(ValueError, match="no image '2.png'.*begins with x/1.png"):
        run_files.rows_of(predictions, ["2.png"])


def test_the_early_exit_of_a_run_is_compared_with_its_full_pass(run, capsys):
    assert early_exit.main([f"--run={run}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["labels_that_differ"] == 0 and found["largest_difference"] < 1e-5
    assert found["masked_forwards"] == 3 * found["images"]
    assert 0 < found["votes_not_cast"] <= found["images"]
    assert found["forwards_saved"] <= found["votes_not_cast"]
    predictions = evaluate.load_predictions(run / "predictions_test.npz")
    other = predictions["probs"][:, :, ::-1]
    batch = predictor.Predicted(
        probs=predictions["probs"][:, 0],
        class_maps=predictions["class_maps"],
        before=None,
        after=predictions["probs"][:, 0].argmax(1),
        opposing=None,
        cast=np.full(len(other), 3),
        pooled=None,
        saved=0,
    )
    settings = SimpleNamespace(theta=0.0, k=3)  # Nothing flips.
    assert early_exit.compare(other, [batch], settings)["labels_that_differ"] == len(
        other
    )
