"""Table 3 of the CT paper: every compared system on COVIDx-CT; see `tables`.

python -m experiments.table3 --list
python -m experiments.table3 --rows=baseline,full --recipe=short --size=112 \
    --backbone=lite0 --epochs=1 --seeds=0 --set data.data_dir=data

Three classes, as the published code has; `--classes=2` leaves pneumonia out, as the
paper's counts do. The first four rows are quoted from Gunraj et al. by the paper, and
its baseline repeats their ResNet-50; here they are networks of their own, trained like
the others. Its COVIDNet-CT row is that network on CT-1, with *pneumonia* in the columns
of "Non-Covid-19"; see "Slips in the published tables" in experiments/README.md.
"""

import argparse
from collections.abc import Sequence

from cxai_jax.data import covidx_ct
from experiments import tables
from experiments.tables import Row

GUNRAJ = "Gunraj et al. 2020"
ROWS = (
    Row("ResNet-50", "baseline", "", GUNRAJ, "any", "own", "resnet50"),
    Row("NASNet-A-Mobile", "baseline", "", GUNRAJ, "any", "own", "nasnet_mobile"),
    Row("EfficientNet-B0", "baseline", "", GUNRAJ, "any", "own", "efficientnet_b0"),
    Row("COVIDNet-CT", "baseline", "gunraj", GUNRAJ, "any", "own", "covidnet_ct"),
    *tables.OWN_ROWS,
)
# Percent. Only what experiments/README.md discusses; other figures are in the paper.
PRINTED = {
    "COVIDNet-CT": {
        "accuracy": 99.1,
        "sensitivity Non-Covid-19": 99.0,
        "PPV Non-Covid-19": 98.4,
        "PPV COVID-19": 99.7,
    },
    "Ours (Full)": {
        "accuracy": 99.5,
        "sensitivity Non-Covid-19": 99.7,
        "sensitivity COVID-19": 99.7,
        "PPV COVID-19": 99.8,
    },
}


def table(classes: int) -> tables.Table:
    """The table of three classes, or of two."""
    names = covidx_ct.CLASS_NAMES if classes == 3 else covidx_ct.BINARY_NAMES
    each = [f"{kind} {name}" for kind in ("sensitivity", "PPV") for name in names]
    return tables.Table(
        name="table3" if classes == 3 else "table3_binary",
        site="covidx_ct",
        own="configs/covidx_ct.py",
        pooled="configs/covidx_ct.py",
        rows=ROWS,
        printed=PRINTED,
        scores=("accuracy", *each, "macro sensitivity", "macro PPV", "auc"),
        words="" if classes == 3 else "binary",
        each_class=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; options but --classes are those of `tables`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--classes", type=int, choices=(2, 3), default=3)
    options, others = parser.parse_known_args(arguments)
    tables.main(table(options.classes), others)


if __name__ == "__main__":
    main()
