"""Checks pretrained weights against a backbone and writes them as one .npz.

    python -m cxai_jax.models.convert --model=resnet50 --source=resnet50.pth \\
        --output=resnet50.npz

The output keeps torch's names and layout in float32; name it in
config.model.pretrained. Sources: see cxai_jax/models/pretrained.py.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cxai_jax import models
from cxai_jax.config import load_config_file
from cxai_jax.models import pretrained


def main() -> None:
    """Reads, checks, writes, and says what was done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, choices=sorted(pretrained.with_weights())
    )
    parser.add_argument("--source", required=True, help=pretrained.SOURCES)
    parser.add_argument("--output", required=True, type=Path, help="ends in .npz")
    arguments = parser.parse_args()
    if arguments.output.suffix != ".npz":
        parser.error(f"--output={arguments.output} does not end in .npz")
    try:
        tensors, summary = convert(arguments.source, arguments.model)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"{error}\n")
    np.savez(arguments.output, **tensors)
    print(
        f"{arguments.output}: {summary['loaded']} tensors of {arguments.model}, "
        f"{summary['ignored']} ignored"
    )


def convert(source: str, model_name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Reads a source and proves that it fills the backbone, classifier included.

    Args:
      source: as config.model.pretrained.
      model_name: one of `pretrained.with_weights()`.

    Returns:
      torch name -> float32 tensor, and the summary of `pretrained.fill`.

    Raises:
      ValueError, FileNotFoundError, ImportError: as `pretrained.load_pretrained`.
    """
    tensors = pretrained.read_tensors(source)
    targets = {pretrained.translate(name, model_name): name for name in tensors}
    if "params/head/bias" not in targets:
        raise ValueError(f"{source} has no classifier bias that {model_name} knows")
    config = load_config_file("common").model
    config.name = model_name
    model = models.build(config, len(tensors[targets["params/head/bias"]]))
    shapes = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 64, 64, 3)), "eval"),
        jax.random.key(0),
    )
    try:
        _, summary = pretrained.fill(tensors, model_name, shapes)
    except ValueError as error:
        raise ValueError(f"{source} does not fit {model_name}: {error}") from None
    kept = {
        name: tensor.astype(np.float32)
        for name, tensor in tensors.items()
        if not pretrained.IGNORED.fullmatch(name)
    }
    return kept, summary


if __name__ == "__main__":
    main()
