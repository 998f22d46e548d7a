"""Tables 1 to 3 of the CT paper: every row by name, run here or quoted.

Called by `table1` (site A), `table2` (site B) and `table3` (COVIDx-CT). A row is run
with its published recipe or with ours, `--recipe`, so that systems can be compared and
not recipes. With `--train_on=table` rows of sites are trained as in the paper, on both
sites but for "(single)"; with `--train_on=site` on the table's own site, which is a
fifth of the work, but for those that would be another row there. Finished runs are
small files in results/RUNS/, shared by the tables; see `compare`.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import compare, paired

WANG, OURS = "Wang et al. 2020b", "Ali et al. 2022"


class Row(NamedTuple):
    """A row of a table."""

    name: str  # As printed.
    words: str  # Rows of the table's config.
    published: str = ""  # Words of its published recipe; "": A20, the defaults.
    figures: str = OURS  # Where the printed figures come from.
    sites: str = "any"  # any | one | both: on how many it is trained.
    backbone: str = "any"  # any | resnet | own: what --backbone may put in.
    model: str = ""  # Key of MODELS, where it is not that of the words.

    @property
    def key(self) -> str:
        return re.sub(r"\W+", "_", self.name.lower()).strip("_")


class Table(NamedTuple):
    """A table of the paper."""

    name: str  # Of its files in results/.
    site: str  # Whose images are scored.
    own: str  # Config of that site alone.
    pooled: str  # Config of what the paper trains on.
    rows: Sequence[Row]
    printed: dict[str, dict[str, float]]  # Row -> score -> percent, as printed.
    scores: Sequence[str]  # Its columns, see `paired`.
    words: str = ""  # Further rows of the config, for all.
    each_class: bool = False  # Whether two classes are rated apart, too.


OWN_ROWS = (
    Row("Baseline", "baseline"),
    Row("Baseline + CPE", "cpe"),
    Row("SnapMix", "snapmix"),
    Row("SnapMix + Contrastive", "contrastive"),
    Row("SnapMix + CPE", "full"),
    Row("Ours (Full)", "full,tta"),
)
BOTH = {"figures": WANG, "sites": "both", "backbone": "own"}
ROWS = (
    Row("Series Adapter", "series_adapter", "wang", WANG, backbone="resnet"),
    Row("Parallel Adapter", "parallel_adapter", "wang", WANG, backbone="resnet"),
    Row("MS-Net", "ms_net", "liu", WANG),
    Row("COVID-Net (single)", "covidnet", "wang_covidnet", WANG, "one", "own"),
    Row("COVID-Net (joint)", "covidnet", "wang_covidnet", **BOTH),
    Row("Redesign (single)", "redesign", "wang", WANG, "one", "own"),
    Row("Redesign (joint)", "redesign", "wang", **BOTH),
    Row("SepNorm", "sepnorm", "wang", **BOTH),
    Row("SepNorm + Contrastive", "sepnorm_contrastive", "wang", **BOTH),
    *OWN_ROWS,
)
REFERENCE = "Baseline"  # Of the paired differences, where it was run.
RECIPES = ("published", "ours", "short")
SCORES = ("accuracy", "precision", "recall", "f1", "auc")
UNVOTED = ("auc",)  # Scores that a bare label does not have.
# Percent, as printed in the paper. Only what experiments/README.md discusses: the other
# figures have to be read in the paper, where the first nine rows are quoted as well.
TABLE1 = Table(
    name="table1",
    site="site_a",
    own="configs/siteA.py",
    pooled="configs/joint.py",
    rows=ROWS,
    printed={"Ours (Full)": {"f1": 95.87}},
    scores=SCORES,
)
TABLE2 = TABLE1._replace(
    name="table2",
    site="site_b",
    own="configs/siteB.py",
    printed={"SnapMix + CPE": {"f1": 86.95}, "Ours (Full)": {"f1": 88.25}},
)


def main(table: Table, arguments: Sequence[str] | None = None) -> None:
    """The command of one table; `arguments` are those of the command line."""
    title = f"{__doc__.splitlines()[0]} ({table.site})"
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--rows", help="keys with commas between, see --list; all")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="with commas between")
    parser.add_argument("--folds", type=int, help="default: the split as prepared")
    parser.add_argument("--recipe", choices=RECIPES, default="published")
    parser.add_argument("--train_on", choices=("table", "site"), default="table")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--joint_epochs", type=float, help="where both sites train")
    parser.add_argument("--backbone", help="a row such as lite0, or a model's name")
    parser.add_argument("--size", type=int, help="pixels, side of the input")
    parser.add_argument("--own_size", type=int, help="of COVID-Net and its like")
    parser.add_argument("--set", nargs="*", default=[], help="FIELD=VALUE, for all")
    parser.add_argument("--runs", default="tables", help="folder of runs in results/")
    parser.add_argument("--out", type=Path, help="of the workdirs; default runs/RUNS")
    parser.add_argument("--max_minutes", type=float, help="begin no run after that")
    parser.add_argument("--list", action="store_true", help="name every row and stop")
    options = parser.parse_args(arguments)
    folder = compare.RESULTS / options.runs
    try:
        rows = chosen(table, options.rows)
        jobs = plan(table, rows, options)
        if not options.list:
            out = options.out or Path("runs", options.runs)
            compare.run_all(jobs, folder, out, minutes=options.max_minutes)
        print(listed(table, rows, jobs, folder))
        if not options.list:
            print(write(table, rows, jobs, folder))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def chosen(table: Table, keys: str | None) -> list[Row]:
    """The rows that keys with commas between name; None: all.

    Raises:
      ValueError: for an unknown key.
    """
    known = {row.key: row for row in table.rows}
    wanted = keys.split(",") if keys else list(known)
    for key in wanted:
        if key not in known:
            raise ValueError(f"no row {key!r}; known: {', '.join(known)}")
    return [known[key] for key in wanted]


def plan(table: Table, rows: Sequence[Row], options) -> list[compare.Job]:
    """The runs of all rows, seed by seed."""
    return [
        job
        for seed in map(int, options.seeds.split(","))
        for row in rows
        for file in [trained_on(table, row, options.train_on)]
        for job in compare.plan(
            file,
            {row.name: system(table, row, options.recipe)},
            seeds=[seed],
            folds=compare.fold_names(options.folds),
            fields=fields_of(row, options, both=file == table.pooled),
            backbone=backbone(row, options.backbone),
        )
    ]


def trained_on(table: Table, row: Row, wanted: str) -> str:
    """Config file of a row; `wanted`, table or site, where the row has no say."""
    usual = {"table": "both", "site": "one"}[wanted]
    sites = usual if row.sites == "any" else row.sites
    return table.own if sites == "one" else table.pooled


def fields_of(row: Row, options, *, both: bool) -> list[str]:
    """FIELD=VALUE of the options for a row, trained on both sites or on one."""
    fields = compare.fields_of(options)
    if row.backbone == "own" and options.own_size:
        fields += compare.sized(options.own_size)
    if both and options.joint_epochs:
        fields.append(f"train.epochs={options.joint_epochs}")
    return fields + options.set


def system(table: Table, row: Row, name: str) -> str:
    """ROWS[+FIELD=VALUE] of a row, with a recipe of RECIPES."""
    words = ",".join(filter(None, (row.words, recipe(row, name), table.words)))
    return f"{words}+model.name={row.model}" if row.model else words


def recipe(row: Row, name: str) -> str:
    """Words of the config for a recipe of RECIPES."""
    return {"published": row.published, "ours": "", "short": "short"}[name]


def backbone(row: Row, wanted: str | None) -> str | None:
    """`wanted` where the row may have it; adapters need a ResNet."""
    if row.backbone == "own" or not wanted:
        return None
    if row.backbone == "resnet" and not wanted.startswith("resnet"):
        return "resnet18"
    return wanted


def listed(table: Table, rows: Sequence[Row], jobs, folder: Path) -> str:
    """Every row: its key, its runs here, what is quoted."""
    lines = [f"{table.site}: row (key): runs here; figures printed by the paper"]
    for row in rows:
        own = [job for job in jobs if job.system == row.name]
        done = sum((folder / f"{job.name}.json").exists() for job in own)
        told = printed(table, row)
        lines.append(
            f"  {row.name} ({row.key}): {done} of {len(own)}; {row.figures}: {told}"
        )
    return "\n".join(lines)


def printed(table: Table, row: Row) -> str:
    """ "f1 95.87", or "see the paper"."""
    found = table.printed.get(row.name, {})
    return ", ".join(f"{k} {v}" for k, v in found.items()) or "see the paper"


def write(table: Table, rows, jobs, folder: Path) -> str:
    """Writes the table if any run is finished; returns it as text."""
    cells = {
        name: {at: of_site(run, table.site) for at, run in of.items()}
        for name, of in compare.finished(jobs, folder).items()
        if of
    }
    if not cells:
        return paired.markdown([overview(table, rows, jobs, folder, {})])
    if table.each_class:
        for run in (run for of in cells.values() for run in of.values()):
            run["rated"] = run["class_names"]
    order = sorted(cells, key=lambda name: name != REFERENCE)
    runs = compare.balanced({name: cells[name] for name in order})
    compared = paired.compare(runs)
    page = overview(table, rows, jobs, folder, compared)
    described = compare.about(jobs, folder, runs)
    pages = [page, *paired.pages(compared)]
    path = compare.RESULTS / table.name
    compare.write_pages(path, described | {"table": compared}, pages)
    return paired.markdown([page])


def of_site(run: dict, site: str) -> dict:
    """The predictions of one site's images, scored as a data set of its own.

    Raises:
      ValueError: if the run has no such site.
    """
    if site not in run["site_names"]:
        raise ValueError(
            f"a run was tested on {', '.join(run['site_names'])}, not on {site}"
        )
    own = run["sites"] == list(run["site_names"]).index(site)
    parts = {k: v[own] if isinstance(v, np.ndarray) else v for k, v in run.items()}
    return parts | {"site_names": [site]}


def overview(table: Table, rows, jobs, folder: Path, compared: dict):
    """The page with every row: ours, the paper's, and what differs."""
    voted = [f"{s} after voting" for s in table.scores if s not in UNVOTED]
    columns = [*table.scores, *voted]
    head = ["row", *columns, "loss, first to last", "printed by the paper"]
    head += ["what differs", "best test epoch (optimistic)"]
    lines = [head]
    for row in rows:
        found = compared.get(row.name, {})
        kept = [
            json.loads(path.read_text(encoding="utf-8"))
            for job in jobs
            if job.system == row.name and (path := folder / f"{job.name}.json").exists()
        ]
        lines.append(
            [
                row.name,
                *(paired.shown(found[s]) if s in found else "-" for s in columns),
                falling(kept),
                f"{printed(table, row)} ({row.figures})",
                differs(row, kept),
                best(kept),
            ]
        )
    return f"{table.site}: mean ± sd over seeds (95 % interval), percent", lines


def falling(kept: list[dict]) -> str:
    """ "0.71 to 0.35", means over the runs."""
    if not kept:
        return "-"
    first, last = np.mean([k["loss"] for k in kept], axis=0)
    return f"{first:.2f} to {last:.2f}"


def best(kept: list[dict]) -> str:
    """Mean of the best test accuracy of each run, over all sites it was tested on."""
    found = [k["best test epoch"] for k in kept]
    return f"{100 * np.mean(found):.1f}" if found and None not in found else "-"


def differs(row: Row, kept: list[dict]) -> str:
    """What a run here had that the published one had not."""
    if not kept:
        return "not run here"
    config, described = kept[0]["config"], kept[0]["data"]
    weights = config["model"]["pretrained"] or "no pretrained weights"
    optim = config["optim"]
    return (
        f"{config['model']['name']}, {weights}, {config['data']['image_size']} px, "
        f"{config['train']['epochs']:g} epochs, {optim['name']} "
        f"{optim['lr_fresh']:g}, trained on {described['name']}, "
        f"split {described['split_scheme']}, last epoch, {len(kept)} runs"
    )
