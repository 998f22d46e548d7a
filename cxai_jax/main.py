"""python -m cxai_jax.main --config=configs/siteB.py:full,lite0 --workdir=runs/b"""

import logging
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from cxai_jax import train
from cxai_jax.config import check_overrides, load_config_file

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "File under configs/.")
WORKDIR = flags.DEFINE_string("workdir", "", "Results; default runs/<config name>.")
MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval"], "Train and score, or score a checkpoint."
)
# What a one-line message explains; anything else is a bug and keeps its traceback.
EXPLAINED = (ValueError, FileNotFoundError, FloatingPointError, ImportError)


def main(_) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("absl", "orbax", "jax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    name, _, rows = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    default = Path("runs", "-".join([Path(name).stem, *filter(None, rows.split(","))]))
    workdir = Path(WORKDIR.value or default)
    jax.config.update(
        "jax_compilation_cache_dir", str(workdir.absolute() / "xla_cache")
    )
    try:
        run = {"train": train.train, "eval": train.score}[MODE.value]
        results = run(CONFIG.value, workdir)
    except EXPLAINED as error:
        sys.exit(f"error: {error}")
    if jax.process_index() == 0:
        print(results["metrics"]["all"])
        print(f"results: {workdir / 'results.json'}")


def check_command_line(arguments: list[str]) -> None:
    """Raises ValueError for a config or field that does not exist, before absl does."""
    files = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    if len(files) != 1:
        raise ValueError(
            "name one config, for example --config=configs/demo.py; got "
            f"{len(files)} --config= arguments"
        )
    check_overrides(arguments, load_config_file(files[0]))


if __name__ == "__main__":
    if not {"--help", "--helpfull", "--helpshort"} & set(sys.argv):
        try:
            check_command_line(sys.argv[1:])
        except EXPLAINED as error:
            sys.exit(f"error: {error}")
    app.run(main)
