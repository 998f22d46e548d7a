"""The measurement at scale, on a few hundred slices: what it makes is what it says."""

from types import SimpleNamespace

from cxai_jax import data
from experiments import covidx_scale


def test_every_stage_measures_what_the_one_before_left(tmp_path, monkeypatch):
    monkeypatch.setattr(covidx_scale, "DISTINCT", 10)
    options = SimpleNamespace(slices=480, side=32, folder=tmp_path, read=None)
    found = {
        name: covidx_scale.measured(stage, options)
        for name, stage in covidx_scale.STAGES.items()
    }
    images = list((tmp_path / "source" / "images").iterdir())
    # Ten pictures of each class: three in train, two in val, one in test.
    assert len(images) == 480 and len({f.stat().st_ino for f in images}) == 60
    assert found["prepare"]["images"] == 480
    assert found["prepare"]["leakage"] == "clean"
    dataset = data.load(covidx_scale.make_config(options).data)
    sizes = {split: len(records) for split, records in dataset.splits.items()}
    assert sizes == {"train": 360, "val": 80, "test": 40}
    assert found["read"]["images"] == 320  # Whole batches of 64.
    assert all(f["peak_mb"] > 0 and f["wall_s"] >= 0 for f in found.values())
