"""A trained model in one folder, for use without its workdir or its data.

`model.safetensors` (weights), `config.json`, `model.json` (classes, sites, positive
class, calibration, scores), `training_images.json` and `training_features.npz` (hashes,
gray levels and features, for the flags of `predict`), `README.md` (the model card) and
`manifest.json` with the SHA-256 of each. Nothing in it is a pickle or runs code.
"""

import hashlib
import json
import re
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cxai_jax import disk
from cxai_jax.config import read_config
from cxai_jax.data import novelty
from cxai_jax.inference import card
from cxai_jax.inference.predictor import (
    Trained,
    assemble,
    empty_network,
    load,
    names_of,
)
from cxai_jax.types import PyTree
from cxai_jax.writer import read_json, write_json

WEIGHTS, ABOUT, MANIFEST = "model.safetensors", "model.json", "manifest.json"
KNOWN = (novelty.FILE, novelty.FEATURES)  # What tells a foreign image.
FILES = (WEIGHTS, "config.json", ABOUT, *KNOWN, "README.md")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Fields that may name a file or folder of this machine.
LOCAL = (("model", "pretrained"), ("data", "photographs"), ("adapt", "perceptual"))
KEPT = (
    "data",
    "tested",
    "metrics",
    "calibration",
    "maps",
    "finished",
    "pretrained",
    "selected",
    "versions",
)


def write(workdir: Path, folder: Path) -> dict[str, str]:
    """Writes the bundle of a finished run.

    Args:
      workdir: of the run.
      folder: new or empty.

    Returns:
      The manifest: file name -> SHA-256.

    Raises:
      ValueError: if the folder holds files, or as `predictor.load`.
      DiskError: if it cannot be written.
      ImportError: without safetensors.
    """
    from safetensors.numpy import save_file  # Optional, as for pretrained weights.

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; choose a new --bundle folder")
    disk.check(disk.nearest(folder))
    trained = load(workdir)
    novelty.load(workdir)  # Raises where it is missing or of an earlier version.
    novelty.load_features(workdir)
    results = trained.results
    config = json.loads(trained.config.to_json())
    config["data"]["data_dir"] = "data"  # A place on this machine is nobody's matter.
    for group, field in LOCAL:
        config[group][field] = without_folder(config[group][field])
    about = {key: results[key] for key in KEPT if key in results}
    if about.get("pretrained", {}).get("source"):
        about["pretrained"]["source"] = Path(about["pretrained"]["source"]).name
    about |= {"step": trained.step, "config": config}
    folder.mkdir(parents=True, exist_ok=True)
    flat = flatten_dict(jax.device_get(trained.variables), sep="/")
    tensors = {name: np.ascontiguousarray(value) for name, value in flat.items()}
    save_file(tensors, folder / WEIGHTS)
    write_json(folder / "config.json", config)
    write_json(folder / ABOUT, about)
    for name in KNOWN:
        (folder / name).write_bytes((workdir / name).read_bytes())
    disk.write(folder / "README.md", card.model_card(about))
    manifest = {name: digest(folder / name) for name in FILES}
    write_json(folder / MANIFEST, manifest)
    return manifest


def without_folder(name: str) -> str:
    """The last part of an absolute path; any other name, such as a hub id, as it is."""
    path = Path(name).expanduser()
    return path.name if path.is_absolute() else name


def read(folder: Path) -> Trained:
    """Loads the model of a bundle whose files are as they were written.

    Raises:
      FileNotFoundError: if there is no bundle, or one of its files is missing.
      ValueError: if a file has been changed or does not fit the network.
      ImportError: without safetensors.
    """
    from safetensors.numpy import load_file

    check(folder)
    config = read_config(folder)
    about = read_json(folder / ABOUT, "data", "step")
    names = names_of(about["data"], folder / ABOUT)
    network = empty_network(config, *names[:2])
    variables = unflatten_dict(load_file(folder / WEIGHTS), sep="/")
    check_fit(folder, variables, network.variables)
    return assemble(config, names, network, variables, about["step"], folder / ABOUT)


def check(folder: Path) -> None:
    """Compares every file with the manifest; errors as in `read`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {folder} is no bundle; write one with cxai-export "
            "--workdir=RUN --bundle=DIR"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        wanted = {name: str(manifest[name]) for name in FILES}
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is damaged; fetch or export the bundle again"
        ) from None
    for name, sha256 in wanted.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing from the bundle; fetch or export it again"
            )
        if digest(file) != sha256:
            raise ValueError(
                f"{file} is not the file that was exported (its SHA-256 differs from "
                f"{MANIFEST}); fetch or export the bundle again"
            )


def check_fit(folder: Path, variables: PyTree, template: PyTree) -> None:
    """Raises ValueError unless names and shapes are those of the network."""
    shapes = {n: v.shape for n, v in flatten_dict(variables, sep="/").items()}
    wanted = {n: v.shape for n, v in flatten_dict(template, sep="/").items()}
    if odd := sorted(n for n in shapes | wanted if shapes.get(n) != wanted.get(n)):
        raise ValueError(
            f"{folder / WEIGHTS} does not fit the network of its config.json: {odd[0]} "
            f"has the shape {shapes.get(odd[0], 'none')}, expected "
            f"{wanted.get(odd[0], 'none')}"
        )


def digest(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def locate(model: str) -> Path:
    """The folder of `--model`: one that exists, or else fetched by its hub id.

    Raises:
      FileNotFoundError: if it is neither.
      ImportError: without huggingface_hub.
      ValueError: if it cannot be fetched.
    """
    if Path(model).exists():
        return Path(model)
    if not HUB_ID.fullmatch(model):
        raise FileNotFoundError(
            f"--model={model} does not exist; give the folder of a bundle, or a hub id "
            "OWNER/NAME"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=[*FILES, MANIFEST]))
    except Exception as error:  # Its errors share no base class of their own.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot fetch --model={model} ({type(error).__name__}: {reason}); check "
            "the id and the network, or name a folder"
        ) from None


def push(folder: Path, repository: str) -> str:
    """Uploads a bundle to a private hub repository; returns its address.

    Raises:
      ValueError: for a malformed id, or if the hub refuses.
      ImportError: without huggingface_hub.
    """
    if not HUB_ID.fullmatch(repository):
        raise ValueError(f"--push={repository} is no hub id; give OWNER/NAME")
    check(folder)
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # As above.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--push={repository} failed ({type(error).__name__}: {reason}); log in "
            f"with `hf auth login`; the bundle itself is complete in {folder}"
        ) from None
