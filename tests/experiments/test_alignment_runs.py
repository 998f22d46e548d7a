"""The experiments on aligned maps: their scores, their gate, their pictures."""

import re

import numpy as np
import pytest

from experiments import alignment, alignment_cost, shortcut


def pair_of_runs(shift):
    """Measured values of one seed without and with alignment, 40 patients."""
    random = np.random.default_rng(3)
    labels = np.arange(80) % 2
    first = {
        "patients": np.repeat(np.arange(40), 2).astype(str),
        "labels": labels,
        "predicted": np.where(random.random(80) < 0.8, labels, 1 - labels),
        "predicted_pasted": labels,
        "agreement": random.normal(size=80),
        "spearman/cam~gradcam_lower": random.normal(size=80),
        "entropy/cam": random.random(80),
        "empty/cam": np.zeros(80),
    }
    first["agreement"][::4] = np.nan
    second = dict(first)
    for name, amount in shift.items():
        second[name] = first[name] + amount
    return first, second


def test_scores_equal_a_direct_count():
    sklearn = pytest.importorskip("sklearn.metrics")
    first, _ = pair_of_runs({})
    weights = np.random.default_rng(0).integers(0, 4, (3, 80))
    got = alignment.scores(weights, first["labels"], first["predicted"])
    for r, w in enumerate(weights):
        labels, chosen = (first[k].repeat(w) for k in ("labels", "predicted"))
        assert got["f1"][r] == pytest.approx(sklearn.f1_score(labels, chosen))
        macro = sklearn.f1_score(labels, chosen, average="macro")
        assert got["macro_f1"][r] == pytest.approx(macro)
        assert got["accuracy"][r] == pytest.approx((labels == chosen).mean())


def test_a_run_does_not_differ_from_itself():
    first, _ = pair_of_runs({})
    table = alignment.compare([(first, first)])
    for name, row in table.items():
        assert (row["difference"], row["low"], row["high"]) == (0, 0, 0), name
    assert table["agreement"]["with"] == pytest.approx(np.nanmean(first["agreement"]))


def test_a_constant_gain_has_a_narrow_interval():
    table = alignment.compare([pair_of_runs({"agreement": 0.3})] * 2)
    assert table["agreement"]["seeds"] == pytest.approx([0.3, 0.3])
    assert table["agreement"]["difference"] == pytest.approx(0.3)
    assert table["agreement"]["low"] == pytest.approx(0.3)
    # Images are paired, so the spread between images does not enter.
    assert table["agreement"]["high"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "shift,expected",
    [
        ({}, "did not rise"),
        ({"agreement": 0.2}, "without collapse"),
        ({"agreement": 0.2, "entropy/cam": 0.1}, "collapse: .* entropy/cam"),
        ({"agreement": 0.2, "empty/cam": 1.0}, "collapse: .* empty/cam"),
        ({"entropy/cam": 0.1}, "did not rise"),
        ({"spearman/cam~gradcam_lower": 0.2}, "^spearman/.* rose without collapse"),
        (  # The pairs that no loss trains hold the mean down.
            {"spearman/cam~gradcam_lower": 0.2, "agreement": -0.1, "entropy/cam": 0.1},
            "collapse: spearman/cam~gradcam_lower rose .* entropy/cam",
        ),
    ],
)
def test_the_gate_names_collapse(shift, expected):
    table = alignment.compare([pair_of_runs(shift)])
    assert re.search(expected, alignment.verdict(table))
    assert alignment.verdict(table) in alignment.describe(table, "cheap")


def test_the_pasted_letter_stays_in_its_corner():
    image = np.full((224, 260, 1), 90, np.uint8)
    pasted = alignment.paste(image)
    assert {0, 90, 255} == set(np.unique(pasted).tolist())
    np.testing.assert_array_equal(pasted[40:], image[40:])
    np.testing.assert_array_equal(pasted[:, 40:], image[:, 40:])
    assert (image == 90).all()


def test_shortcut_scores_separate_agreeing_and_misleading_letters():
    labels = np.array([1, 1, 0, 0])
    follows_the_letter = shortcut.score(np.zeros(4, int), np.ones(4, int), labels)
    assert follows_the_letter == {
        "accuracy": 0.5,
        "accuracy_letter_agrees": 1.0,
        "accuracy_letter_misleads": 0.0,
        "flips": 1.0,
    }
    assert shortcut.score(labels, labels, labels)["flips"] == 0
    assert shortcut.score(labels, labels, labels)["accuracy"] == 1


def test_paired_slices_differ_in_the_letter_alone():
    config = shortcut.make_config("cross-entropy", 0.9, 0)
    assert config.data.phantom_mark == "0.95"
    clean, marked = shortcut.paired_slices(config)
    rows = np.arange(4)
    boxes = shortcut.letter_boxes(clean.subset(rows), marked.subset(rows), 64)
    assert 0 < boxes.mean() < 0.15
    for i in rows:
        changed = (clean.images[i] != marked.images[i])[..., 0]
        assert changed.any() and not (changed & (clean.lung_masks[i] > 0)).any()
        assert (marked.images[i][changed] == 255).all()


def test_alignment_shares_the_forward_pass_and_costs_nothing_at_weight_0():
    def step(objective):
        return alignment_cost.lowered_step(objective, "tiny", 32, 4)

    plain, full = step("cross-entropy"), step("full")
    assert step("alignment of weight 0").as_text() == plain.as_text() != full.as_text()
    plain, full = (s.compile().cost_analysis()["flops"] for s in (plain, full))
    # A ResNet-18 at 224 pixels has 2.15 (experiments/alignment_cost.py); a lost merge
    # of the two forward passes shows as a jump.
    assert 1.9 < full / plain < 2.3
