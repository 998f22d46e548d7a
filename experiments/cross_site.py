"""Train on one site, test on the other: how far each component carries over.

python -m experiments.cross_site --rows=baseline,snapmix,full,sepnorm --recipe=short \
    --size=112 --backbone=lite0 --epochs=8 --seeds=0,1,2 --set data.data_dir=data

Every network is trained on site A, on site B, or on both, and scored on the test images
of both. SepNorm has norms of each site where it is trained on both; trained on one it
has one set of norms, with which it scores the other site as well. Finished runs are
small files in results/cross_site/, see `compare`; the matrix is cross_site.json,
.md, .tex and .png beside it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cxai_jax.data import sites
from experiments import compare, paired, tables

ROWS = {  # Key -> (row of the tables on one site, on both).
    "baseline": ("Baseline", "Baseline"),
    "snapmix": ("SnapMix", "SnapMix"),
    "full": ("SnapMix + CPE", "SnapMix + CPE"),
    "sepnorm": ("Redesign (single)", "SepNorm"),
}
TRAINED_ON = {  # Site -> (config file, splits that are tested).
    "site_a": ("configs/siteA.py", "test+site_b:test"),
    "site_b": ("configs/siteB.py", "test+site_a:test"),
    "both": ("configs/joint.py", "test"),
}
TESTED_ON = {"site_a": sites.SITE_A_FOLDERS, "site_b": sites.SITE_B_FOLDERS}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="of " + ", ".join(ROWS))
    parser.add_argument("--seeds", default="0,1,2", help="with commas between")
    parser.add_argument("--recipe", choices=tables.RECIPES, default="ours")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--joint_epochs", type=float, help="where both sites train")
    parser.add_argument("--backbone", help="a row such as lite0, or a model's name")
    parser.add_argument("--size", type=int, help="pixels, side of the input")
    parser.add_argument("--own_size", type=int, help="of COVID-Net and its like")
    parser.add_argument("--set", nargs="*", default=[], help="FIELD=VALUE, for all")
    parser.add_argument("--out", type=Path, default=Path("runs", "cross_site"))
    parser.add_argument("--max_minutes", type=float, help="begin no run after that")
    parser.add_argument("--list", action="store_true", help="say what is finished")
    options = parser.parse_args(arguments)
    folder = compare.RESULTS / "cross_site"
    try:
        jobs = plan(options)
        if not options.list:
            compare.run_all(jobs, folder, options.out, minutes=options.max_minutes)
        print(compare.listed(jobs, folder))
        if not options.list:
            print(write(jobs, folder, compare.RESULTS / "cross_site"))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def plan(options) -> list[compare.Job]:
    """All runs, seed by seed; a system is "ROW on SITE".

    Raises:
      ValueError: for an unknown row.
    """
    keys, known, jobs = options.rows.split(","), {r.name: r for r in tables.ROWS}, []
    for key in keys:
        if key not in ROWS:
            raise ValueError(f"no row {key!r}; known: {', '.join(ROWS)}")
    for seed in map(int, options.seeds.split(",")):
        for key in keys:
            for trained, (file, tested) in TRAINED_ON.items():
                row = known[ROWS[key][trained == "both"]]
                words = (row.words, tables.recipe(row, options.recipe))
                given = tables.fields_of(row, options, both=trained == "both")
                jobs += compare.plan(
                    file,
                    {f"{key} on {trained}": ",".join(filter(None, words))},
                    seeds=[seed],
                    folds=[""],
                    fields=[f"data.test={tested}", *given],
                    backbone=tables.backbone(row, options.backbone),
                )
    return jobs


def on_site(run: dict, site: str) -> dict:
    """The predictions of one site's images, told by the folders of their names."""
    folders = [name.partition("/")[0] for name in run["names"].tolist()]
    own = np.isin(folders, TESTED_ON[site])
    parts = {k: v[own] if isinstance(v, np.ndarray) else v for k, v in run.items()}
    return parts | {"sites": np.zeros(own.sum(), int), "site_names": [site]}


def write(jobs, folder: Path, path: Path) -> str:
    """Writes the matrix with what is finished; returns it as text."""
    cells = {name: of for name, of in compare.finished(jobs, folder).items() if of}
    if not cells:
        return "no finished run: no matrix yet"
    found = {}
    for site in TESTED_ON:
        own = {
            name: {at: on_site(run, site) for at, run in of.items()}
            for name, of in cells.items()
        }
        runs = compare.balanced(own)
        found[site] = paired.compare(runs)
    pages = [matrix(found, score) for score in ("accuracy", "f1", "auc")]
    first = next(iter(next(iter(cells.values())).values()))
    described = compare.about(jobs, folder, runs) | {
        "images": {site: len(on_site(first, site)["labels"]) for site in TESTED_ON}
    }
    compare.write_pages(path, described | {"table": found}, pages)
    draw(found, path.with_suffix(".png"))
    return paired.markdown(pages)


def matrix(found: dict[str, dict], score: str) -> tuple[str, list[list[str]]]:
    """A page: a row for each network, a column for each tested site."""
    names = list(next(iter(found.values())))
    rows = [["", *(f"tested on {site}" for site in found)]]
    rows += [
        [name, *(paired.shown(table[name][score]) for table in found.values())]
        for name in names
    ]
    return f"{score}: mean ± sd over seeds (95 % interval), percent", rows


def draw(found: dict[str, dict], path: Path) -> None:
    """Accuracy with its interval, a panel for each row."""
    names = list(next(iter(found.values())))
    keys = list(dict.fromkeys(name.partition(" on ")[0] for name in names))
    figure = Figure(figsize=(2.6 * len(keys) + 0.6, 3.0), layout="constrained")
    for panel, key in zip(
        figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True
    ):
        trained = [t for t in TRAINED_ON if f"{key} on {t}" in names]
        cells = [
            [found[site][f"{key} on {t}"]["accuracy"] for site in found]
            for t in trained
        ]
        values = [[100 * cell["mean"] for cell in line] for line in cells]
        panel.imshow(values, vmin=50, vmax=100, cmap="viridis")
        for i, line in enumerate(cells):
            for j, cell in enumerate(line):
                low, high = 100 * cell["low"], 100 * cell["high"]
                panel.text(
                    j,
                    i,
                    f"{values[i][j]:.1f}\n{low:.0f} to {high:.0f}",
                    ha="center",
                    va="center",
                    color="white" if values[i][j] < 80 else "black",
                )
        panel.set_xticks(range(len(found)), found)
        panel.set_yticks(range(len(trained)), trained)
        panel.set_xlabel("tested on")
        panel.set_title(key)
    figure.axes[0].set_ylabel("trained on")
    figure.suptitle("Accuracy, percent, with its 95 % interval")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
