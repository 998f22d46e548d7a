"""Builds a data set from image files and says whether its splits leak.

  python tools/prepare_data.py --dataset=site_b --source=DIR --data_dir=data

Counts per class and split and the leakage verdict are printed, and written to
summary.json beside the data.
"""

import argparse
import inspect
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cxai_jax.data import DATASETS, store
from cxai_jax.data.leakage import SIMILAR

SHOWN = 20  # Lines of a list of files; summary.json has them all.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    options = parse(arguments)
    start = time.monotonic()
    try:
        spec = DATASETS[options.dataset]
        summary = store.build(
            make_plan(options),
            options.data_dir,
            options.skip_bad,
            make_progress(),
            channels=spec.channels,
            side=spec.side,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(summary))
    print(
        f"written to {options.data_dir}/{summary['name']}/{summary['split']} "
        f"in {time.monotonic() - start:.0f} s"
    )
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    prepared = [name for name, spec in DATASETS.items() if spec.plan]
    add("--dataset", required=True, choices=prepared)
    add("--source", required=True, help="folder that holds the class folders")
    add("--data_dir", required=True, help="root of the prepared data")
    add(
        "--split",
        help="site_a: blocked (default), random, wang; site_b: official (default), "
        "wang; cxr: seed0, ...",
    )
    add("--split_files", help="sites, wang: TRAIN.txt,TEST.txt")
    add("--name", help="folder: read back as folder:NAME")
    add("--skip_bad", action="store_true", help="list unreadable images and go on")
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> store.Plan:
    """Reads the source folder as the chosen data set.

    Raises:
      ValueError: for an option that the data set's plan does not take.
    """
    listings = options.split_files and options.split_files.split(",")
    given = {"split": options.split, "split_files": listings, "name": options.name}
    given = {option: value for option, value in given.items() if value is not None}
    takes = {
        name: inspect.signature(spec.plan).parameters
        for name, spec in DATASETS.items()
        if spec.plan
    }
    for option in given:
        if option not in takes[options.dataset]:
            owners = ", ".join(name for name in takes if option in takes[name])
            raise ValueError(
                f"--{option} belongs to --dataset={owners}, not {options.dataset}; "
                "leave it out"
            )
    taken = set(DATASETS) - {"folder"}
    if "name" in given and (
        options.name in taken or not re.fullmatch(r"\w[\w.-]*", options.name)
    ):
        raise ValueError(
            f"--name={options.name!r} must be letters, digits, '_', '.' or '-', and "
            f"none of {', '.join(sorted(taken))}"
        )
    return DATASETS[options.dataset].plan(Path(options.source), **given)


def make_progress() -> Callable[[int, int], None]:
    """A bar on a terminal, a plain line every tenth elsewhere."""
    start = time.monotonic()

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            bar = "#" * (40 * done // total)
            rate = done / max(time.monotonic() - start, 1e-9)
            end = "\n" if done == total else ""
            text = f"\r[{bar:<40}] {done}/{total} images, {rate:.0f}/s"
            print(text, end=end, file=sys.stderr, flush=True)
        elif done * 10 // total > (done - 1) * 10 // total:
            print(f"{done}/{total} images", file=sys.stderr, flush=True)

    return show


def describe(summary: dict) -> str:
    """The summary as text: counts per class and split, left-out files, verdict."""
    counts = summary["counts"]
    width = max(len(name) for name in (*summary["class_names"], "class"))
    lines = [
        f"{summary['name']}, split {summary['split_scheme']}, positive class "
        + summary["class_names"][summary["positive"]]
    ]
    lines.append(f"{'class':<{width}}" + "".join(f"{s:>8}" for s in (*counts, "all")))
    for name in summary["class_names"]:
        row = [count[name] for count in counts.values()]
        cells = "".join(f"{n:>8}" for n in (*row, sum(row)))
        lines.append(f"{name:<{width}}" + cells)
    skipped = summary["skipped"]
    if skipped:
        lines.append(f"left out: {len(skipped)} files")
        lines += [f"  {file}: {reason}" for file, reason in skipped[:SHOWN]]
        if len(skipped) > SHOWN:
            lines.append(f"  and {len(skipped) - SHOWN} more, see summary.json")
    missing = [s for s in ("train", "test") if s not in counts]
    if missing:
        lines.append(f"warning: no images in {' and '.join(missing)}")
    lines += [
        f"similar: {found['similar'] / sum(counts[late].values()):.1%} of the {late} "
        f"images correlate above {SIMILAR} with an image of {early}"
        for pair, found in summary["leakage"]["pairs"].items()
        for early, late in [pair.split("-")]
    ]
    lines.append(f"leakage: {summary['leakage']['verdict']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
