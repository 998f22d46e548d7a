"""Tables: no cell is a formula in a sheet, and every damage names its file."""

import csv

import pytest

from cxai_jax.data import inputs, tables

FORMULAS = (
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    " =1",
    "'=1",
    "''@x",
    "＝1+1",
    "\x00=1",
    "\ufeff=1",
)


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_written_as_text_and_read_back(tmp_path, text):
    cell = tables.guarded(text)
    assert cell == f"'{text}" and tables.unguarded(cell) == text
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["a"], [cell]])
    (row,) = tables.read_rows(tmp_path / "x.csv")
    assert tables.unguarded(row["a"]) == text


@pytest.mark.parametrize(
    "text", ["", "ann", "a=b", "'ann'", "'", "1-2", "scans/-x.png"]
)
def test_other_texts_stay_as_they_are(text):
    assert tables.guarded(text) == tables.unguarded(text) == text


@pytest.mark.parametrize(
    "content,message",
    [
        (
            b"file,patient\n" + b"x" * 140_000 + b",1\n",
            "after line 1: field larger than",
        ),
        (b"file,patient\nx,\xff\n", "byte 15 is not UTF-8"),
        (b'file,patient\na,1\n"x,1\ny,2\n', "after line 2: unexpected end of data"),
        (b'file,"patient\nx,1\n', "after line 0: unexpected end of data"),
        (b"\xff\xfef\x00i\x00", "byte 0 is not UTF-8"),
    ],
)
def test_damage_names_the_table(tmp_path, content, message):
    path = tmp_path / "patients.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"patients.csv.*{message}"):
        tables.read_table(path, "file", "patient")
    with pytest.raises(ValueError, match="patients.csv.*not UTF-8") as caught:
        path.write_bytes(b"a\n\xff")
        tables.read_list(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(content)
    (tmp_path / "x.png").touch()
    (error,) = inputs.find([str(tmp_path)]).errors
    assert error[0] == str(path) and message in error[1]


def test_what_a_crash_leaves_is_read_where_asked(tmp_path):
    path = tmp_path / "predictions.csv"
    path.write_bytes(b'file,flags,error\na,,\nb,"sma')
    whole, cut = tables.read_rows(path, strict=False)
    assert whole["error"] == "" and cut == {"file": "b", "flags": "sma", "error": None}
    with pytest.raises(ValueError, match="predictions.csv, after line 2: "):
        tables.read_rows(path)
