"""Reading configs: overrides with known fields, and one config per workdir."""

import ast
import difflib
import importlib.util
import json
import sys
import types
from pathlib import Path

from ml_collections import ConfigDict

from cxai_jax.writer import read_json, write_json

# A wheel carries the configs of the repository inside the package.
HERE = Path(__file__).parent
PACKAGED = next(f / "configs" for f in (HERE, HERE.parent) if (f / "configs").is_dir())
# Fields that may change when a run is continued: they leave the training as it is.
FREE_FIELDS = (
    "data.data_dir",
    "data.residency",
    "eval.",
    "tta.",
    "train.log_every_steps",
    "train.checkpoint_every_",
    "train.on_nan",
    "train.keep_checkpoints",
)
# Fields that older runs lack, and the value with which they behave as they did.
ADDED_FIELDS = {
    "method": "guided",
    "deterministic": False,
    "train.checkpoint_every_minutes": 0.0,
    "train.on_nan": "stop",
    "data.target": "",
    "data.other": "",
    "data.digits_images": 0,
    "data.photographs": "",
    "adapt.weight": 1.0,
    "adapt.hidden": [100],
    "adapt.features_after": 0.5,
    "adapt.lr": 2e-4,
    "adapt.calibrator_lr": 1e-4,
    "adapt.width": 64,
    "adapt.blocks": 9,
    "adapt.pool": 100,
    "adapt.cycle_weight": 1.0,
    "adapt.content_weight": 1.0,
    "adapt.style_weight": 5e3,
    "adapt.generator_steps": 2,
    "adapt.perceptual": "",
    "adapt.perceptual_width": 64,
    "tta.prefix_reuse": "off",
    "model.projection": 0,
    "model.calibrator": 0,
    "data.normalisation": "model",
    "model.norm": "plain",
    "contrastive.weight": 0.0,
    "contrastive.temperature": 0.05,
    "optim.groups": [],
    "optim.name": "sgd",
    "model.adapter": "none",
    "model.stage4_input": "published",
    "loss.scores": "logits",
    "ms_net.warmup": 0.01,
    "ms_net.distill": 0.5,
    "data.fold": "",
    "data.split_seed": 0,
    "data.positive": "",
    "augment.rotate": 0.0,
    "augment.intensity": 0.0,
    "cpe.sqrt_d": False,
    "cpe.ramp": 0.0,
    "train.select_metric": "accuracy",
    "train.patience": 0,
    "train.class_weights": "none",
    "train.label_smoothing": 0.0,
    "train.ema": 0.0,
}


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        inner = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


def config_path(name: str) -> Path:
    """The file of a config: a path, or the name of one that comes with the package.

    Args:
      name: "mine.py", "demo", "configs/demo.py"; a file that exists comes first.

    Raises:
      FileNotFoundError: if there is neither, listing what there is.
      ValueError: for a file that is no Python program.
    """
    if "\\" in name:
        raise FileNotFoundError(
            f"{name}: write the config as a name, demo, or with forward slashes, "
            "configs/demo.py; on Windows work inside WSL"
        )
    path = Path(name)
    packaged = PACKAGED / f"{path.stem}.py"
    if path.is_file():
        if path.suffix != ".py":
            raise ValueError(
                f"{name} is no .py or .json config; write --config=FILE.py, or "
                "--config=FILE.json without rows"
                + (f", or --config=configs/{packaged.name}" * packaged.is_file())
            )
        return path
    named = str(path.parent) in (".", "configs") and path.suffix in ("", ".py")
    if named and packaged.is_file():
        return packaged
    known = ", ".join(sorted(p.stem for p in PACKAGED.glob("*.py")))
    beside = sorted(str(p) for p in path.parent.glob("*.py"))
    raise FileNotFoundError(
        f"{name} does not exist; found: {', '.join([*beside, known])}"
    )


def provide_configs() -> None:
    """Lets config files say `from configs import common` wherever they lie."""
    try:
        importlib.import_module("configs.common")
    except ModuleNotFoundError:
        package = types.ModuleType("configs")
        package.__path__ = [str(PACKAGED)]
        sys.modules["configs"] = package


def load_config_file(spec: str) -> ConfigDict:
    """The config of "siteB:full,lite0" or "configs/siteB.py:full,lite0".

    Raises:
      FileNotFoundError: if there is no such file, listing what there is.
      ValueError: for an unknown word after the colon, or a field of another type.
    """
    # A backslash means Windows, whose drive letter has a colon of its own.
    name, _, words = (spec, "", "") if "\\" in spec else spec.partition(":")
    path = config_path(name)
    provide_configs()
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_file_location(path.stem, path)
    )
    module.__spec__.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config(): it is no config of a run")
    try:
        return module.get_config(words) if words else module.get_config()
    except TypeError as error:  # A value of another type than the field's default.
        raise ValueError(f"{spec}: {' '.join(str(error).split())}") from None


def check_overrides(arguments: list[str], config: ConfigDict) -> None:
    """Raises ValueError for a `--config.x.y` that is no field, or of another type."""
    known = flatten(json.loads(config.to_json()))
    for argument in arguments:
        if not argument.startswith(("--config.", "-config.")):
            continue
        field, given, text = argument.lstrip("-").partition("=")
        field = field.removeprefix("config.")
        if field not in known:
            raise ValueError(
                f"--config.{field} is not a field; {nearest(field, known)}"
            )
        wanted = unreadable(text, known[field]) if given else ""
        if wanted:
            raise ValueError(f"config.{field} is {text!r}; expected {wanted}")


def update_from_json(config: ConfigDict, path: str) -> None:
    """Takes the fields of a JSON file over into `config`; nothing is executed.

    Raises:
      ValueError: for a field that `config` does not have, or a value of another type.
    """
    known = flatten(config.to_dict())
    changes = {}
    for field, value in flatten(read_json(Path(path))).items():
        if field not in known:
            raise ValueError(
                f"{path}: {field!r:.80} is not a field; {nearest(field, known)}"
            )
        default = known[field]
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        if isinstance(default, float) and type(value) is int and abs(value) < 2**53:
            value = float(value)
        plain = isinstance(value, str | bool | int | float) or (
            isinstance(value, tuple)
            and all(type(item) in (str, bool, int, float) for item in value)
        )
        if not plain or type(value) is not type(default):
            raise ValueError(
                f"{path}: {field} is {value!r:.80}, expected a value like {default!r}"
            )
        changes[field] = value
    config.update_from_flattened_dict(changes)


def nearest(field: str, known: dict) -> str:
    """The fields that may have been meant, first those of a similar name."""
    group = field.rpartition(".")[0]
    near = difflib.get_close_matches(field[:80], known, n=3)
    same_group = [n for n in known if n.rpartition(".")[0] == group]
    listed = near + [n for n in same_group or known if n not in near]
    return "known: " + ", ".join(f"config.{name}" for name in listed)


def unreadable(text: str, default) -> str:
    """What a field with this default expects, if it cannot be read from `text`."""
    try:
        if isinstance(default, bool):
            readable = text.lower() in ("true", "false", "t", "f", "1", "0")
            return "" if readable else "true or false"
        if isinstance(default, int | float):
            type(default)(text)
        elif isinstance(default, list) and {" ", ","} & set(text):
            ast.literal_eval(text)
    except (ValueError, SyntaxError):
        kinds = {int: "a whole number", float: "a number"}
        return kinds.get(type(default), "a tuple, such as \"(1, 4)\" or \"('a', 'b')\"")
    return ""


def claim_workdir(config: ConfigDict, workdir: Path, *, write: bool = True) -> None:
    """Writes workdir/config.json, or checks that a run found there has this config.

    A start that failed before its first checkpoint is no run: its config may be mended
    and started again in the same place.

    Raises:
      ValueError: if the workdir belongs to another config, naming the fields.
    """
    path = workdir / "config.json"
    now = json.loads(config.to_json())
    begun = any((workdir / "checkpoints").glob("*/*"))
    if path.exists() and (begun or (workdir / "results.json").exists()):
        new, old = flatten(now), ADDED_FIELDS | flatten(read_json(path))
        differing = [
            f"config.{name} is {new.get(name)!r} here and {old.get(name)!r} there"
            for name in sorted(new.keys() | old.keys())
            if new.get(name) != old.get(name) and not name.startswith(FREE_FIELDS)
        ]
        if differing:
            raise ValueError(
                f"{workdir} holds a run of another config: {'; '.join(differing)}. "
                "Choose another --workdir, or give the fields as they were"
            )
    if write:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, now)


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in `workdir`.

    Raises:
      FileNotFoundError: if there is no run.
      ValueError: if its config is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: {workdir} is not the workdir of a run; train one "
            "with python -m cxai_jax.main --config=... --workdir=..."
        )
    config = read_json(path, "data", "eval", "model", "optim", "seed", "train", "tta")
    for name, value in ADDED_FIELDS.items():
        *groups, field = name.split(".")
        place = config
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ValueError(f"{path} is damaged: {group} is {place!r}")
        place.setdefault(field, value)
    return ConfigDict(config)
