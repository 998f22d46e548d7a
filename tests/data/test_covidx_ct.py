"""COVIDx-CT in a miniature of the published layout: lists, patients, boxes, errors."""

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cxai_jax import data
from cxai_jax.data import covidx_ct, prepare

WIDTH, HEIGHT = 48, 40
BOX = (4, 6, 44, 36)  # Of every image: left, top, right, bottom.
# Names as the lists have them, and their patients in metadata.csv.
NAMED = {
    0: ("normal{0}_patient{0}_SR_2_IM0000{1}.png", "patient{0}"),
    1: ("CP_{0}_34_000{1}.png", "CP_{0}"),
    2: ("volume-covid19-A-00{0}_1_ct-00{1}.png", "volume-covid19-A-00{0}_1"),
}
PATIENTS = {"train": (10, 11), "val": (12,), "test": (13,)}


def make_covidx(root, version="CT-2A", slices=2, folder="2A_images"):
    """The lists, metadata.csv and a folder of images; every patient has `slices`."""
    images = root / folder
    images.mkdir(parents=True, exist_ok=True)
    random, rows = np.random.default_rng(0), ["patient id,source,finding"]
    for part, patients in PATIENTS.items():
        lines = []
        for label, (name, patient) in NAMED.items():
            for number in patients:
                rows.append(f"{patient.format(number)},made,x")
                for i in range(slices):
                    file = name.format(number, i)
                    pixels = random.integers(0, 80, (HEIGHT, WIDTH), np.uint8)
                    pixels[8:34, 6 : 14 + 14 * label] += 120  # Flips keep its size.
                    Image.fromarray(pixels).save(images / file)
                    lines.append(f"{file} {label} {' '.join(map(str, BOX))}\n")
        (root / f"{part}_COVIDx_{version}.txt").write_text("".join(lines))
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


def command(capsys, root, *options):
    """Exit code, stdout and the errors of the preparation."""
    where = [f"--source={root}", f"--data_dir={root / 'data'}"]
    code = prepare.main(["--dataset=covidx_ct", *where, *options])
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if not line.endswith("images")]


def opened(root, name="covidx_ct", split=""):
    fields = {"name": name, "data_dir": str(root / "data"), "split": split}
    return data.load(ConfigDict(fields | {"fold": "", "split_seed": 0}))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The miniature, whole and cropped."""
    root = make_covidx(tmp_path_factory.mktemp("covidx"))
    for split in ("CT-2A", "CT-2A-body"):
        where = [f"--source={root}", f"--data_dir={root / 'data'}"]
        assert prepare.main(["--dataset=covidx_ct", *where, f"--split={split}"]) == 0
    return root


def test_three_classes_and_the_published_split(prepared):
    dataset = opened(prepared)
    assert dataset.class_names == ("Normal", "Pneumonia", "COVID-19")
    assert dataset.class_names[dataset.positive] == "COVID-19"
    assert dataset.split_scheme == "official (CT-2A)"
    assert dataset.leakage["verdict"] == "clean"
    for part, patients in PATIENTS.items():
        records = dataset.splits[part]
        assert np.bincount(records.labels).tolist() == [2 * len(patients)] * 3
        for name, label, patient in zip(
            records.names, records.labels, records.patients, strict=True
        ):
            numbers = [n for n in patients if patient == NAMED[label][1].format(n)]
            assert len(numbers) == 1 and str(numbers[0]) in name
        assert {image.shape for image in records.images} == {(256, 307, 1)}
        assert records.shapes == {(256, 307, 1)}


def test_two_classes_are_the_same_images_without_pneumonia(prepared):
    three, two = opened(prepared), opened(prepared, "covidx_ct_binary")
    assert two.name == "covidx_ct_binary" and two.fingerprint != three.fingerprint
    assert two.class_names == ("Normal", "COVID-19") and two.positive == 1
    for part, records in two.splits.items():
        whole = three.splits[part]
        kept = whole.labels != 1
        assert records.names.tolist() == whole.names[kept].tolist()
        assert (records.labels == (whole.labels[kept] == 2)).all()
        assert records.labels.dtype == np.int32
        np.testing.assert_array_equal(
            records.images[-1], whole.images[int(np.flatnonzero(kept)[-1])]
        )
    assert two.leakage["verdict"] == "of all three classes: clean"


def test_the_body_is_cut_out_before_the_image_is_scaled(prepared):
    cropped = opened(prepared, split="CT-2A-body")
    assert cropped.split_scheme == "official (CT-2A), cropped to the body"
    records = cropped.splits["val"]
    source = Image.open(prepared / "2A_images" / records.names[0]).crop(BOX)
    expected = source.resize((341, 256), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(records.images[0][..., 0], np.asarray(expected))


def test_data_that_an_earlier_version_prepared_have_no_shapes(prepared, tmp_path):
    shutil.copytree(prepared / "data", tmp_path / "data")
    path = tmp_path / "data" / "covidx_ct" / "CT-2A" / "1.0.0" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["shapes"]
    path.write_text(json.dumps(summary))
    assert opened(tmp_path).splits["test"].shapes is None


def test_patients_are_found_in_names():
    known = {"NCP_9", "NCP_96", "patient7", "volume-covid19-A-0047", "coronacases_010"}
    for name, patient in (
        ("NCP_96_1328_0032.png", "NCP_96"),
        ("NCP_961_1328_0032.png", ""),
        ("137covid_patient7_SR_2_IM00014.png", "patient7"),
        ("137covid_patient76_SR_2_IM00014.png", ""),
        ("volume-covid19-A-0047_ct-0010.png", "volume-covid19-A-0047"),
        ("coronacases_010-0075.png", "coronacases_010"),
    ):
        assert covidx_ct.patient_of(name, known) == patient
    # The longer of two ids that both are the beginning.
    known.add("volume-covid19-A-0047_1")
    name = "volume-covid19-A-0047_1_ct-0010.png"
    assert covidx_ct.patient_of(name, known) == "volume-covid19-A-0047_1"


def test_ct_1_beside_its_images_and_without_metadata(tmp_path, capsys):
    root = make_covidx(tmp_path, "CT-1", folder=".")
    (root / "metadata.csv").unlink()
    Image.new("L", (9, 9)).save(root / "stray.png")
    code, out, err = command(capsys, root, "--split=CT-1")
    assert code == 0 and not err
    assert "no patient ids: shared patients cannot be ruled out" in out
    assert "stray.png: in none of the three lists" in out
    assert opened(root, split="CT-1").split_scheme == "official (CT-1)"
    with pytest.raises(FileNotFoundError, match="prepared splits of covidx_ct: CT-1"):
        opened(root)


def line(root, number, text, part="test"):
    """Replaces a line of a list, its number counted from 1; returns the list."""
    listing = root / f"{part}_COVIDx_CT-2A.txt"
    lines = listing.read_text().splitlines()
    lines[number - 1] = text
    listing.write_text("\n".join(lines) + "\n")
    return listing


@pytest.mark.parametrize(
    "text,reason",
    [
        (
            "absent.png 0 4 6 44 36",
            "'absent.png' is not in {root}/2A_images (1 such lines); restore it or "
            "remove the line",
        ),
        (
            "../metadata.csv 0 4 6 44 36",
            "'../metadata.csv' is not in {root}/2A_images (1 such lines); restore it "
            "or remove the line",
        ),
        (
            "CP_13_34_0001.png 3 4 6 44 36",
            "class 3, expected one of 0 Normal, 1 Pneumonia, 2 COVID-19",
        ),
        (
            "CP_13_34_0001.png 1 4 6 4 36",
            "the box 4 6 4 36 of 'CP_13_34_0001.png' has no area or begins outside "
            "the image; expected 0 <= xmin < xmax and 0 <= ymin < ymax",
        ),
        (
            "CP_13_34_0001.png 1 4 -1 44 36",
            "the box 4 -1 44 36 of 'CP_13_34_0001.png' has no area or begins outside "
            "the image; expected 0 <= xmin < xmax and 0 <= ymin < ymax",
        ),
        (
            "CP_13_34_0001.png 1",
            "'CP_13_34_0001.png 1' is not `file class xmin ymin xmax ymax`",
        ),
        (
            "CP_13_34_0001.png 1 4 6 44 3.6",
            "'CP_13_34_0001.png 1 4 6 44 3.6' is not `file class xmin ymin xmax ymax`",
        ),
        (
            "CP_10_34_0000.png 1 4 6 44 36",
            "'CP_10_34_0000.png' is listed already ({root}/train_COVIDx_CT-2A.txt, "
            "line 5); keep one line",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, capsys, text, reason):
    root = make_covidx(tmp_path)
    listing = line(root, 4, text)
    code, _, err = command(capsys, root)
    said = f"error: {listing}, line 4: {reason.format(root=root)}"
    assert (code, err) == (2, [said])
    assert not (root / "data" / "covidx_ct").exists()


@pytest.mark.parametrize("split", ["CT-2A", "CT-2A-body"])
def test_a_box_outside_the_image_is_named_or_left_out(tmp_path, capsys, split):
    root = make_covidx(tmp_path)
    listing = line(root, 4, "CP_13_34_0001.png 1 4 6 49 36")
    said = (
        f"{root}/2A_images/CP_13_34_0001.png: {listing}, line 4: the box 4 6 49 36 "
        "exceeds its 48 x 40 pixels; mend the line"
    )
    code, _, err = command(capsys, root, f"--split={split}")
    assert (code, err) == (2, [f"error: {said}; or pass --skip_bad"])
    code, out, err = command(capsys, root, f"--split={split}", "--skip_bad")
    assert code == 0 and not err
    assert f"left out: 1 files\n  CP_13_34_0001.png: {said}" in out


def test_an_image_of_no_patient_is_named_or_left_out(tmp_path, capsys):
    root = make_covidx(tmp_path)
    table = root / "metadata.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join(row for row in rows if "CP_11" not in row))
    code, _, err = command(capsys, root)
    said = (
        f"'CP_11_34_0000.png' is of no patient that {table} has "
        f"({root}/train_COVIDx_CT-2A.txt, line 7) (2 such images); list it, or pass "
        "--skip_bad to leave them out"
    )
    assert (code, err) == (2, [f"error: {said}"])
    code, out, _ = command(capsys, root, "--skip_bad")
    assert code == 0 and "left out: 2 files\n  CP_11_34_0000.png: of no" in out
    summary = root / "data" / "covidx_ct" / "CT-2A" / "1.0.0" / "summary.json"
    counts = json.loads(summary.read_text())["counts"]
    assert counts["train"] == {"Normal": 4, "Pneumonia": 2, "COVID-19": 4}


def test_a_bad_table_list_folder_or_split_is_named(tmp_path, capsys):
    root = make_covidx(tmp_path)
    table = root / "metadata.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join([*rows[:3], ",made,x", *rows[3:]]))
    fill = "no patient id; fill the cell in or remove the row"
    assert command(capsys, root)[2] == [f"error: {table}, line 4: {fill}"]
    table.write_text("patient,finding\nCP_10,x\n")
    expected = f"error: {table} has no rows with a column 'patient id'"
    assert command(capsys, root)[2] == [expected]
    listing = root / "val_COVIDx_CT-2A.txt"
    listing.write_text("\n")
    assert command(capsys, root)[2] == [f"error: {listing} is empty"]
    listing.unlink()
    assert command(capsys, root)[2] == [f"error: {listing}: no such file"]
    assert command(capsys, root, "--split=CT-2B")[2] == [
        "error: unknown split 'CT-2B' of covidx_ct; known: CT-2A, CT-2A-body, CT-1, "
        "CT-1-body, CT-3A, CT-3A-body"
    ]
    assert command(capsys, root / "x")[2] == [
        f"error: {root / 'x'}: no such folder; give --source the folder that holds the "
        "lists"
    ]
