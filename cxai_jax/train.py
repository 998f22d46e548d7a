"""What `cxai-train` does, by its flags; main.py is where it begins."""

import contextlib
import logging
import signal
import sys
import warnings
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from cxai_jax import disk, progress, signals
from cxai_jax.config import (
    check_overrides,
    config_path,
    load_config_file,
    read_config,
)

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
    "on",
    "",
    "With --mode=eval: other data, as folder:NAME or their path; results in eval/NAME.",
)
FORCE_RESUME = flags.DEFINE_bool(
    "force_resume", False, "Continue a run although its data have changed since."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other hosts, which Slurm or the TPU pod tells of."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where nothing tells of it."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator, from 0.")
HOST_TIMEOUT_S = flags.DEFINE_float(
    "host_timeout_s", 60.0, "Silence after which a host is lost and all others end."
)
# What a one-line message explains; anything else is a bug and keeps its traceback.
EXPLAINED = (ValueError, FileNotFoundError, FloatingPointError, ImportError)
CONTINUES = "the same command continues once it can be written"


def main(_) -> None:
    import jax

    from cxai_jax import host

    host.keep_freed_memory()
    if not (DISTRIBUTED.value or COORDINATOR.value):
        host.one_device_a_core()
    disk.quiet_callbacks()
    logging.basicConfig(level=logging.INFO, handlers=[progress.Log()])
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.getLogger("jax").setLevel(logging.WARNING)
    for noisy in ("absl", "orbax"):  # What orbax logs as an error it raises as well.
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    workdir = Path(WORKDIR.value or default_workdir())
    jax.config.update(
        "jax_compilation_cache_dir", str(workdir.absolute() / "xla_cache")
    )
    try:
        config = CONFIG.value or read_config(workdir)  # Only --on goes without one.
        if config.deterministic:
            host.be_deterministic()
        with join_hosts():
            text = perform(config, workdir)
    except EXPLAINED as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if not (told := disk.explain(error, CONTINUES)):
            raise
        sys.exit(f"error: {told}")
    except KeyboardInterrupt as error:  # Where nothing listens, or the second signal.
        signals.stop(error.args[0] if error.args else signal.SIGINT, "at once")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"error: {out_of_memory(config)}")
    if jax.process_index() == 0:
        print(text)


def default_workdir() -> Path:
    """runs/CONFIG-ROW-ROW."""
    name, _, rows = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    rows = Path(rows).stem if rows.endswith(".json") else rows
    return Path("runs", "-".join([Path(name).stem, *filter(None, rows.split(","))]))


def perform(config, workdir: Path) -> str:
    """Does what --mode says; returns what is to be printed."""
    import jax

    from cxai_jax.report.terminal import summary
    from cxai_jax.training import check
    from cxai_jax.training.loop import score, train

    progress.Shown.quiet = jax.process_index() != 0
    signals.move(progress.where)
    if MODE.value == "check":
        with signals.at_once(progress.where):
            return check.check(config, workdir)
    if warning := check.unused_gpu():
        logging.warning(warning)
    out = workdir
    if ON.value:
        from cxai_jax.inference.external import score_external

        out, results = score_external(config, workdir, ON.value)
    elif MODE.value == "eval":
        results = score(config, workdir)
    else:
        results = train(config, workdir, force_resume=FORCE_RESUME.value)
    return f"{summary(results)}\nreport: {out / 'report.html'}"


def join_hosts():
    """A context in which the processes of a multi-host run have joined.

    Raises:
      ValueError: if --coordinator, --num_processes and --process_id are not together.
    """
    from cxai_jax import hosts

    given = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    if given.count(None) not in (0, 3):
        raise ValueError(
            "--coordinator, --num_processes and --process_id belong together; on Slurm "
            "and TPU pods --distributed alone finds all three"
        )
    if not (DISTRIBUTED.value or COORDINATOR.value):
        return contextlib.nullcontext()
    return hosts.joined(*given, timeout_s=HOST_TIMEOUT_S.value)


def out_of_memory(config) -> str:
    """What to do when the devices' memory ran out."""
    return (
        "the devices ran out of memory. Halve "
        f"config.train.batch_size={config.train.batch_size} or double "
        f"config.train.accumulate={config.train.accumulate} (in training), halve "
        f"config.tta.chunk={config.tta.chunk} (in scoring), or set "
        "config.model.remat=True or config.data.residency=host"
    )


def through_json(argument: str) -> str:
    """--config=FILE.json as the config that reads it: settings that run nothing."""
    name = argument.removeprefix("--config=")
    if name == argument or not name.endswith(".json") or ".py:" in name:
        return argument
    return f"--config=configs/from_json.py:{name}"


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
