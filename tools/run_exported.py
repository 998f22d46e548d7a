"""Runs a model that tools/export_model.py wrote; needs jax, numpy and flatbuffers.

python run_exported.py model.bin images.npy     # uint8 [B, S, S], gray, squashed to S
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax import export

if __name__ == "__main__":
    model, images = sys.argv[1:]
    exported = export.deserialize(bytearray(Path(model).read_bytes()))
    out = jax.jit(exported.call)(np.load(images))
    for row in range(len(out["label"][next(iter(out["label"]))])):
        label = next(name for name, is_it in out["label"].items() if is_it[row])
        chances = {name: f"{p[row]:.4f}" for name, p in out["probability"].items()}
        print(row, label, chances)
