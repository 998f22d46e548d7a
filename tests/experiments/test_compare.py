"""Several systems, several seeds: configs, paired differences, the table."""

import numpy as np
import pytest

from experiments import compare


def a_run(labels, positive_probs, patients=None, votes=None, names=None, sites=None):
    labels, p = np.array(labels), np.array(positive_probs, float)
    probs = np.stack([1 - p, p], -1)[:, None]
    if votes is not None:  # Probabilities of class 1 of every masked image [N, k].
        votes = np.array(votes, float)
        probs = np.concatenate([probs, np.stack([1 - votes, votes], -1)], 1)
    names = np.array(names or [f"{i}.png" for i in range(len(labels))])
    patients = np.array([""] * len(labels) if patients is None else patients)
    about = {"class_names": ["healthy", "ill"], "positive": "ill"}
    about["site_names"] = ["north"] if sites is None else ["north", "south", "west"]
    results = {"data": about, "config": {"tta": {"theta": 0.5}}}
    return {
        "labels": labels,
        "probs": probs,
        "names": names,
        "patients": patients,
        "sites": np.zeros(len(labels), int) if sites is None else np.array(sites),
        "results": results,
    }


def test_scores_mean_deviation_and_paired_difference():
    labels = [1, 1, 0, 0]
    good, fair = [0.9, 0.8, 0.1, 0.2], [0.9, 0.4, 0.1, 0.2]  # Accuracy 1 and 0.75.
    runs = {
        "a": [a_run(labels, fair), a_run(labels, good)],
        "b": [a_run(labels, good), a_run(labels, good)],
    }
    table = compare.compare(runs)
    assert table["a"]["accuracy"]["mean"] == pytest.approx(0.875)
    assert table["a"]["accuracy"]["sd"] == pytest.approx(np.std([0.75, 1], ddof=1))
    assert table["a"]["f1"]["seeds"] == pytest.approx([2 / 3, 1])
    assert table["a"]["auc"]["seeds"] == pytest.approx([1, 1])
    assert "difference" not in table["a"]["accuracy"]
    gain = table["b"]["accuracy"]["difference"]
    assert gain["seeds"] == pytest.approx([0.25, 0])
    assert gain["low"] == 0 and 0.125 < gain["high"] <= 0.5
    assert "a" in compare.describe(table).splitlines()


def test_interval_resamples_whole_patients():
    # Two patients, one right and one wrong: a resample has accuracy 0, a half or 1.
    labels, probs = [1] * 50 + [0] * 50, [0.9] * 100
    patients = ["p"] * 50 + ["q"] * 50
    whole = compare.compare({"a": [a_run(labels, probs, patients)]})
    single = compare.compare({"a": [a_run(labels, probs)]})
    assert (whole["a"]["accuracy"]["low"], whole["a"]["accuracy"]["high"]) == (0, 1)
    assert single["a"]["accuracy"]["low"] > 0.35
    assert whole["a"]["accuracy"]["sd"] is None  # One seed says nothing about it.


def test_difference_of_equal_systems_is_zero_in_every_resample():
    runs = [a_run([1, 0, 1, 0], [0.9, 0.8, 0.4, 0.1])]
    gain = compare.compare({"a": runs, "b": runs})["b"]["f1"]["difference"]
    assert (gain["mean"], gain["low"], gain["high"]) == (0, 0, 0)


def test_votes_are_scored_where_there_are_some():
    votes = [[0.1, 0.2, 0.9], [0.9, 0.9, 0.9]]  # Two of three oppose the first label.
    table = compare.compare({"a": [a_run([0, 1], [0.9, 0.9], votes=votes)]})["a"]
    assert table["accuracy"]["mean"] == 0.5
    assert table["accuracy after voting"]["mean"] == 1


def test_sites_are_scored_before_and_after_voting_with_precision_and_recall():
    labels, sites = [1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]
    first = [0.9, 0.9, 0.1, 0.9, 0.1, 0.1]
    votes = np.repeat([[0.9], [0.1], [0.1], [0.1], [0.1], [0.1]], 3, axis=1)
    table = compare.compare({"a": [a_run(labels, first, votes=votes, sites=sites)]})
    mean = {name: value["mean"] for name, value in table["a"].items()}
    assert mean["precision"] == pytest.approx(2 / 3)
    assert mean["recall"] == pytest.approx(2 / 3)
    assert mean["north: precision"] == 0.5 and mean["north: recall"] == 1
    assert mean["north: precision after voting"] == 1
    assert mean["north: accuracy after voting"] == 1
    assert mean["south: recall"] == 0.5 and mean["south: precision"] == 1
    assert mean["south: recall after voting"] == 0  # No one is called ill: 0/0 is 0.
    assert mean["south: precision after voting"] == 0
    assert mean["north: auc"] == 0.75 and mean["south: auc"] == 0.75
    assert not any("auc after voting" in name for name in mean)
    assert not any(name.startswith("west") for name in mean)  # Not in this split.
    assert set(mean) >= {f"south: {n}" for n in mean if ":" not in n}


def test_systems_must_share_their_test_images():
    one, other = a_run([1, 0], [0.9, 0.1]), a_run([1, 0], [0.9, 0.1], names=["x", "y"])
    with pytest.raises(ValueError, match="b were tested on different images"):
        compare.compare({"a": [one], "b": [other]})


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
