"""cxai-train --config=siteB:full,lite0 --workdir=runs/b

The same: python -m cxai_jax.main --config=configs/siteB.py:full,lite0 --workdir=runs/b
"""

import logging
import sys
import warnings
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from cxai_jax import host
from cxai_jax.config import check_overrides, config_path, load_config_file
from cxai_jax.inference.external import score_external
from cxai_jax.report.terminal import summary
from cxai_jax.training import check
from cxai_jax.training.loop import score, train

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py or name, :ROWS.")
WORKDIR = flags.DEFINE_string("workdir", "", "Results; default runs/<config name>.")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "check"],
    "Train and score; score a checkpoint; or check everything without a run.",
)
ON = flags.DEFINE_string(
    "on", "", "With --mode=eval: other data, as folder:NAME; results in eval/NAME."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other hosts, which Slurm or the TPU pod tells of."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where nothing tells of it."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator, from 0.")
# What a one-line message explains; anything else is a bug and keeps its traceback.
EXPLAINED = (ValueError, FileNotFoundError, FloatingPointError, ImportError)


def main(_) -> None:
    host.keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for noisy in ("absl", "orbax", "jax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    workdir = Path(WORKDIR.value or default_workdir())
    jax.config.update(
        "jax_compilation_cache_dir", str(workdir.absolute() / "xla_cache")
    )
    try:
        join_hosts()
        if MODE.value == "check":
            text = check.check(CONFIG.value, workdir)
        else:
            if warning := check.unused_gpu():
                logging.warning(warning)
            if ON.value:
                out, results = score_external(CONFIG.value, workdir, ON.value)
            else:
                run = {"train": train, "eval": score}[MODE.value]
                out, results = workdir, run(CONFIG.value, workdir)
            text = f"{summary(results)}\nreport: {out / 'report.html'}"
    except EXPLAINED as error:
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"error: {out_of_memory(CONFIG.value)}")
    if jax.process_index() == 0:
        print(text)


def default_workdir() -> Path:
    """runs/CONFIG-ROW-ROW."""
    name, _, rows = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    return Path("runs", "-".join([Path(name).stem, *filter(None, rows.split(","))]))


def join_hosts() -> None:
    """Joins the processes of a multi-host run, before the first device is touched.

    Raises:
      ValueError: if --coordinator, --num_processes and --process_id are not together.
    """
    given = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if given.count(None) not in (0, 3):
        raise ValueError(
            "--coordinator, --num_processes and --process_id belong together; on Slurm "
            "and TPU pods --distributed alone finds all three"
        )
    if DISTRIBUTED.value or COORDINATOR.value:
        jax.distributed.initialize(*given)


def out_of_memory(config) -> str:
    """What to do when the devices' memory ran out."""
    return (
        "the devices ran out of memory. Halve "
        f"config.train.batch_size={config.train.batch_size} or double "
        f"config.train.accumulate={config.train.accumulate} (in training), halve "
        f"config.tta.chunk={config.tta.chunk} (in scoring), or set "
        "config.model.remat=True or config.data.residency=host"
    )


def checked(arguments: list[str]) -> list[str]:
    """The command line as absl wants it: --config first, and a path.

    Raises:
      ValueError, FileNotFoundError: for a config or field that does not exist, or --on
        without what it needs, before absl says less.
    """
    arguments = list(map(through_json, arguments))
    files = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    others = [a for a in arguments if not a.startswith("--config=")]
    if any(a.startswith("--on") for a in others):
        if not {"--mode=eval"} & set(others) or not any(
            a.startswith("--workdir=") for a in others
        ):
            raise ValueError(
                "--on=NAME scores a finished run on other data; give --mode=eval and "
                "--workdir=RUN with it"
            )
        if not files and not any(a.startswith("--config.") for a in others):
            return others  # With the run's own config.
    if len(files) != 1:
        raise ValueError(
            "name one config, for example --config=demo or --config=configs/demo.py "
            f"with its equals sign; got {len(files)} --config= arguments"
        )
    check_overrides(others, load_config_file(files[0]))
    name, colon, rows = files[0].partition(":")
    return [f"--config={config_path(name)}{colon}{rows}", *others]


def cli() -> None:
    """The command: `cxai-train`, or python -m cxai_jax.main."""
    arguments = sys.argv[1:]
    if not {"--help", "--helpfull", "--helpshort"} & set(arguments):
        try:
            arguments = checked(arguments)
        except EXPLAINED as error:
            sys.exit(f"error: {error}")
    app.run(main, argv=[sys.argv[0], *arguments])


def through_json(argument: str) -> str:
    """--config=FILE.json as the config that reads it: settings that run nothing."""
    name = argument.removeprefix("--config=")
    if name == argument or not name.endswith(".json") or ".py:" in name:
        return argument
    return f"--config=configs/from_json.py:{name}"


if __name__ == "__main__":
    cli()
