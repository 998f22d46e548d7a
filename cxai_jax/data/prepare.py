"""Builds a data set from image files and says whether its splits leak.

  cxai-prepare --dataset=folder --name=mine --source=images --data_dir=data

(or python -m cxai_jax.data.prepare). Counts per class and split and the leakage verdict
are printed, and written to summary.json beside the data.
"""

import argparse
import inspect
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cxai_jax import progress
from cxai_jax.data import DATASETS, store
from cxai_jax.data.leakage import SIMILAR
from cxai_jax.data.plan import Plan

SHOWN = 20  # Lines of a list of files; summary.json has them all.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    options = parse(arguments)
    start = time.monotonic()
    try:
        with progress.stage("reading the folder"):
            spec, plan = DATASETS[options.dataset], make_plan(options)
        check_new(plan, options.data_dir, options.overwrite)
        if options.skip_bad or not plan.unlisted:  # Else `build` names what is.
            check_classes(plan)
        summary = store.build(
            plan,
            options.data_dir,
            options.skip_bad,
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
    parser = argparse.ArgumentParser(
        "cxai-prepare", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    prepared = [name for name, spec in DATASETS.items() if spec.plan]
    add("--dataset", required=True, choices=prepared)
    add("--source", required=True, help="folder of the images, their lists and tables")
    add("--data_dir", required=True, help="root of the prepared data")
    add(
        "--split",
        help="site_a: blocked (default), random, wang; site_b: official (default), "
        "wang; cxr: seed0, ...; covidx_ct: CT-2A (default), CT-1, CT-3A, with -body "
        "behind it cropped to the body; folder: test, to keep every image for testing",
    )
    add("--split_files", help="sites, wang: TRAIN.txt,TEST.txt")
    add("--name", help="folder: read back as folder:NAME")
    add("--positive", help="folder: the class whose sensitivity is reported")
    add("--keep_ids", action="store_true", help="folder: store DICOM's PatientID as is")
    add("--overwrite", action="store_true", help="replace data of the same name")
    add("--skip_bad", action="store_true", help="list unreadable images and go on")
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> Plan:
    """Reads the source folder as the chosen data set.

    Raises:
      ValueError: for an option that the data set's plan does not take.
    """
    listings = options.split_files and options.split_files.split(",")
    given = {"split": options.split, "split_files": listings, "name": options.name}
    given |= {"positive": options.positive, "keep_ids": options.keep_ids or None}
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


def check_new(plan: Plan, data_dir: str | Path, overwrite: bool) -> None:
    """Raises ValueError if the data set is there already and must not be replaced."""
    target = store.place(data_dir, plan.name, plan.split)
    if target.exists() and not overwrite:
        raise ValueError(
            f"{target} is prepared already; add --overwrite to replace it, or choose "
            "another --name or --data_dir"
        )


def check_classes(plan: Plan) -> None:
    """Raises ValueError for data without a test split, or a split without a class.

    A training split is needed as well, unless every image is for testing.
    """
    found = Counter((source.split, source.label) for source in plan.sources)
    present = {split for split, _ in found}
    if "test" not in present or ("train" not in present and present != {"test"}):
        missing = "train" if "test" in present else "test"
        raise ValueError(
            f"{plan.name} has no image of the split {missing!r}; list some in "
            "splits.csv, or let the split be drawn by leaving it out"
        )
    for split in sorted(present):
        for label, name in enumerate(plan.class_names):
            if not found[split, label]:
                raise ValueError(
                    f"the split {split!r} of {plan.name} has no image of the class "
                    f"{name!r}; add images or patients of it, or list others for "
                    f"{split!r} in splits.csv"
                )


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
    lines += [f"DICOM: {n} images {what}" for what, n in summary["oddities"].items()]
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
