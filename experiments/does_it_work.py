"""Does the method work? Every row of the ablation on all images of both sites.

python -m experiments.does_it_work --data_dir=data --budget_minutes=100
python -m experiments.does_it_work --data_dir=data --profile=gpu --budget_minutes=7

Lite0 with ImageNet weights; every row of a site has the same folds, seeds, initial
weights, order of images and number of steps. All choices were made before any test fold
was scored; an eighth of the images outside the fold is validation, which draws the
learning curves and selects nothing. Runs go fold by fold through all rows, site B
before site A, controls last; one small file each in results/does_it_work/PROFILE/, and
the same command goes on where it stopped, on another machine too. `--list` says what is
there, `--report` renews tables, picture and verdicts from the files alone.

A claim is reproduced if the 95 % interval of the paired difference in accuracy lies
above 0, refuted if it lies below 0, else not decided, with the smallest difference that
the design could have found. The schedule is a cosine: that a curve is flat at its end
does not show that a longer run would end no higher.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from cxai_jax.data import sites, store
from cxai_jax.writer import write_json
from experiments import compare, kept_runs, paired

RESULTS = Path(__file__).parent / "results" / "does_it_work"
FILES = {"site_b": "configs/siteB.py", "site_a": "configs/siteA.py"}
PLANS = {"site_b": sites.plan_site_b, "site_a": sites.plan_site_a}
ROWS = ("baseline", "cpe", "snapmix", "full")
CONTROLS = ("full_raw", "mixup", "cutmix", "cpe_raw")
CLAIMS = {  # The row that shall beat the baseline.
    "CPE helps": "cpe",
    "CPE helps, as Eq. 1 is written": "cpe_raw",
    "SnapMix helps": "snapmix",
    "both together help": "full",
    "both together help, CPE as Eq. 1 is written": "full_raw",
}
VOTING = "full"  # The row that votes, and whose gain by voting is judged.


class Profile(NamedTuple):
    """What is the same for all rows."""

    size: int  # Pixels, side of the input.
    words: str  # Rows of the config behind the row itself.
    fields: dict[str, tuple[str, ...]]  # By site; A has three times the images of B.


LONG = (
    "train.epochs=200",
    "train.eval_every_epochs=10",
    "train.checkpoint_every_epochs=50",
)
PROFILES = {
    "cpu": Profile(
        size=112,
        words="lite0,short",
        fields={
            "site_b": ("train.epochs=8", "train.eval_every_epochs=2"),
            "site_a": ("train.epochs=3", "train.eval_every_epochs=1"),
        },
    ),
    "gpu": Profile(size=224, words="lite0,short", fields=dict.fromkeys(FILES, LONG)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, default="cpu")
    parser.add_argument("--data_dir", default="data", help="of prepared data")
    parser.add_argument("--source", type=Path, help="holds SITE/, to prepare it from")
    parser.add_argument("--sites", default="site_b,site_a")
    parser.add_argument("--rows", default=",".join((*ROWS, *CONTROLS)))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--budget_minutes", type=float, help="begin no run after that")
    parser.add_argument("--out", type=Path, help="of the workdirs; default runs/...")
    parser.add_argument("--list", action="store_true", help="say what is finished")
    parser.add_argument("--report", action="store_true", help="renew it, run nothing")
    options = parser.parse_args(arguments)
    folder = RESULTS / options.profile
    try:
        jobs = plan(
            PROFILES[options.profile],
            data_dir=options.data_dir,
            sites=options.sites.split(","),
            rows=options.rows.split(","),
            seeds=[int(seed) for seed in options.seeds.split(",")],
            folds=options.folds,
        )
        if not (options.list or options.report):
            if options.source:
                prepare(options.source, options.data_dir, options.sites.split(","))
            out = options.out or Path("runs", "does_it_work", options.profile)
            compare.run_all(jobs, folder, out, minutes=options.budget_minutes)
        print(compare.listed(jobs, folder))
        if not options.list:
            print(report(jobs, folder))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def prepare(source: Path, data_dir: str, wanted: Sequence[str]) -> None:
    """Prepares the sites that are not there yet from their published files."""
    for site in wanted:
        if not (Path(data_dir) / site).exists():
            store.build(PLANS[site](source / site), data_dir)


def plan(
    profile: Profile,
    *,
    data_dir: str,
    sites: Sequence[str],
    rows: Sequence[str],
    seeds: Sequence[int],
    folds: int,
) -> list[compare.Job]:
    """All runs, the most wanted first: site by site, seed by seed, controls last.

    Raises:
      ValueError: for an unknown site or row.
    """
    for given, known in ((sites, FILES), (rows, (*ROWS, *CONTROLS))):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{unknown[0]!r} is unknown; known: {', '.join(known)}")
    fields = [
        f"data.data_dir={str(data_dir)!r}",
        "data.fit=train",  # Leaves val for the learning curves.
        *compare.sized(profile.size),
    ]
    return [
        job
        for group in (ROWS, CONTROLS)
        for site in sites
        for job in compare.plan(
            FILES[site],
            {row: system(row, profile) for row in group if row in rows},
            seeds=seeds,
            folds=compare.fold_names(folds),
            fields=[*fields, *profile.fields[site]],
        )
    ]


def system(row: str, profile: Profile) -> str:
    """A row as `compare` wants it; the votes of the others would judge no claim."""
    return f"{row},{profile.words}" + ("+tta.k=31" if row == VOTING else "")


def report(jobs: Sequence[compare.Job], folder: Path) -> str:
    """Writes tables, verdicts and the picture of each site; returns the verdicts."""
    text, curves = "", {}
    for site in dict.fromkeys(job.config.data.name for job in jobs):
        own = [job for job in jobs if job.config.data.name == site]
        cells = {row: c for row, c in compare.finished(own, folder).items() if c}
        if "baseline" not in cells:
            continue
        name = f"{folder.name}_{site}"
        text += f"\n{site}\n"
        described = {}
        for kind, wanted in tables_of(cells).items():
            runs = compare.balanced({row: cells[row] for row in wanted})
            table = paired.compare(runs)
            used = [j for j in own if j.system in wanted and j.seed in runs["baseline"]]
            described[kind] = compare.about(used, folder, runs)
            compare.write_table(RESULTS / f"{name}_{kind}", table, described[kind])
            text += paired.describe(table) + "\n" if kind == "rows" else ""
        claims, curves[site] = verdicts(cells), learning_curves(own, folder)
        rising = {row: still_improving(c) for row, c in curves[site].items()}
        write_json(
            RESULTS / f"{name}_verdicts.json",
            {**described["rows"], "claims": claims, "validation at the end": rising},
        )
        text += "".join(
            f"{claim}: {found['verdict']}\n" for claim, found in claims.items()
        )
        text += "".join(f"{row}: {found['says']}\n" for row, found in rising.items())
    if curves:
        draw(curves, RESULTS / f"{folder.name}_curves.png")
    return text


def tables_of(cells: dict[str, dict]) -> dict[str, list[str]]:
    """Table -> its systems: all rows, and each control against the baseline alone."""
    found = {"rows": [row for row in ROWS if row in cells]}
    for row in CONTROLS:
        if row in cells and cells[row].keys() & cells["baseline"].keys():
            found[row] = ["baseline", row]
    return found


def verdicts(cells: dict[str, dict]) -> dict[str, dict]:
    """Claim -> its verdict and the paired difference in accuracy behind it."""
    found = {}
    for claim, row in CLAIMS.items():
        if row in cells and cells[row].keys() & cells["baseline"].keys():
            runs = compare.balanced({"baseline": cells["baseline"], row: cells[row]})
            found[claim] = judged(
                paired.compare(runs)[row]["accuracy"]["difference"], runs[row]
            )
    voted = {c: r for c, r in cells.get(VOTING, {}).items() if "voted" in r}
    if voted:
        runs = compare.balanced({VOTING: voted})
        gain = paired.compare(runs)[VOTING]["gain in accuracy by voting"]
        found["voting helps"] = judged(gain, runs[VOTING])
    if voted.keys() & cells["baseline"].keys():
        after = {cell: run | {"chosen": run["voted"]} for cell, run in voted.items()}
        runs = compare.balanced({"baseline": cells["baseline"], VOTING: after})
        found["the whole method helps, votes included"] = judged(
            paired.compare(runs)[VOTING]["accuracy"]["difference"], runs[VOTING]
        )
    return found


def judged(gain: dict, by_seed: dict[int, dict]) -> dict:
    """Verdict on "it helps" from a paired difference.

    Where no prediction changed, resampling gives an interval without width; the bound
    is then the rule of three, 3 / N at 95 % (Hanley and Lippman-Hand, 1983).
    """
    images = sum(len(run["labels"]) for run in by_seed.values())
    word, seen = "not decided", gain["detectable"]
    if gain["low"] == gain["high"] == 0:
        word, seen = "not decided, nothing changed", 3 / images
    elif gain["low"] > 0:
        word = "reproduced"
    elif gain["high"] < 0:
        word = "refuted"
    return {
        "verdict": f"{word}: {paired.shown(gain, '+')} points of accuracy over "
        f"{images} test predictions; a difference of {100 * seen:.1f} would have been "
        "seen",
        "difference": gain,
        "predictions": images,
    }


def learning_curves(jobs: Sequence[compare.Job], folder: Path) -> dict[str, dict]:
    """Row -> "share" of the budget [T], "accuracy" and "cross_entropy" [runs, T]."""
    found: dict[str, list[dict]] = {}
    for job in jobs:
        path = folder / f"{job.name}.json"
        if path.exists():
            curve = kept_runs.read(path)["curve"]
            found.setdefault(job.system, []).append(curve)
    return {
        row: {
            "share": np.array(curves[0]["step"]) / curves[0]["step"][-1],
            **{
                n: np.array([c[n] for c in curves])
                for n in ("accuracy", "cross_entropy")
            },
        }
        for row, curves in found.items()
    }


def still_improving(curves: dict) -> dict:
    """Did validation cross-entropy fall in the last quarter, by more than 2 errors?"""
    late = np.argmin(np.abs(curves["share"] - 0.75))
    fall = curves["cross_entropy"][:, late] - curves["cross_entropy"][:, -1]
    mean = float(fall.mean())
    error = float(fall.std(ddof=1) / np.sqrt(len(fall))) if len(fall) > 1 else None
    word = "one run only"
    if error is not None:
        word = "still falling" if mean > 2 * error else "flat"
        word = "rising" if mean < -2 * error else word
    return {
        "says": f"validation cross-entropy {word} in the last quarter of the steps "
        f"({-mean:+.3f}, {len(fall)} runs)",
        "fall": mean,
        "standard error": error,
    }


def draw(curves: dict[str, dict[str, dict]], path: Path) -> None:
    """Learning curves of all rows, a line of panels for each site."""
    figure = Figure(figsize=(9, 3.4 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), 2, squeeze=False)
    for line, (site, rows) in zip(panels, curves.items(), strict=True):
        for panel, score in zip(line, ("accuracy", "cross_entropy"), strict=True):
            for row, found in rows.items():
                panel.plot(
                    100 * found["share"],
                    found[score].mean(0),
                    label=f"{row} ({len(found[score])} runs)",
                )
            panel.set_xlabel("share of the steps, percent")
            panel.set_ylabel(f"validation {score.replace('_', '-')}")
            panel.set_title(site)
            panel.grid(alpha=0.3)
        line[1].legend(fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
