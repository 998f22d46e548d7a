"""The numbers behind the pictures, read back from what was drawn."""

import numpy as np
import pytest

from cxai_jax.report import figures
from cxai_jax.scoring import metrics


@pytest.fixture
def scored():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 60)
    positive = np.round(np.clip(random.normal(0.4 + 0.2 * labels, 0.2), 0, 1), 1)
    return labels, np.stack([1 - positive, positive], axis=1)


def test_the_area_under_the_drawn_roc_is_the_auc(scored):
    labels, probs = scored  # Rounded scores: many ties.
    figure = figures.roc({"model": (labels == 1, probs[:, 1])})
    x, y = figure.axes[0].lines[1].get_data()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    area = np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2)
    assert area == pytest.approx(metrics.auc(labels == 1, probs[:, 1]), abs=1e-12)


def test_roc_leaves_out_a_site_with_one_class():
    figure = figures.roc({"only sick": (np.ones(3, bool), np.arange(3))})
    assert len(figure.axes[0].lines) == 1  # The diagonal.


def test_confusion_writes_counts_and_row_shares():
    figure = figures.confusion(np.array([[3, 1], [0, 0]]), ["a", "b"])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["3\n75 %", "1\n25 %", "0\n0 %", "0\n0 %"]


def test_reliability_points_are_the_means_of_their_bins():
    confidence = np.array([0.55, 0.58, 0.95, 0.97, 1.0])
    probs = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.array([0, 1, 0, 0, 1])
    figure = figures.reliability(labels, probs, bins=10)
    x, y = figure.axes[0].lines[1].get_data()
    np.testing.assert_allclose(x, [0.565, (0.95 + 0.97 + 1.0) / 3])
    np.testing.assert_allclose(y, [1 / 2, 2 / 3])


def test_learning_curves_take_their_rows_from_the_log():
    log = [{"step": 1, "loss": 2.0, "cpe": 1.0}, {"step": 2, "loss": 1.0}, {"step": 2}]
    lines = figures.training_loss(log).axes[0].lines
    assert [line.get_label() for line in lines] == ["loss", "cpe"]
    np.testing.assert_array_equal(lines[0].get_ydata(), [2, 1])
    curve = [
        {"step": 1, "val": {"accuracy": 0.5}},
        {"step": 2, "test": {"accuracy": 1}},
    ]
    lines = figures.accuracy_curves(curve).axes[0].lines
    assert [line.get_label() for line in lines] == ["val", "test"]


def test_trajectories_follow_the_first_label():
    probs = np.array([[0.3, 0.7], [0.6, 0.4]])
    figure = figures.trajectories({"x": probs}, {"x": 1}, theta=0.2)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [0.7, 0.4])


def test_svg_takes_the_page_colour_and_escapes_its_label(scored):
    figure = figures.roc({"a<b": (scored[0] == 1, scored[1][:, 1])})
    svg = figures.to_svg(figure, 'ROC of "x" & <y>')
    assert svg.startswith("<svg role=") and "<?xml" not in svg
    assert "currentColor" in svg and figures.INK not in svg
    assert "ROC of &quot;x&quot; &amp; &lt;y&gt;" in svg and "a&lt;b" in svg
