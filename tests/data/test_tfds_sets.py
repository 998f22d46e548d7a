"""Any image-classification data set that TFDS left on disk; TensorFlow stays out."""

import io
import struct
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cxai_jax.config import load_config_file
from cxai_jax.data import digits, tfds_sets, transforms
from cxai_jax.training import validate

COLOURS = [(200, 20, 30), (10, 20, 200)]


def config(folder, name, positive=""):
    fields = {"name": name, "data_dir": str(folder), "positive": positive}
    return ConfigDict(fields | {"digits_images": 0, "photographs": ""})


def prepare(folder, name, features, splits):
    """A data set as TFDS writes array_record; `splits`: name -> list of examples."""
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features(tfds.features)),
                disable_shuffling=True,
            )

        def _split_generators(self, _):
            return {split: enumerate(rows) for split, rows in splits.items()}

        def _generate_examples(self, split):
            return splits[split]

    tfds.disable_progress_bar()
    Small.name = name
    builder = Small(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()


def png(pixels):
    return io.BytesIO(transforms.encode_png(pixels))


def jpeg(colour, side=24):
    out = io.BytesIO()
    Image.new("RGB", (side, side + 8), colour).save(out, "JPEG")
    return io.BytesIO(out.getvalue())


def lesions(features):
    return {
        "scan": features.Image(shape=(None, None, 3), encoding_format="jpeg"),
        "finding": features.ClassLabel(names=["normal", "lesion"]),
        "patient_id": features.Text(),
        "image_id": features.Text(),
        "age": np.int32,
    }


def lesion(i):
    return {
        "scan": jpeg(COLOURS[i % 2], 24 + i),
        "finding": i % 2,
        "patient_id": f"p{i // 2}",
        "image_id": f"im{i}.jpg",
        "age": i,
    }


def mnist(features):
    return {
        "image": features.Image(shape=(28, 28, 1), encoding_format="png"),
        "label": features.ClassLabel(names=list(digits.CLASS_NAMES)),
    }


def as_tfrecord(folder):
    """Rewrites prepared array_record files in TFDS's older format."""
    from array_record.python.array_record_module import ArrayRecordReader

    for file in folder.glob("*.array_record*"):
        records = ArrayRecordReader(str(file)).read_all()
        name = file.name.replace("array_record", "tfrecord")
        (folder / name).write_bytes(b"".join(map(framed, records)))
        file.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


def framed(record):
    return struct.pack("<QI", len(record), 0) + record + bytes(4)


@pytest.mark.parametrize("older", [False, True])
def test_mnist_stands_beside_the_other_digits(tmp_path, older):
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28, 1), np.uint8)
    rows = [{"image": png(image), "label": i} for i, image in enumerate(images)]
    prepare(tmp_path, "mnist", mnist, {"train": rows[:4], "test": rows[4:]})
    if older:
        as_tfrecord(tmp_path / "mnist" / "1.0.0")
    dataset = tfds_sets.load(config(tmp_path, "tfds:mnist"))
    np.testing.assert_array_equal(dataset.splits["train"].images[..., :1], images[:4])
    np.testing.assert_array_equal(dataset.splits["test"].labels, [4, 5, 6])
    assert dataset.class_names == digits.CLASS_NAMES
    assert "tensorflow" not in sys.modules


def test_any_set_with_its_own_splits_names_and_patients(tmp_path, monkeypatch):
    splits = {
        "train": [lesion(i) for i in range(6)],
        "validation": [lesion(i) for i in range(6, 8)],
        "test": [lesion(i) for i in (0, 9, 10)],
    }
    prepare(tmp_path / "tensorflow_datasets", "lesions", lesions, splits)
    monkeypatch.setattr(tfds_sets.Path, "home", lambda: tmp_path)
    dataset = tfds_sets.load(config("data", "tfds:lesions"))
    assert {s: len(r) for s, r in dataset.splits.items()} == {
        "train": 6,
        "val": 2,
        "test": 3,
    }
    assert dataset.class_names == ("normal", "lesion") and dataset.positive == 1
    train = dataset.splits["train"]
    assert train.names[3] == "lesions/train/im3.jpg" and train.patients[3] == "p1"
    np.testing.assert_array_equal(train.labels, [0, 1] * 3)
    assert train.images[3].shape == (35, 27, 3) and train.images[3].dtype == np.uint8
    assert np.abs(train.images[3].mean((0, 1)) - COLOURS[1]).max() < 4
    assert dataset.leakage["verdict"] == (
        "1 of 3 test images are the same file as a training image; near duplicates not "
        "searched"
    )
    assert (
        dataset.fingerprint
        == tfds_sets.load(config("data", "tfds:lesions")).fingerprint
    )
    assert "tensorflow" not in sys.modules


def test_a_set_of_one_split_is_split_by_patient(tmp_path):
    rows = {"train": [lesion(i) for i in range(24)]}
    prepare(tmp_path, "lesions", lesions, rows)
    dataset = tfds_sets.load(config(tmp_path, "tfds:lesions"))
    assert dataset.split_scheme == "patient-disjoint, drawn here: TFDS has one split"
    patients = [set(dataset.splits[s].patients) for s in ("train", "val", "test")]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 12
    assert sum(len(records) for records in dataset.splits.values()) == 24
    for records in dataset.splits.values():
        number = int(records.names[0].rpartition("im")[2].removesuffix(".jpg"))
        assert records.images[0].shape == (32 + number, 24 + number, 3)


def test_splits_of_unknown_names_are_pooled_and_named(tmp_path):
    rows = {"fold1": [lesion(i) for i in range(12)]}
    rows["fold2"] = [lesion(i) for i in range(12, 24)]
    prepare(tmp_path, "lesions", lesions, rows)
    dataset = tfds_sets.load(config(tmp_path, "tfds:lesions"))
    assert dataset.split_scheme == (
        "patient-disjoint, drawn here from all: TFDS has fold1, fold2"
    )
    names = np.concatenate([records.names for records in dataset.splits.values()])
    assert len(set(names)) == 24
    assert {name.split("/")[1] for name in names} == {"fold1", "fold2"}
    for records in dataset.splits.values():
        number = int(records.names[-1].rpartition("im")[2].removesuffix(".jpg"))
        assert records.images[-1].shape == (32 + number, 24 + number, 3)
    rows = {"train": [lesion(i) for i in range(12)], "odd": [lesion(12)]}
    prepare(tmp_path, "more", lesions, rows)
    dataset = tfds_sets.load(config(tmp_path, "tfds:more"))
    assert dataset.split_scheme.endswith("drawn here from train: TFDS has train, odd")


def test_what_cannot_be_used_is_one_line(tmp_path):
    def cats(features):
        return lesions(features) | {
            "finding": features.ClassLabel(names=["cat", "dog"]),
        }

    prepare(tmp_path, "cats", cats, {"train": [lesion(i) for i in range(8)]})
    with pytest.raises(ValueError, match="not clear; name it with config.data.posi"):
        tfds_sets.load(config(tmp_path, "tfds:cats"))
    assert tfds_sets.load(config(tmp_path, "tfds:cats", "dog")).positive == 1
    with pytest.raises(ValueError, match="config.data.positive=cow is none of the"):
        tfds_sets.load(config(tmp_path, "tfds:cats", "cow"))

    def pair(features):
        image = features.Image(shape=(None, None, 3))
        return {"a": image, "b": image, "label": features.ClassLabel(num_classes=2)}

    both = {"a": jpeg(COLOURS[0]), "b": jpeg(COLOURS[1]), "label": 0}
    prepare(tmp_path, "pairs", pair, {"train": [both]})
    with pytest.raises(ValueError, match=r"features a \(Image\), b \(Image\), label"):
        tfds_sets.load(config(tmp_path, "tfds:pairs"))
    prepare(tmp_path, "gaps", lesions, {"test": [lesion(1) | {"finding": -1}]})
    with pytest.raises(ValueError, match="gaps/test of TFDS: 1 of 1 images have no"):
        tfds_sets.load(config(tmp_path, "tfds:gaps"))


def test_what_is_not_on_disk_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_sets.Path, "home", lambda: tmp_path / "home")
    for name in ("tfds:mnist", "tfds:", "tfds:../x"):
        with pytest.raises(FileNotFoundError, match=r"\(prepared there: nothing\)"):
            tfds_sets.load(config(tmp_path, name))


def test_the_newest_version_counts(tmp_path):
    for version in ("9.0.0", "10.0.0", "1.2.3"):
        (tmp_path / "a" / version).mkdir(parents=True)
        (tmp_path / "a" / version / "dataset_info.json").write_text("{}")
    assert tfds_sets.find("a", [tmp_path]).name == "10.0.0"
    with pytest.raises(ValueError, match="is damaged .*; prepare it again"):
        tfds_sets.open_builder(tmp_path / "a" / "9.0.0", "a")


def test_tfrecord_files_are_read_without_tensorflow(tmp_path):
    file = tmp_path / "x.tfrecord"
    bodies = [b"one", b"", b"three"]
    file.write_bytes(b"".join(map(framed, bodies)))
    assert list(tfds_sets.tfrecords(file)) == bodies
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="ends inside a record; prepare it again"):
        list(tfds_sets.tfrecords(file))


def test_other_data_have_their_positive_class_already():
    settings = load_config_file("demo")
    settings.data.positive = "COVID-19"
    with pytest.raises(ValueError, match="positive='COVID-19' is for tfds:NAME"):
        validate.check_config(settings)
