"""The scripts behind the papers' figures, on an untrained run and its predictions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from untrained_run import make_run

from cxai_jax import data
from cxai_jax.inference import predictor
from cxai_jax.mesh import make_mesh
from cxai_jax.scoring import evaluate
from experiments import (
    all_figures,
    early_exit,
    figure1,
    figure2,
    figure3,
    figure4,
    figure5,
    figure6,
    figure_command,
    run_files,
    xray_figure1,
)


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
    return workdir


def made(figure, run, *options) -> figure_command.Drawn:
    return figure.make(figure_command.parse(figure, [f"--workdir={run}", *options]))


def texts(figure: Figure) -> list[str]:
    """What stands in a figure's axes: titles and labels."""
    found = []
    for axes in figure.get_axes():
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
    return [text for text in found if text]


def test_snapmix_is_shown_with_the_weights_of_its_boxes(run):
    drawn = made(figure1, run, "--seed=2")
    words = " ".join(texts(drawn.figure))
    receives, gives = (
        float(part.split(" % of the map")[0].split()[-1]) / 100
        for part in words.split("in the box")[:2]
    )
    weights = [float(line.split(" x ")[0]) for line in words.split("\n")[-1:]]
    first = float(words.split(" x cross-entropy")[0].split()[-1])
    assert abs(first - (1 - receives)) < 0.011 and abs(weights[0] - gives) < 0.011
    assert "train" in drawn.caption and run.name in drawn.caption
    for box in figure1.draw_boxes(5, 100, 1.0):
        area = (box[2] - box[0]) * (box[3] - box[1]) / 100**2
        assert figure1.AREAS[0] <= area <= figure1.AREAS[1]
    labels, sites = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert figure1.two_images(labels, sites, 1) == [2, 1]  # Of another site.
    assert figure1.two_images(labels, np.zeros(4), 1) == [2, 0]
    with pytest.raises(ValueError, match="all images are of one"):
        figure1.two_images(np.ones(3), np.zeros(3), 1)


def test_masked_images_have_the_scores_of_the_predictions_file(run):
    predictions = evaluate.load_predictions(run / "predictions_test.npz")
    name = str(predictions["names"][2])
    drawn = made(figure2, run, f"--image={name}")
    label = predictions["probs"][2, 0].argmax()
    shown = [axes.get_xlabel().split(": ")[1] for axes in drawn.figure.get_axes()]
    assert shown == [f"{p:.3f}" for p in predictions["probs"][2, :, label]]
    assert name in drawn.caption and "of 3 do" in drawn.caption
    # What is drawn is what scoring masked, in that order.
    seen = run_files.read_run(run)
    gray = np.random.default_rng(0).integers(50, 200, (32, 32, 1), np.uint8)
    cells = figure2.cells_of(seen, [2])[0]
    for count in (0, 1, 3):
        image, place = run_files.masked(seen, gray, cells[:count])
        assert place.sum() == count * 8 * 8 and (image[place] == gray.min()).all()
        np.testing.assert_array_equal(image[~place], gray[~place])
        corners = {(c // 4 * 8, c % 4 * 8) for c in cells[:count]}
        assert all(place[r : r + 8, c : c + 8].all() for r, c in corners)


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


def test_figure_3_has_a_line_for_each_site_and_a_panel_of_patches(run):
    two = made(figure3, run)
    panels = two.figure.get_axes()
    assert len(panels) == 2 and len(panels[1].lines) == 4  # Each with no voting.
    predictions = evaluate.load_predictions(run / "predictions_test.npz")
    own = figure3.of_rows(predictions, predictions["sites"] == 1)
    found = [panels[0].lines[i].get_ydata().tolist() for i in (0, 2)]
    assert figure3.sweep(own, k=3, theta=0.45)["by_k"] in found
    assert "phantom_0" in two.caption and "chosen on them" in two.caption
    three = made(figure3, run, "--patches", str(run), str(run))
    assert len(three.figure.get_axes()) == 3
    accuracy = json.loads((run / "results.json").read_text())["metrics"]["all"]
    assert figure3.by_patches([run, run]) == {2: 2 * [accuracy["accuracy"]]}


def test_figure_4_says_whether_its_images_were_trained_on(run):
    drawn = made(figure4, run, "--patches", str(run))
    assert "trained on these very images" in drawn.caption
    assert "30 % of train (8 images" in drawn.caption
    assert len(drawn.figure.get_axes()) == 3
    unseen = made(figure4, run, "--split=val", "--share=1")
    assert "was not trained on these images" in unseen.caption
    with pytest.raises(ValueError, match="no split 'tests'; known: train, val, test"):
        made(figure4, run, "--split=tests")
    with pytest.raises(ValueError, match="--share=2.0 must be above 0 and at most 1"):
        made(figure4, run, "--share=2")


def test_figure_5_takes_images_by_name_or_by_difference(run):
    labels = np.array([0, 1, 1, 0])
    first = np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.3, 0.7]])
    second = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7]])
    assert figure5.most_different(labels, [first, second], 2) == [1, 2]
    # Right, wrong, and of the kinds that are left.
    assert figure5.surest(labels, [first], 3) == [0, 2, 3]
    name = str(evaluate.load_predictions(run / "predictions_test.npz")["names"][2])
    drawn = made(figure5, run, "--rows", str(run), "--images", name)
    titles = [text for text in texts(drawn.figure) if "CAM" in text or "AGF" in text]
    assert titles == ["+ CPE + SnapMix\nCAM", "\nAGF"] * 2
    assert name in drawn.caption


def test_figure_6_draws_two_kinds_of_maps_for_each_image(run):
    one, two = (made(figure6, run, f"--count={count}") for count in (1, 2))
    assert len(one.figure.get_axes()) == 2 * 4 + 1
    assert two.figure.get_size_inches()[1] == 2 * one.figure.get_size_inches()[1]


def test_text_is_found_beside_the_lungs_and_only_there():
    gray = np.full((100, 100), 40, np.uint8)
    gray[30:70, 30:70] = 120
    gray[5:12, 80:82] = gray[10:12, 80:86] = 250  # An L.
    gray[40:47, 40:42] = 250  # In the lungs.
    gray[90:92] = 250  # A line.
    lungs = np.zeros((100, 100), bool)
    lungs[35:60, 35:60] = True
    found = xray_figure1.burnt_in(gray, lungs)
    assert found[4:13, 79:87].all() and found.sum() == (7 + 4) * (6 + 4)
    assert not xray_figure1.burnt_in(gray // 50, lungs).any()  # Nothing stands out.


def test_energies_are_shares_of_the_positive_map():
    drawn = np.zeros((2, 20, 20), np.float32)
    drawn[0, 0, 0], drawn[0, 10, 10] = 1, 3
    text, lungs = np.zeros((2, 2, 20, 20), bool)
    text[0, :2, :2] = True
    lungs[0, 8:12, 8:12] = True
    found = xray_figure1.energies(drawn, text, lungs)
    assert {name: energy[0] for name, (energy, _) in found.items()} == {
        "on text": 0.25,
        "in the border": 0.25,
        "outside the lungs": 0.25,
    }
    assert all(np.isnan(energy[1]) for energy, _ in found.values())
    area = found["outside the lungs"][1]
    assert area[0] == 1 - 16 / 400 and np.isnan(area[1])
    assert xray_figure1.summary(found)["on text"] == (0.25, 0.01, 1)
    assert xray_figure1.evenly_ranked(np.array([1, np.nan, 3, 2.0]), 2) == [2, 0]


def test_the_xray_figure_measures_and_needs_lung_masks(run, monkeypatch):
    drawn = made(xray_figure1, run, "--split=val", "--limit=6")
    assert "outside the lungs" in drawn.caption and "6 images of val" in drawn.caption
    assert len(drawn.figure.get_axes()) == 6 + 1
    with pytest.raises(ValueError, match="phantom has no split 'tests'; known: train"):
        made(xray_figure1, run, "--split=tests")
    monkeypatch.setattr(
        xray_figure1.explanations, "lung_masks", lambda records, size: None
    )
    with pytest.raises(ValueError, match="phantom has no lung masks in test, so what"):
        made(xray_figure1, run)


@pytest.mark.slow
def test_all_figures_of_a_run_are_on_one_page(run, tmp_path, capsys):
    out = tmp_path / "figures.html"
    command = [f"--workdir={run}", f"--out={out}", "--on=phantom"]
    assert all_figures.main(command) == 0
    page = out.read_text()
    assert page.count("data:image/jpeg;base64,") == len(all_figures.FIGURES) == 7
    assert "no other collection" in page and "http" not in page.split("<main")[1]
    assert "7 of 7 figures" in capsys.readouterr().out


def test_what_a_run_cannot_give_is_named_and_the_rest_is_drawn(
    run, tmp_path, monkeypatch, capsys
):
    """Scored without voting; the slow figures are tested above."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in ("config.json", "results.json"):
        (plain / file).write_bytes((run / file).read_bytes())
    predictions = evaluate.load_predictions(run / "predictions_test.npz")
    predictions["probs"] = predictions["probs"][:, :1]
    evaluate.save_predictions(plain / "predictions_test.npz", predictions)
    fast = {"Second": (figure2, ()), "Third": (figure3, ("patches",))}
    monkeypatch.setattr(all_figures, "FIGURES", fast)
    with pytest.raises(SystemExit, match="gives none of the figures"):
        all_figures.main([f"--workdir={plain}"])
    said = capsys.readouterr().out
    assert said.startswith(f"Second: not drawn: {plain} was scored with 0 masks, 1 are")
    with pytest.raises(SystemExit, match="scored with 0 masks, 1 are needed; .*eval"):
        figure2.main([f"--workdir={plain}"])
    other = SimpleNamespace(
        __spec__=figure2.__spec__,
        __doc__="",
        options=lambda parser: None,
        make=lambda given: figure_command.Drawn(Figure((1, 1)), "a caption"),
    )
    monkeypatch.setattr(all_figures, "FIGURES", fast | {"Other": (other, ())})
    assert all_figures.main([f"--workdir={plain}"]) == 1
    page = (plain / "figures.html").read_text()
    assert "a caption" in page and page.count("Not drawn:") == 2
    (plain / "predictions_test.npz").unlink()
    with pytest.raises(SystemExit, match="predictions_test.npz does not exist: .*eval"):
        figure3.main([f"--workdir={plain}"])
    with pytest.raises(SystemExit, match="is not the workdir of a run"):
        figure1.main([f"--workdir={tmp_path}"])


def test_a_figure_is_written_with_its_caption(run, tmp_path, capsys):
    out = tmp_path / "two.png"
    figure2.main([f"--workdir={run}", f"--out={out}"])
    with Image.open(out) as image:
        assert image.size[0] == 1600
    assert run.name in capsys.readouterr().out
    assert figure_command.parse(figure2, ["--workdir=x"]).out.name == "figure2.png"


def test_rows_of_names_says_what_there_is():
    names = np.array(["x/1.png", "x/11.png"])
    assert run_files.rows_of(names, ["11.png", "/1.png"]) == [1, 0]
    with pytest.raises(ValueError, match="no image '2.png'.*they begin with x/1.png"):
        run_files.rows_of(names, ["2.png"])


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
