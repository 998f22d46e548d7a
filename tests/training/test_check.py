"""`--mode=check` on the phantom, its warnings, and the flags of several hosts."""

from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from small import small

from configs import demo
from cxai_jax import hosts, train
from cxai_jax.data.records import Dataset, Records
from cxai_jax.training import check, preview, results
from cxai_jax.training import compile as compilation
from cxai_jax.training import run as runs


def records(labels, level=100):
    images = [np.full((40, 44, 1), level + i, np.uint8) for i in range(len(labels))]
    return Records(
        images,
        np.array(labels, np.int32),
        np.zeros(len(labels), np.int32),
        np.array([""] * len(labels)),
        np.array([f"{i}.png" for i in range(len(labels))]),
    )


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    workdir, config = tmp_path_factory.mktemp("check"), small()
    config.train.class_weights, config.augment.rotate = "auto", 10.0
    return workdir, check.check(config, workdir).splitlines()


def line(lines, start):
    found = [text for text in lines if text.removeprefix("! ").startswith(start)]
    assert len(found) == 1, lines
    return found[0]


def test_everything_is_looked_at_on_one_screen(checked):
    _, lines = checked
    assert len(lines) <= 24 and max(map(len, lines)) <= 160
    assert "jax" in line(lines, "versions") and "cpu" in line(lines, "devices")
    assert line(lines, "leakage").endswith("clean")
    assert "phantom" in line(lines, "data")
    assert "loss" in line(lines, "step") and "cpe" in line(lines, "step")
    # 28 training images in batches of 8 make 3 steps per epoch.
    total = round(3 * small().train.epochs)
    assert f"{total} steps" in line(lines, "time")
    assert "GB" in line(lines, "memory") or "MB" in line(lines, "memory")
    assert not [text for text in lines if text.startswith("!")]


def test_one_batch_is_learnt_by_heart(checked):
    _, lines = checked
    text = line(lines, "overfit").partition("loss ")[2]
    losses = [float(word) for word in text.split()]
    assert len(losses) == check.OVERFIT_STEPS and losses[-1] < losses[0]


def test_a_check_leaves_a_picture_and_claims_no_workdir(checked):
    workdir, _ = checked
    pixels = np.asarray(Image.open(workdir / "check.png"))
    assert pixels.ndim == 3 and np.unique(pixels).size > 50
    assert not (workdir / "config.json").exists()


def test_gray_levels_are_those_of_all_pixels():
    found = records([0, 1, 0])
    pixels = np.stack(found.images).astype(np.float64)
    mean, spread, sizes = check.gray_levels(found)
    np.testing.assert_allclose([mean, spread], [pixels.mean(), pixels.std()], rtol=1e-6)
    assert sizes == "40 x 44"


def test_what_deserves_a_look_is_marked():
    splits = {"train": records([0, 1]), "test": records([1, 1], level=200)}
    found = Dataset("x", splits, ("a", "b"), ("x",), 1, "given", "")
    lines = list(check.describe_data(found))
    marked = [text for text in lines if text.startswith("!")]
    assert "test has no image of a" in marked[0]
    assert "gray level" in marked[1]
    assert "not examined" in marked[2] and len(marked) == 3
    assert "positive class b" in lines[0]


def test_norms_of_each_site_need_the_same_sites_everywhere(tmp_path, monkeypatch):
    first, second = (
        SimpleNamespace(name=name, site_names=sites, class_names=("a", "b"))
        for name, sites in (("x", ("A", "B")), ("y", ("C",)))
    )
    sources = {"": first, "y": second}
    monkeypatch.setattr(runs, "load_sources", lambda config: sources)
    config = demo.get_config()
    config.model.norm = "per_site"
    with pytest.raises(ValueError, match="the sites of x, A, B; y has others: C"):
        runs.open_run(config, tmp_path)


def test_training_without_an_image_of_a_class_is_refused():
    found = Dataset("x", {"train": records([1, 1])}, ("a", "b"), ("x",), 1, "given", "")
    with pytest.raises(ValueError, match="config.data.fit='train' .* class 'a'"):
        runs.fit_records({"": found}, "train")


def test_swapped_labels_are_suspected(caplog):
    results.warn_below_chance({"intervals": {"auc": [0.4, 0.6]}})
    assert not caplog.records
    results.warn_below_chance({"intervals": {"auc": [0.1, 0.2]}})
    assert "swapped" in caplog.text and "0.20" in caplog.text


@pytest.mark.parametrize(
    "arguments,words",
    [
        ([], "with its equals sign; got 0"),
        (["--config", "configs/demo.py"], "with its equals sign; got 0"),
        (["--config=C:\\x\\configs\\demo.py"], "forward slashes"),
        (["--config=configs/demo.py:ful"], "known: baseline"),
        (["--config=configs/Demo.py"], "found: .*configs/demo.py"),
    ],
)
def test_a_mistyped_command_line_is_explained(arguments, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train.checked(arguments)


def test_an_unused_gpu_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setattr(check.jax, "default_backend", lambda: "cpu")
    assert check.unused_gpu(tmp_path / "nvidia0") == ""
    (tmp_path / "nvidia0").touch()
    assert "pip install 'jax[cuda13]'" in check.unused_gpu(tmp_path / "nvidia0")


class Memory:
    argument_size_in_bytes = 2_000_000_000
    temp_size_in_bytes = 16_000_000_000


def test_a_batch_too_large_is_told_the_size_that_fits():
    compilation.check_memory(Memory, 64, limit=18_000_000_000)
    compilation.check_memory(None, 64, limit=1)
    with pytest.raises(ValueError, match="batch_size=64 needs 18.0 GB of 10.0.*32 wou"):
        compilation.check_memory(Memory, 64, limit=10_000_000_000)


def test_out_of_memory_names_the_fields_to_change():
    text = train.out_of_memory(small())
    for word in ("config.train.batch_size=8", "config.tta.chunk=64", "remat"):
        assert word in text


@pytest.fixture
def joined(monkeypatch):
    calls = []
    flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(hosts, "joined", lambda *a, **_: calls.append(a))
    return calls


def test_one_host_joins_nobody(joined):
    train.join_hosts()
    assert joined == []


def test_hosts_are_found_by_slurm_or_named(joined):
    with flagsaver.flagsaver(distributed=True):
        train.join_hosts()
    with flagsaver.flagsaver(coordinator="a:1", num_processes=2, process_id=0):
        train.join_hosts()
    assert joined == [(None, None, None), ("a:1", 2, 0)]


def test_half_named_hosts_are_refused(joined):
    with flagsaver.flagsaver(coordinator="a:1"), pytest.raises(ValueError) as error:
        train.join_hosts()
    assert "--process_id" in str(error.value) and joined == []


def test_sheet_lays_tiles_in_rows_and_shrinks_large_ones():
    gray = np.full((10, 20), 7, np.uint8)
    page = preview.sheet([gray] * (preview.COLUMNS + 1))
    assert page.shape == (24, 22 * preview.COLUMNS, 3)
    np.testing.assert_array_equal(page[:10, :20], 7)
    np.testing.assert_array_equal(page[12:22, :20], 7)
    assert not page[12:, 22:].any()
    large = preview.sheet([np.zeros((500, 300, 3), np.uint8)])
    assert large.shape[0] == preview.SIDE + 2


def test_class_map_sheet_has_images_above_maps():
    found = records([0, 1] * 6)
    number = len(found)
    maps = np.random.default_rng(0).random((number, 4, 4, 2)).astype(np.float32)
    predictions = {"probs": np.full((number, 1, 2), 0.5), "class_maps": maps}
    page = preview.class_map_sheet(predictions, found)
    assert page.shape == (2 * 42, 46 * preview.COLUMNS, 3)
    # Above gray, below coloured.
    assert (np.ptp(page[:42].astype(int), axis=-1) == 0).all()
    assert np.ptp(page[42:].astype(int), axis=-1).max() > 20


@pytest.mark.parametrize("title", ["COVID-19: 12 images", "كوفيد: 3 images", "C" * 40])
def test_a_title_is_above_its_row_and_never_cut(title):
    page = np.full((30, 100, 3), 200, np.uint8)
    found = preview.titled(page, title)
    np.testing.assert_array_equal(found[preview.TITLE :, :100], page)
    assert found.shape[1] >= 100 and (len(title) < 40 or found.shape[1] > 300)
    written = np.flatnonzero(found[: preview.TITLE].max((0, 2)))
    assert len(written) > 3 * len(title) and written[-1] < found.shape[1] - 1
