"""DICOM folders: whose a file is, under a pseudonym, and files without a suffix."""

import hashlib
import json

import numpy as np
import pytest
from test_transforms import dicom as dicom_bytes

from cxai_jax.data import dicom, folder, prepare


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
    assert dicom.patients(files) == ["", "", ""]
