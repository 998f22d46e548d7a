"""DICOM folders: whose a file is, under a pseudonym, and files without a suffix."""

import hashlib
import io
import json

import numpy as np
import pytest
from test_transforms import dicom as dicom_bytes

from cxai_jax.data import dicom, folder, prepare, store, transforms


@pytest.fixture
def source(tmp_path):
    """Two classes of DICOM files without suffix; patients have two files each."""
    pytest.importorskip("pydicom")
    for k, name in enumerate(("Normal", "TB")):
        (tmp_path / "s" / name).mkdir(parents=True)
        for i in range(12):
            values = np.random.default_rng([k, i]).integers(0, 99, (8, 8))
            data = dicom_bytes(values, PatientID=f"Doe^{k}{i // 2}", Modality="DX")
            (tmp_path / "s" / name / f"IM{i:03}").write_bytes(data)
        (tmp_path / "s" / name / "README").write_text("no image")
    return tmp_path


def test_patients_are_kept_whole_under_a_pseudonym(source, capsys):
    plan = folder.plan_folder(source / "s")
    assert len(plan.sources) == 24 and plan.split_scheme == "patient-disjoint"
    for one in plan.sources:
        number = f"{one.label}{int(one.name[-3:]) // 2}"
        digest = hashlib.sha256(f"\0Doe^{number}".encode()).hexdigest()
        assert one.patient == f"patient-{digest[:16]}"
    homes = {}
    for one in plan.sources:
        homes.setdefault(one.patient, set()).add(one.split)
    assert len(homes) == 12 and all(len(home) == 1 for home in homes.values())
    assert [name for name, _ in plan.left_out] == ["Normal/README", "TB/README"]
    options = ["--dataset=folder", f"--source={source / 's'}"]
    assert prepare.main([*options, f"--data_dir={source / 'd'}"]) == 0
    for file in (source / "d").rglob("*"):
        assert file.is_dir() or b"Doe" not in file.read_bytes(), file
    summary = next((source / "d").rglob("summary.json"))
    assert json.loads(summary.read_text())["leakage"]["unknown_patients"] == 0


def test_ids_are_written_out_where_asked(source):
    plan = folder.plan_folder(source / "s", keep_ids=True)
    assert {one.patient[:4] for one in plan.sources} == {"Doe^"}


def test_a_table_of_patients_comes_first(source):
    (source / "s" / "patients.csv").write_text("file,patient\nTB/IM000,7\n")
    plan = folder.plan_folder(source / "s")
    assert {one.patient for one in plan.sources} == {"", "7"}


def test_what_is_no_dicom_has_no_patient(tmp_path):
    (tmp_path / "a").write_bytes(bytes(128) + b"DICM and nothing else")
    (tmp_path / "b.png").write_bytes(b"")
    files = [tmp_path / name for name in ("a", "b.png", "absent")]
    assert dicom.headers(files) == [dicom.Header("", 1)] * 3


@pytest.fixture
def slices(tmp_path):
    """Per class four files of three frames and two series folders of four files."""
    pytest.importorskip("pydicom")
    for k, name in enumerate(("Normal", "TB")):
        home = tmp_path / "s" / name
        for i in range(4):
            noise = np.random.default_rng([k, i]).integers(0, 9, (3, 8, 8))
            values = 40 * np.arange(3)[:, None, None] + noise
            tags = {"SeriesInstanceUID": f"1.2.{k}.{i}", "WindowCenter": 64}
            if i == 3:
                tags["PatientID"] = "Doe"
            data = dicom_bytes(values, WindowWidth=128, NumberOfFrames=3, **tags)
            home.mkdir(parents=True, exist_ok=True)
            (home / f"many{i}.dcm").write_bytes(data)
        for series in range(2):
            (home / f"series{series}").mkdir()
            for i in range(4):
                values = np.random.default_rng([k, series, i]).integers(0, 99, (8, 8))
                uid = f"1.3.{k}.{series}"
                photometric = "MONOCHROME1" if i == 0 else "MONOCHROME2"
                data = dicom_bytes(
                    values,
                    SeriesInstanceUID=uid,
                    PhotometricInterpretation=photometric,
                )
                (home / f"series{series}" / f"IM{i}").write_bytes(data)
            (home / f"series{series}" / "DICOMDIR").write_bytes(b"no image")
    return tmp_path


def test_frames_and_series_are_slices_of_one_patient(slices, capsys):
    plan = folder.plan_folder(slices / "s", keep_ids=True)
    assert len(plan.sources) == 2 * (4 * 3 + 2 * 4)
    patients = {}
    for one in plan.sources:
        patients.setdefault(one.patient, []).append(one)
    assert len(patients) == 2 * (3 + 2) + 1 and len(patients["Doe"]) == 6
    assert {len(own) for name, own in patients.items() if name != "Doe"} == {3, 4}
    assert all(len({one.split for one in own}) == 1 for own in patients.values())
    assert plan.split_scheme == (
        "patient-disjoint, a DICOM series without PatientID taken for a patient"
    )
    frames = [one.name for one in plan.sources if one.name.startswith("TB/many1")]
    assert frames == ["TB/many1.dcm#1", "TB/many1.dcm#2", "TB/many1.dcm#3"]
    hashed = folder.plan_folder(slices / "s").sources
    assert not any("1.2." in one.patient or "Doe" in one.patient for one in hashed)
    options = [f"--source={slices / 's'}", f"--data_dir={slices / 'd'}"]
    assert prepare.main(["--dataset=folder", *options]) == 0
    said = capsys.readouterr().out
    assert "DICOM: 4 images MONOCHROME1, inverted so that air is dark" in said
    assert "DICOM: 12 images no window, shown from its lowest to its highest" in said
    splits = store.load("folder", "default", slices / "d").splits
    means = {
        str(name): int(image.mean())
        for records in splits.values()
        for name, image in zip(records.names, records.images, strict=True)
    }
    dark, middle, bright = (means[name] for name in frames)
    assert dark < 30 and 70 < middle - dark < 90 and 70 < bright - middle < 90


def test_a_damaged_file_of_frames_is_one_line(slices, capsys):
    path = slices / "s" / "TB" / "many0.dcm"
    path.write_bytes(path.read_bytes()[:-80])
    options = [f"--source={slices / 's'}", f"--data_dir={slices / 'd'}"]
    assert prepare.main(["--dataset=folder", *options]) == 2
    assert "many0.dcm: " in capsys.readouterr().err
    assert prepare.main(["--dataset=folder", "--skip_bad", *options]) == 0
    assert "left out: " in capsys.readouterr().out


def test_a_folder_that_is_no_series_is_still_refused(slices):
    (slices / "s" / "TB" / "series0" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds the folder 'series0'"):
        folder.plan_folder(slices / "s")


@pytest.mark.parametrize(
    ("tags", "said"),
    [
        ({"PhotometricInterpretation": "MONOCHROME1"}, ["MONOCHROME1, inverted so"]),
        ({"PhotometricInterpretation": "YBR_FULL"}, ["YBR_FULL, not MONOCHROME"]),
        ({"PhotometricInterpretation": ""}, ["no photometric interpretation, not"]),
        ({"Modality": "CT"}, []),
        ({"Modality": "DX"}, ["no window, shown from its lowest"]),
        ({"Modality": "DX", "WindowCenter": 1, "WindowWidth": 2}, []),
    ],
)
def test_photometric_oddities_are_named(tags, said):
    pytest.importorskip("pydicom")
    found = dicom.oddities(dicom_bytes(np.eye(8, dtype=int), **tags))
    assert len(found) == len(said)
    assert all(one.startswith(words) for one, words in zip(found, said, strict=True))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, [0, 64, 128, 255]),
        ({"WindowCenter": 0.5, "WindowWidth": 1}, [0, 128, 255, 255]),
        (
            {"WindowCenter": 1, "WindowWidth": 2, "VOILUTFunction": "SIGMOID"},
            [30, 69, 128, 225],
        ),
    ],
)
def test_floats_have_no_bits_stored(tags, expected):
    pydicom = pytest.importorskip("pydicom")
    values = np.array([[0, 0.5, 1, 2]], "<f4")
    dataset = pydicom.dcmread(io.BytesIO(dicom_bytes(np.zeros((1, 4)), **tags)))
    for key in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(dataset, key)
    dataset.BitsAllocated, dataset.FloatPixelData = 32, values.tobytes()
    dataset.Modality = "OT"
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    assert transforms.memory(file.getvalue()) > 0
    (gray,) = transforms.decode_frames(file.getvalue(), "a.dcm")
    assert gray[0].tolist() == expected
