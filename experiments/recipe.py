"""What each part of the training recipe is worth, one changed at a time.

python -m experiments.recipe --data_dir=data --budget_minutes=60
python -m experiments.recipe --data_dir=data --official --start=baseline,lite0,short
python -m experiments.recipe --data_dir=data --official --start=cpe,lite0,short \
    --name=cpe_112 --size=112 --factors recipe "CPE at 0.01" "raw CPE, clipped"

Lite0 with ImageNet weights on site B. Every run is scored on validation images
(config.data.test=val); test images are neither trained on nor scored. The folds divide
all of site B, so a recipe that is chosen by them must not be judged by those folds, nor
by the official test; with --official the published train and validation parts alone are
used, and the official test may judge. Runs are kept and continued as in `compare`: one
small file each in results/recipe/PIXELS/ or official_PIXELS/, the table beside that
folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import compare, paired

RESULTS = Path(__file__).parent / "results" / "recipe"
START = "full,lite0,short"
ADAMW = ("optim.name=adamw", "optim.lr_trunk=0.0001", "optim.lr_fresh=0.001")
RAW = ("cpe.normalize=False", "optim.clip_norm=1")  # Eq. 1 as it is written.
MOVED = ("augment.intensity=0.2", "augment.rotate=10")
FACTORS = {  # Name -> the fields that only it changes.
    "recipe": (),
    "lr / 3": ("optim.lr_trunk=0.001", "optim.lr_fresh=0.007"),
    "lr x 3": ("optim.lr_trunk=0.009", "optim.lr_fresh=0.06"),
    "constant lr": ("optim.schedule=constant",),
    "multistep": ("optim.schedule=multistep",),
    "adamw": ADAMW,
    "adamw, lr x 3": (ADAMW[0], "optim.lr_trunk=0.0003", "optim.lr_fresh=0.003"),
    "adamw, intensity and rotation": (*ADAMW, *MOVED),
    "half the epochs": ("train.epochs=6",),
    "twice the epochs": ("train.epochs=24",),
    "no weight decay": ("optim.weight_decay=0",),
    "weight decay x 10": ("optim.weight_decay=0.001",),
    "averaged weights": ("train.ema=0.99",),
    "half of the batches mixed": ("mix.prob=0.5",),
    "CPE grows over a third": ("cpe.ramp=0.33",),
    "CPE at 0.1": ("cpe.weight=0.1",),
    "CPE at 0.01": ("cpe.weight=0.01",),
    "CPE, temperature 0.5": ("cpe.temperature=0.5",),
    "CPE, temperature 0.1": ("cpe.temperature=0.1",),
    "raw CPE, clipped": RAW,
    "raw CPE, clipped, at 0.01": (*RAW, "cpe.weight=0.01"),
    "raw CPE, clipped, sqrt(D)": (*RAW, "cpe.sqrt_d=True"),
    "smoothed labels": ("train.label_smoothing=0.1",),
    "intensity and rotation": MOVED,
    "larger images": (),  # By a third; see `plan`.
    "together": (  # What a longer run wants.
        "train.epochs=24",
        "train.ema=0.99",
        "train.label_smoothing=0.1",
        *MOVED,
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="of prepared data")
    parser.add_argument("--factors", nargs="+", default=list(FACTORS))
    parser.add_argument("--start", default=START, help="rows that factors change")
    parser.add_argument("--official", action="store_true", help="no folds")
    parser.add_argument("--name", help="of folder and table, for another --start")
    parser.add_argument("--size", type=int, default=96, help="pixels")
    parser.add_argument("--seeds", default="0", help="with commas between")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--budget_minutes", type=float, help="begin no run after that")
    parser.add_argument("--out", type=Path, help="of the workdirs; default runs/recipe")
    parser.add_argument("--list", action="store_true", help="say what is finished")
    options = parser.parse_args(arguments)
    usual = f"official_{options.size}" if options.official else str(options.size)
    name = options.name or usual
    folder = RESULTS / name
    try:
        jobs = plan(
            options.factors,
            data_dir=options.data_dir,
            size=options.size,
            seeds=[int(seed) for seed in options.seeds.split(",")],
            folds=None if options.official else options.folds,
            start=options.start,
        )
        if not options.list:
            out = options.out or Path("runs", "recipe", name)
            compare.run_all(jobs, folder, out, minutes=options.budget_minutes)
        print(compare.listed(jobs, folder))
        if options.list:
            return
        cells = compare.finished(jobs, folder)
        runs = compare.balanced({name: of for name, of in cells.items() if of})
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    table = paired.compare(runs)
    print(paired.describe(table))
    compare.write_table(folder, table, compare.about(jobs, folder, runs))


def plan(
    factors: Sequence[str],
    *,
    data_dir: str,
    size: int,
    seeds: Sequence[int],
    folds: int | None,
    start: str = START,
) -> list[compare.Job]:
    """All runs, fold by fold; the first of `factors` is the reference.

    Args:
      folds: their number; None: the split as published.
      start: the rows that the factors change.

    Raises:
      ValueError: for an unknown factor.
    """
    if unknown := [name for name in factors if name not in FACTORS]:
        raise ValueError(f"{unknown[0]!r} is unknown; known: {', '.join(FACTORS)}")
    larger = compare.sized(round(size / 24) * 32)
    systems = {
        name: "+".join((start, *(larger if name == "larger images" else FACTORS[name])))
        for name in factors
    }
    fields = [
        f"data.data_dir={str(data_dir)!r}",
        "data.fit=train",
        "data.test=val",
        *compare.sized(size),
    ]
    return compare.plan(
        "configs/siteB.py",
        systems,
        seeds=seeds,
        folds=compare.fold_names(folds),
        fields=fields,
    )


if __name__ == "__main__":
    main()
