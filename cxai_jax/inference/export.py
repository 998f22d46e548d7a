"""A trained model in one file, for use without this package, or as a bundle.

cxai-export --workdir=runs/b --bundle=DIR [--push=OWNER/NAME]
cxai-export --workdir=runs/b --out=model.bin [--votes=31] [--site=A]

The same as python -m cxai_jax.inference.export. A bundle is what `cxai-predict --model`
reads, see bundle.py. The file holds the weights, the preprocessing, the class maps and,
with votes, the test-time voting as StableHLO for CPU, CUDA and TPU, for any number of
images; `tools/run_exported.py` reads it with jax alone. Writing and reading the file
need the package flatbuffers, the bundle safetensors (both: extra `export`).
"""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

from cxai_jax import disk
from cxai_jax.inference import bundle
from cxai_jax.inference.predictor import Trained, chosen_sites, load
from cxai_jax.types import Array
from cxai_jax.voting.forward import make_voting_step

PLATFORMS = ("cpu", "cuda", "tpu")


def make_function(model: Trained, site: int | None = None) -> Callable[[Array], dict]:
    """The function that is exported; `site` is the one that its images come from.

    Takes gray uint8 [B, S, S], squashed to the network's size S. Returns, each with one
    entry per class name: `probability` float32 [B], `class_map` float32 [B, h, w] and
    `label` bool [B], after voting if the config's tta.k is above 0; then also
    `opposing`, int32 [B] votes against the label before voting.
    """
    config, names = model.config.tta, model.class_names
    voting = make_voting_step(model.model, model.scale, config)

    def predict(images: Array) -> dict:
        own = None if site is None else jnp.full(images.shape[:1], site, jnp.int32)
        return voting(model.variables, images, own)

    def by_class(values: Array) -> dict:
        return {name: values[..., i] for i, name in enumerate(names)}

    def run(images: Array) -> dict:
        # One image after the other, so that the memory of its variants is bounded
        # whatever the batch; without votes the whole batch is one pass.
        if config.k:
            out = jax.lax.map(
                lambda image: jax.tree.map(
                    lambda x: x[0], predict(image[None, ..., None])
                ),
                images,
            )
            label = out["votes"].labels
            more = {"opposing": out["votes"].opposing}
        else:
            out = predict(images[..., None])
            label, more = out["logits"].argmax(-1), {}
        return more | {
            "probability": by_class(out["probs"][:, 0]),
            "class_map": by_class(out["class_maps"]),
            "label": by_class(label[:, None] == jnp.arange(len(names))),
        }

    return run


def export_model(
    model: Trained, platforms: Sequence[str] = PLATFORMS, site: int | None = None
) -> export.Exported:
    """`make_function` for any number of images, on the given platforms."""
    size = model.config.data.image_size
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size), jnp.uint8)
    return export.export(jax.jit(make_function(model, site)), platforms=platforms)(
        images
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exits with 2 for bad input."""
    parser = argparse.ArgumentParser(prog="cxai-export")
    parser.add_argument("--workdir", type=Path, required=True)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="file that jax alone can run")
    target.add_argument("--bundle", type=Path, help="new folder for cxai-predict")
    parser.add_argument("--push", help="upload the bundle as this hub id, privately")
    parser.add_argument("--votes", type=int, default=0, help="masks per image; 0: none")
    parser.add_argument("--site", default="", help="NAME of the site of the images")
    given = parser.parse_args(arguments)
    if given.push and not given.bundle:
        parser.error("--push uploads a bundle; give --bundle=DIR with it")
    try:
        print(export_bundle(given) if given.bundle else export_file(given))
    except ImportError as error:
        parser.exit(2, f"error: this needs {error.name}: pip install {error.name}\n")
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    except OSError as error:
        if not (told := disk.explain(error, "the same command begins anew")):
            raise
        parser.exit(2, f"error: {told}\n")


def export_bundle(given: argparse.Namespace) -> str:
    """Writes the bundle and uploads it where asked to; says what was done."""
    manifest = bundle.write(given.workdir, given.bundle)
    told = f"{given.bundle}: {', '.join(manifest)} and {bundle.MANIFEST}"
    if given.push:
        told += f"\npushed to {bundle.push(given.bundle, given.push)}"
    return told


def export_file(given: argparse.Namespace) -> str:
    """Writes the StableHLO file; says what it takes and gives."""
    import flatbuffers  # noqa: F401 - jax needs it last, and does not say its name.

    if given.out.is_dir():
        raise ValueError(f"--out={given.out} is a folder; name a file to be written")
    if not os.path.exists(given.out.parent):
        raise ValueError(f"--out={given.out}: there is no such folder; make it first")
    disk.check(given.out.parent)
    model = load(given.workdir)
    model.config.tta.k = given.votes
    sites = list(chosen_sites(model, given.site).values())
    if len(sites) > 1:
        raise ValueError("--site=each: a file is for one site; export one for each")
    data = export_model(model, site=sites[0] if sites else None).serialize()
    disk.write(given.out, data)
    size = model.config.data.image_size
    return (
        f"{given.out}: {len(data) / 1e6:.1f} MB, {', '.join(PLATFORMS)}, "
        f"gray uint8 [B, {size}, {size}] -> {', '.join(model.class_names)}"
    )


if __name__ == "__main__":
    main()
