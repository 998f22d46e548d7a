"""Writes the table under "## Results" of the README from experiments/results/*.json.

python -m experiments.results_table
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- The table is written by python -m experiments.results_table. -->\n"
END = "<!-- End of the table. -->\n"
HEAD = (
    "| data, split | method | backbone | test images | accuracy | F1 | AUC | after "
    "voting | leakage check | seed, device, versions |\n" + "|---" * 10 + "|\n"
)


def main() -> None:
    README.write_text(renewed(README.read_text("utf-8"), table(RESULTS)), "utf-8")
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
