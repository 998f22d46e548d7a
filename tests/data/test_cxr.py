"""Chest X-rays: what becomes of the table, the masks, and a folder of three classes."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import cxr as cxr_config
from cxai_jax import data
from cxai_jax import mesh as meshes
from cxai_jax.data import cxr, folder, pipeline, prepare, store
from cxai_jax.data.records import Dataset, Records
from cxai_jax.methods.method import Network
from cxai_jax.scoring import evaluate
from cxai_jax.training import run as runs

HEADER = "filename,patientid,finding,view,lung_mask,license\n"


def make_source(root, patients=12):
    """Two images per patient; every patient's first image has a lung mask."""
    rng = np.random.default_rng(0)
    for name in ("images", "lung_masks"):
        (root / name).mkdir(parents=True)
    rows = []
    for p in range(patients):
        finding = ("COVID-19", "COVID-19, ARDS", "SARS", "No Finding")[p % 4]
        for i in range(2):
            pixels = rng.integers(0, 256, (40, 50), np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{p}-{i}.jpg")
            rows.append([f"{p}-{i}.jpg", f"{p}", finding, "PA", "", ""])
        mask = np.zeros((40, 50), np.uint8)
        mask[10:30, 5:20] = 255
        Image.fromarray(mask).save(root / "lung_masks" / f"{p}-0.png")
        rows[-2][4] = f"{p}-0.png"
    write_table(root, rows)
    return rows


def write_table(root, rows):
    lines = [",".join(f'"{cell}"' for cell in row) + "\n" for row in rows]
    (root / "metadata.csv").write_text(HEADER + "".join(lines))


def settings(data_dir, split="", name="cxr"):
    fields = {"name": name, "split": split, "data_dir": str(data_dir)}
    return ConfigDict(fields | {"fold": "", "split_seed": 0})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root, data_dir = (tmp_path_factory.mktemp(name) for name in ("cxr", "data"))
    make_source(root / "source")
    for split in ("seed0", "seed1"):
        store.build(cxr.plan_cxr(root / "source", split), data_dir)
    return data_dir


def test_labels_patients_and_splits(prepared):
    dataset = data.load(settings(prepared))
    assert dataset.class_names == ("other finding", "COVID-19")
    assert dataset.positive == 1
    assert sum(map(len, dataset.splits.values())) == 24
    seen = set()
    for records in dataset.splits.values():
        expected = [int(p) % 4 < 2 for p in records.patients]
        np.testing.assert_array_equal(records.labels, expected)
        assert seen.isdisjoint(records.patients)
        seen |= set(records.patients)


def test_the_seed_changes_the_split(prepared):
    splits = [data.load(settings(prepared, s)).splits for s in ("seed0", "seed1")]
    first, second = ([set(s[k].patients) for k in s] for s in splits)
    assert first != second


def test_masks_come_back_where_they_exist(prepared):
    train = data.load(settings(prepared)).splits["train"]
    for i, name in enumerate(train.names):
        mask = train.lung_masks[i]
        if str(name).endswith("-1.jpg"):
            assert mask is None
            continue
        assert mask.dtype == np.uint8 and mask.shape == train.images[i].shape[:2]
        # 40 x 50 pixels were enlarged to 256 x 320.
        expected = np.zeros((256, 320), bool)
        expected[64:192, 32:128] = True
        assert (mask.astype(bool) != expected).mean() < 0.01


def test_masks_reach_the_batch(prepared):
    train = data.load(settings(prepared)).splits["train"]

    def fit(image):
        return pipeline.transforms.squash(image, 32)

    batch = pipeline.decode(train, np.arange(2), fit, (32, 32, 1), True)
    with_mask = [str(n).endswith("-0.jpg") for n in train.names[:2]]
    share = (batch.masks > 127).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(share, np.where(with_mask, 0.15, 1.0), atol=0.02)


def test_rows_without_diagnosis_and_repeated_rows_are_listed(tmp_path):
    rows = make_source(tmp_path)
    rows[3][2] = "todo"
    rows.append([*rows[0][:1], "99", *rows[0][2:]])
    write_table(tmp_path, rows)
    plan = cxr.plan_cxr(tmp_path)
    left_out = dict(plan.left_out)
    assert "todo" in left_out["1-1.jpg"]
    assert "second row" in left_out["0-0.jpg"]
    assert [s.name for s in plan.sources].count("0-0.jpg") == 1
    assert len(plan.sources) == 23


def test_bad_tables_are_named(tmp_path):
    rows = make_source(tmp_path)
    with pytest.raises(ValueError, match="unknown split 'official' of cxr"):
        cxr.plan_cxr(tmp_path, "official")
    write_table(tmp_path, [*rows, [rows[0][0], "99", "SARS", "PA", "", ""]])
    with pytest.raises(ValueError, match="gives '0-0.jpg' two findings"):
        cxr.plan_cxr(tmp_path)
    write_table(tmp_path, [*rows, ["absent.jpg", "99", "SARS", "PA", "", ""]])
    with pytest.raises(FileNotFoundError, match="absent.jpg, but there is no such"):
        cxr.plan_cxr(tmp_path)
    (tmp_path / "metadata.csv").write_text("filename,finding\na.jpg,SARS\n")
    with pytest.raises(ValueError, match="without 'patientid'"):
        cxr.plan_cxr(tmp_path)
    with pytest.raises(FileNotFoundError, match="metadata.csv: no such file"):
        cxr.plan_cxr(tmp_path / "elsewhere")


def test_a_mask_of_another_size_is_named(tmp_path):
    make_source(tmp_path / "source")
    wrong = tmp_path / "source" / "lung_masks" / "0-0.png"
    Image.fromarray(np.zeros((40, 49), np.uint8)).save(wrong)
    with pytest.raises(ValueError, match="0-0.png has 40 x 49 pixels but its image"):
        store.build(cxr.plan_cxr(tmp_path / "source"), tmp_path / "data")


def test_a_mask_term_is_refused_without_masks():
    config = cxr_config.get_config("mask")
    images = np.zeros((16, 8, 8, 1), np.uint8)
    labels = np.arange(16, dtype=np.int32) % 2
    names = labels.astype(str)
    fit = Records(images, labels, 0 * labels, names, names)
    dataset = Dataset("bare", {"train": fit, "val": fit}, ("a", "b"), ("",), 1, "", "")
    run = SimpleNamespace(
        config=config,
        mesh=meshes.make_mesh(1),
        sources={"": dataset},
        dataset=dataset,
        network=Network(None, {}, None),
    )
    with pytest.raises(ValueError, match="mask_weight=0.3 needs .* bare has none"):
        runs.make_plan(run)
    config.align.mask_weight = 0.0
    assert runs.make_plan(run).steps_per_epoch == 2


def test_the_shared_collection(shared):
    plan = cxr.plan_cxr(shared / "data" / "cxr")
    labels = np.array([source.label for source in plan.sources])
    assert labels.sum() == 426 and len(labels) == 526
    assert sum(source.lung_mask is not None for source in plan.sources) == 192
    patients = {}
    for source in plan.sources:
        assert patients.setdefault(source.patient, source.split) == source.split
    test = np.array([source.split == "test" for source in plan.sources])
    assert abs(labels[test].mean() - labels.mean()) < 0.02


def test_a_folder_of_three_classes(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("Normal", "Pneumonia", "COVID"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (30, 30), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "tree" / name / f"{i}.png")
    command = ["--dataset=folder", "--name=cxr3", f"--data_dir={tmp_path / 'data'}"]
    assert prepare.main([*command, f"--source={tmp_path / 'tree'}"]) == 0
    dataset = data.load(settings(tmp_path / "data", name="folder:cxr3"))
    assert dataset.class_names == ("COVID", "Normal", "Pneumonia")
    assert dataset.class_names[dataset.positive] == "COVID"
    test = dataset.splits["test"]
    logits = np.eye(3)[(test.labels + np.arange(len(test)) % 2) % 3] * 4
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predictions = {
        "names": test.names,
        "patients": test.patients,
        "labels": test.labels,
        "sites": test.sites,
        "probs": probs[:, None],
    }
    config = ConfigDict({"eval": {"bootstrap": 20}})
    scores = evaluate.score(predictions, dataset, config)["all"]
    chosen = probs.argmax(axis=1)
    assert scores["accuracy"] == pytest.approx((chosen == test.labels).mean())
    hits = ((chosen == 0) & (test.labels == 0)).sum()
    f1 = 2 * hits / ((chosen == 0).sum() + (test.labels == 0).sum())
    assert scores["f1"] == pytest.approx(f1)


def draw(path, shape=(30, 36), value=None):
    """A picture of noise, or of one gray value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.as_posix()))
    noise = rng.integers(0, 256, shape, np.uint8)
    pixels = noise if value is None else np.full(shape, value, np.uint8)
    Image.fromarray(pixels).save(path)


def test_split_folders_give_the_split(tmp_path):
    for split, count in (("train", 3), ("Val", 1), ("test", 2)):
        for name in ("Covid", "Normal", "Viral Pneumonia"):
            for i in range(count):
                draw(tmp_path / split / name / f"{i}.png")
    plan = folder.plan_folder(tmp_path)
    assert plan.class_names == ("Covid", "Normal", "Viral Pneumonia")
    assert plan.positive == 0 and plan.split_scheme == "given (folders)"
    assert {s.name: (s.split, s.label) for s in plan.sources} == {
        f"{given}/{name}/{i}.png": (split, label)
        for given, split, count in (
            ("train", "train", 3),
            ("Val", "val", 1),
            ("test", "test", 2),
        )
        for label, name in enumerate(plan.class_names)
        for i in range(count)
    }
    (tmp_path / "valid" / "Covid").mkdir(parents=True)
    with pytest.raises(ValueError, match="Val, test, train, valid: two are one split"):
        folder.plan_folder(tmp_path)
    shutil.rmtree(tmp_path / "valid")
    shutil.rmtree(tmp_path / "test" / "Normal")
    with pytest.raises(FileNotFoundError, match="Normal: no such folder"):
        folder.plan_folder(tmp_path)


def test_images_and_masks_inside_the_class_folders(tmp_path):
    for name in ("COVID", "Normal"):
        for i in range(4):
            draw(tmp_path / "s" / name / "images" / f"{name}-{i}.png")
            # Scaled down, as in the COVID-19 Radiography Database.
            draw(tmp_path / "s" / name / "masks" / f"{name}-{i}.png", (25, 30), 255)
    (tmp_path / "s" / "COVID" / "masks" / "COVID-0.png").unlink()
    store.build(folder.plan_folder(tmp_path / "s", "rx"), tmp_path / "d")
    dataset = data.load(settings(tmp_path / "d", name="folder:rx"))
    assert dataset.class_names == ("COVID", "Normal")
    for records in dataset.splits.values():
        for i, name in enumerate(records.names):
            image, mask = records.images[i], records.lung_masks[i]
            if name == "COVID/images/COVID-0.png":
                assert mask is None
            else:
                assert mask.shape == image.shape[:2] and mask.all()
    draw(tmp_path / "s" / "Normal" / "masks" / "Normal-1.png", (30, 30), 255)
    with pytest.raises(ValueError, match="30 x 30 pixels .* 30 x 36: another aspect"):
        store.build(folder.plan_folder(tmp_path / "s"), tmp_path / "d")
