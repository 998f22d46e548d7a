"""Writes both tables under "## Results" of the README from experiments/results/.

python -m experiments.results_table

The runs that `collect_result` kept, and the verdicts of `does_it_work`.
"""

import json
from pathlib import Path

from experiments import paired

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- The table is written by python -m experiments.results_table. -->\n"
END = "<!-- End of the table. -->\n"
CLAIMS = "<!-- The verdicts are written by python -m experiments.results_table. -->\n"
SITES = {"site_b": "site B", "site_a": "site A"}
HEAD = (
    "| data, split | method | backbone | test images | accuracy | F1 | AUC | after "
    "voting | leakage check | seed, device, versions |\n" + "|---" * 10 + "|\n"
)


def main() -> None:
    page = renewed(README.read_text("utf-8"), table(RESULTS))
    README.write_text(renewed(page, claims(RESULTS), CLAIMS), "utf-8")
    print(f"{README.name}: {len(collected(RESULTS))} runs")


def renewed(page: str, text: str, begin: str = BEGIN) -> str:
    """The page with the text between a marker and the next END.

    Raises:
      ValueError: if a marker is missing.
    """
    if page.count(begin) != 1 or END not in page.split(begin)[1]:
        raise ValueError(f"README.md must have one line {begin.strip()!r}, and {END}")
    before, rest = page.split(begin)
    return before + begin + text + END + rest.split(END, 1)[1]


def table(folder: Path) -> str:
    """One row per collected run, as Markdown."""
    runs = collected(folder)
    if not runs:
        return "No run has been collected yet.\n"
    return HEAD + "".join(row(name, results) for name, results in runs.items())


def claims(folder: Path, profile: str = "cpu") -> str:
    """The verdict on each claim of the CT paper, a column for each site."""
    found, head = {}, ["claim"]
    for site, title in SITES.items():
        path = folder / "does_it_work" / f"{profile}_{site}_verdicts.json"
        head.append(f"[{title}](experiments/results/does_it_work/{path.name})")
        given = json.loads(path.read_text()) if path.exists() else {"claims": {}}
        for claim, judged in given["claims"].items():
            found.setdefault(claim, {})[site] = verdict(judged)
    rows = [
        [claim, *(cells.get(s, "-") for s in SITES)] for claim, cells in found.items()
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def verdict(judged: dict) -> str:
    """ "refuted: -6.4 ± 1.0 (-10.2 to -2.1) [5.8], N = 1,492"."""
    word = judged["verdict"].split(":")[0]
    gain = judged["difference"]
    return (
        f"{word}: {paired.shown(gain, '+')} [{100 * gain['detectable']:.1f}], "
        f"N = {judged['predictions']:,}"
    )


def collected(folder: Path) -> dict[str, dict]:
    """File name -> contents, of the files that collect_result wrote."""
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    keys = {"metrics", "data", "config", "device"}
    return {n: found[n] for n in sorted(found) if keys <= set(found[n])}


def row(name: str, results: dict) -> str:
    data, config, metrics = results["data"], results["config"], results["metrics"]
    whole, versions = metrics["all"], results["versions"]
    voted = "off"
    if "voted" in metrics:
        voted = f"{interval(metrics['voted'], 'accuracy')}, {metrics['flips']} flipped"
    cells = [
        f"[{data['name']}](experiments/results/{name}), {data['split_scheme']}",
        method(config),
        config["model"]["name"] + pretrained(config),
        str(whole["number"]),
        *(interval(whole, key) for key in ("accuracy", "f1", "auc")),
        voted,
        data["leakage"]["verdict"],
        f"{config['seed']}, {results['device']['kind']}, cxai-jax "
        f"{versions['cxai-jax']}, jax {versions['jax']}",
    ]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |\n"


def method(config: dict) -> str:
    """What the loss and the batch were made of."""
    parts = ["cross-entropy"]
    parts += [config["mix"]["name"]] * (config["mix"]["name"] != "none")
    parts += ["CPE"] * (config["cpe"]["weight"] > 0)
    parts += ["NT-Xent"] * (config.get("contrastive", {}).get("weight", 0) > 0)
    parts += ["alignment"] * (config["align"]["weight"] > 0)
    parts += ["lung mask"] * (config["align"]["mask_weight"] > 0)
    return " + ".join(parts)


def pretrained(config: dict) -> str:
    weights = config["model"]["pretrained"]
    return f", {weights}" if weights else ", from scratch"


def interval(values: dict, key: str) -> str:
    """ "91.3 (88.0-94.1)" in percent."""
    low, high = values["intervals"][key]
    return f"{100 * values[key]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


if __name__ == "__main__":
    main()
