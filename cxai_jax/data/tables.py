"""CSV tables: errors that name the file and line, and cells that no sheet runs.

A spreadsheet takes a cell that begins with =, +, - or @ for a formula, and file names
and patient numbers come from strangers. Such cells are written with an apostrophe in
front, which `unguarded` takes away again.
"""

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

from cxai_jax.data import reading

# Sheets skip white space and control characters; some read full-width signs as well.
FORMULA = re.compile(r"['\s\x00-\x1f\ufeff]*[=+\-@＝＋－＠]")


def guarded(cell: str) -> str:
    """The text as a cell that is no formula; other texts as they are."""
    return f"'{cell}" if FORMULA.match(cell) else cell


def unguarded(cell: str) -> str:
    """The text that `guarded` was given."""
    return cell[1:] if cell[:1] == "'" and FORMULA.match(cell[1:]) else cell


def guarded_row(row: Mapping[str, str]) -> dict[str, str]:
    """A row with every cell guarded."""
    return {column: guarded(cell) for column, cell in row.items()}


def read_rows(file: str | Path, strict: bool = True) -> list[dict[str, str | None]]:
    """The rows of a UTF-8 CSV file with a header; None where a line is cut short.

    Args:
      file: the table.
      strict: False takes an open quote to end with the file, as a crash leaves it.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not UTF-8 or no CSV.
    """
    return [row for _, row in read_numbered(file, strict)[1]]


def read_numbered(
    file: str | Path, strict: bool = True
) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    """The header, and the number of the last line of each of `read_rows` with it."""
    text = io.StringIO(reading.read_text(file), newline="")
    reader = csv.DictReader(text, strict=strict)
    try:
        rows = [(reader.line_num, row) for row in reader]
        return list(reader.fieldnames or ()), rows
    except csv.Error as error:
        raise ValueError(
            f"{reading.printable(file)}, after line {reader.line_num}: {error}; mend "
            "the quotes or the cell there"
        ) from None


def read_list(file: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file, stripped.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is empty or no UTF-8 text.
    """
    text = reading.read_text(file)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{file} is empty")
    return lines


def read_table(file: str | Path, key: str, value: str) -> dict[str, str]:
    """Two columns of a CSV file as a dict, cells stripped.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no CSV, a column is missing or a key occurs twice.
    """
    rows = read_rows(file)
    for column in (key, value):
        if not rows or column not in rows[0]:
            raise ValueError(
                f"{file} has no rows with a column {column!r}; expected "
                f"the header {key},{value}"
            )
    table = {}
    for row in rows:
        name = (row[key] or "").strip()
        if name in table:
            raise ValueError(f"{file} lists {name!r} twice; keep one line")
        table[name] = (row[value] or "").strip()
    return table
