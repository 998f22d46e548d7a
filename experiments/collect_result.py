"""Keeps the numbers of a finished run under experiments/results, small to commit.

python -m experiments.collect_result RUN NAME

Learning curve, flipped images and everything that names a place on this machine are
left out; data, split scheme, seed, versions, device, leakage verdict and intervals
stay. `python -m experiments.results_table` then renews the table of the README.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from cxai_jax.writer import write_json

RESULTS = Path(__file__).parent / "results"
KEPT = ("metrics", "explanations", "calibration", "selected", "data", "config", "steps")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="workdir of the run")
    parser.add_argument("name", help="site_b_full gives results/site_b_full.json")
    options = parser.parse_args(arguments)
    path = options.run / "results.json"
    if not path.exists():
        parser.error(f"{path} does not exist: {options.run} is no finished run")
    target = RESULTS / f"{options.name}.json"
    write_json(target, trimmed(json.loads(path.read_text())))
    print(f"{target}; now run python -m experiments.results_table")


def trimmed(results: dict) -> dict:
    """The contents of results.json without curve, lists of images and paths."""
    kept = {name: results[name] for name in KEPT}
    flips = kept["metrics"].pop("flips", None)
    if flips is not None:
        kept["metrics"]["flips"] = len(flips)
    kept["data"]["leakage"] = {"verdict": kept["data"]["leakage"].get("verdict")}
    kept["config"]["data"].pop("data_dir")
    weights = kept["config"]["model"]["pretrained"]
    kept["config"]["model"]["pretrained"] = weights.replace("\\", "/").split("/")[-1]
    if "time" in results:  # A run scored again by --mode=eval trained in no time.
        kept["train_seconds"] = round(results["time"]["total_s"])
    return kept | {"versions": results["versions"], "device": results["device"]}


if __name__ == "__main__":
    main()
