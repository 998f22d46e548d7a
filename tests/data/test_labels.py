"""labels.csv: what it says is what is stored, and what is wrong in it is named."""

import numpy as np
import pytest
from PIL import Image

from cxai_jax.data import folder


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(path)


@pytest.fixture
def source(tmp_path):
    for i in range(8):
        picture(tmp_path / "scans" / f"größe {i}.png")
    return tmp_path


def write(source, header, rows, end="\n", encoding="utf-8"):
    text = end.join([header, *(",".join(row) for row in rows)]) + end
    (source / "labels.csv").write_bytes(text.encode(encoding))


def rows_of(number=8):
    return [(f"scans/größe {i}.png", ("Normal", "TB")[i % 2]) for i in range(number)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_any_line_end_and_byte_order_mark(source, encoding, end):
    write(source, "file,label", rows_of(), end, encoding)
    plan = folder.plan_folder(source, "mine")
    assert plan.class_names == ("Normal", "TB") and plan.positive == 1
    assert plan.split_scheme == "random (image-level)"
    assert plan.site_names == ("mine",)
    assert [(s.name, s.label) for s in plan.sources] == [
        (name, int(label == "TB")) for name, label in rows_of()
    ]
    assert all(s.file.is_file() for s in plan.sources)


def test_patients_splits_and_sites(source):
    parts = ("train", "test", "val")
    more = [(f"p{i // 2}", parts[i % 3], "AB"[i % 2]) for i in range(8)]
    rows = [(*m, *r, "old") for m, r in zip(more, rows_of(), strict=True)]
    write(source, " patient,split,site, file ,label,age", rows)
    plan = folder.plan_folder(source)
    assert plan.split_scheme == "given (labels.csv)" and plan.site_names == ("A", "B")
    assert [(s.patient, s.split, plan.site_names[s.site]) for s in plan.sources] == more
    assert {s.split for s in folder.plan_folder(source, split="test").sources} == {
        "test"
    }
    rows = [(row[0], *row[3:]) for row in rows]
    write(source, "patient,file,label,age", rows)
    plan = folder.plan_folder(source)
    assert plan.split_scheme == "patient-disjoint"
    homes = {}
    for s in plan.sources:
        homes.setdefault(s.patient, set()).add(s.split)
    assert all(len(home) == 1 for home in homes.values())


def test_images_that_are_not_listed_are_named(source):
    write(source, "file,label", rows_of(6))
    plan = folder.plan_folder(source)
    assert plan.left_out == [
        (f"scans/größe {i}.png", "not in labels.csv") for i in (6, 7)
    ]


def test_paths_are_compared_as_paths(source):
    rows = rows_of()
    odd = [("./scans/größe 0.png", "Normal"), ("scans//größe 1.png", "TB"), *rows[2:]]
    write(source, "file,label", odd)
    plan = folder.plan_folder(source)
    assert [s.name for s in plan.sources] == [name for name, _ in rows]
    assert not plan.left_out
    write(source, "file,label", [*rows, ("scans/./größe 7.png", "TB")])
    with pytest.raises(ValueError, match="line 10: 'scans/größe 7.png' is listed tw"):
        folder.plan_folder(source)


@pytest.mark.parametrize(
    "header,row,line",
    [
        ('file,"label', "a.png,TB", 0),
        ('"file"s,label', "a.png,TB", 0),
        ("file,label", '"scans/größe 7.png,TB', 9),
    ],
)
def test_stray_quotes_are_one_line(source, header, row, line):
    write(source, header, [*rows_of(), (row,)])
    with pytest.raises(ValueError, match=f"labels.csv, after line {line}: ") as found:
        folder.plan_folder(source)
    assert "\n" not in str(found.value) and "mend the quotes" in str(found.value)


def test_blank_lines_count_as_lines(source):
    write(source, "file,label", [*rows_of(), (), (), ("scans/x.png", "TB")])
    with pytest.raises(FileNotFoundError, match="line 12: 'scans/x.png' is not there"):
        folder.plan_folder(source)


FIRST = ("scans/größe 0.png", "TB")


@pytest.mark.parametrize(
    "header,row,message",
    [
        ("file,class", FIRST, "has no column 'label'; expected the header file,label"),
        ("file,label", FIRST, r"line 10: 'scans/größe 0.png' is listed twice"),
        ("file,label", ("scans/x.png", "TB"), "line 10: 'scans/x.png' is not there"),
        ("file,label", ("../x.png", "TB"), "'../x.png' lies outside the folder"),
        ("file,label", ("/x.png", "TB"), "'/x.png' lies outside the folder"),
        ("file,label", ("scans/größe 0.png", ""), "has no label; fill the cell in"),
        ("file,label", ("", "TB"), "line 10: '' has no file"),
    ],
)
def test_one_line_for_what_is_wrong(source, header, row, message):
    write(source, header, [*rows_of(), row])
    with pytest.raises((ValueError, FileNotFoundError), match=message) as found:
        folder.plan_folder(source)
    assert "labels.csv" in str(found.value) and "\n" not in str(found.value)


def test_whole_tables_that_cannot_be_used(source):
    write(source, "file,label", [(name, "TB") for name, _ in rows_of()])
    with pytest.raises(ValueError, match="has the label 'TB' alone"):
        folder.plan_folder(source)
    write(source, "file,label", [])
    with pytest.raises(ValueError, match="labels.csv lists no image"):
        folder.plan_folder(source)
    (source / "labels.csv").write_bytes(b"")
    with pytest.raises(ValueError, match="has no column 'file'"):
        folder.plan_folder(source)
    rows = [(*row, "dev") for row in rows_of()]
    write(source, "file,label,split", rows)
    with pytest.raises(ValueError, match="line 2: .* has the split 'dev', expected"):
        folder.plan_folder(source)
    write(source, "file,label", [(n, "A" if c == "TB" else "B") for n, c in rows_of()])
    with pytest.raises(ValueError, match="A, B .*--positive=CLASS"):
        folder.plan_folder(source)
