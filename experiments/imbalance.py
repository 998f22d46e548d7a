"""Chest X-rays, 4 of 5 of one class: with and without weights for the classes.

python -m experiments.imbalance --data_dir=data --size=96 --epochs=10
python -m experiments.imbalance --data_dir=data --size=96 --epochs=10 \
    --name=imbalance_gentle --set optim.lr_trunk=0.0005 optim.lr_fresh=0.005
python -m experiments.imbalance --data_dir=data --size=160 --epochs=10 --folds=5 \
    --rows linear_probe,lite0 linear_probe,weighted,lite0 --name=imbalance_probe

The rows of configs/cxr.py `baseline`, `weighted` (cross-entropy weighed by class) and
`weighted,selected` (and the epoch of the best balanced accuracy on validation), or
those of --rows, with three seeds, through `compare`: kept runs in results/NAME/, the
table beside it. All train on `train` alone, so that `val` can select.
"""

import argparse
from collections.abc import Sequence

from experiments import compare

ROWS = ("baseline,lite0", "weighted,lite0", "weighted,selected,lite0")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="of prepared data")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--epochs", type=float, default=30.0)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folds", type=int, help="default: the split as prepared")
    parser.add_argument("--name", help="in results/; default imbalance_PIXELS")
    parser.add_argument("--set", nargs="*", default=[], help="FIELD=VALUE, for all")
    parser.add_argument("--max_minutes", help="begin no run after that")
    options = parser.parse_args(arguments)
    given = ["configs/cxr.py", "--rows", *options.rows, f"--seeds={options.seeds}"]
    given += [f"--size={options.size}", f"--epochs={options.epochs}"]
    given += [f"--name={options.name or f'imbalance_{options.size}'}"]
    if options.folds:
        given.append(f"--folds={options.folds}")
    if options.max_minutes:
        given.append(f"--max_minutes={options.max_minutes}")
    fields = [f"data.data_dir={options.data_dir!r}", "data.fit=train"]
    compare.main([*given, "--set", *fields, *options.set])


if __name__ == "__main__":
    main()
