"""python -m tools.benchmark_compare old.json new.json

Compares two results of `tools.benchmark` and fails (exit code 1) if a row has become
more than a tenth slower. What is compared is the row's ratio to something timed in the
same rounds (PyTorch or the plain lowering), which another machine or another hour does
not change; rows without one are compared by time, on the same kind of device only.
"""

import argparse
import json
import sys
from pathlib import Path

ALLOWED = 1.10  # How much slower a row may be.
REFERENCES = ("published", "naive", "fair_eval", "fair_train", "plain", "all", "device")


def row_key(row: dict) -> tuple:
    names = ("suite", "variant", "model", "size", "dtype", "bs")
    return tuple(row.get(name) for name in names)  # Older files lack two.


def read(path: Path) -> dict:
    """A result of `tools.benchmark`.

    Raises:
      ValueError: if the file is something else.
    """
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or result.get("schema") != 1:
        raise ValueError(
            f"{path} is not a result of tools.benchmark with schema 1; write one with "
            "python -m tools.benchmark --json=FILE"
        )
    return result


def compare(old: dict, new: dict) -> list[dict]:
    """One dict per row that both results have.

    Returns:
      suite, variant, dtype, bs; by: what the comparison rests on; slower: how many
      times slower the new row is; verdict: "ok", "regression", "wrong" (its loss
      or values are not the reference's) or "noisy" (either row was measured on a busy
      machine, so nothing follows).
    """
    same_machine = old["device"]["kind"] == new["device"]["kind"]
    before = {row_key(row): row for row in old["rows"]}
    found = []
    for row in new["rows"]:
        past = before.get(row_key(row))
        if past is None:
            continue
        paired = [n for n in REFERENCES if n in row["ratios"] and n in past["ratios"]]
        if paired:
            by = paired[0]
            slower = past["ratios"][by]["median"] / row["ratios"][by]["median"]
        elif same_machine:
            by, slower = "time", row["ms"]["p50"] / past["ms"]["p50"]
        else:
            continue
        verdict = "regression" if slower > ALLOWED else "ok"
        if row["noisy"] or past["noisy"]:
            verdict = "noisy"
        if row["wrong"]:
            verdict = "wrong"
        names = ("suite", "variant", "dtype", "bs")
        found.append(
            {name: row[name] for name in names}
            | {"by": by, "slower": slower, "verdict": verdict}
        )
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.benchmark_compare")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    given = parser.parse_args(arguments)
    try:
        rows = compare(read(given.old), read(given.new))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}")
        return 2
    if not rows:
        print(f"error: {given.old} and {given.new} have no row in common")
        return 2
    print(f"{'suite':12}{'variant':24}{'dtype':10}{'bs':>5}  {'by':12}new/old time")
    for row in rows:
        print(
            f"{row['suite']:12}{row['variant']:24}{row['dtype']:10}{row['bs']:5}  "
            f"{row['by']:12}{row['slower']:.3f} {row['verdict']}"
        )
    return int(any(row["verdict"] in ("regression", "wrong") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
