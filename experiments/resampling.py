"""What storing images at short side 256 changes in a network's input (A18).

python -m experiments.resampling --images=DIR --pretrained=WEIGHTS --name=resampling

Compares, for every image file under DIR, the two ways from a file to 224 x 224 pixels:
straight, as the published test transform, and over the prepared data set's 256. The
distance between the pooled features of both is given as a share of the median distance
between the features of different images. A file of short side 256 cannot differ.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from configs import common
from configs.rows import apply_rows
from cxai_jax.data import inputs, transforms
from cxai_jax.data.augment import normalise
from cxai_jax.training.results import versions
from cxai_jax.training.run import build_network
from cxai_jax.writer import write_json

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="folder of original files")
    parser.add_argument("--pretrained", default="lite0-imagenet", help="Lite0 weights")
    parser.add_argument("--name", required=True, help="of the file in results/")
    given = parser.parse_args(arguments)
    grays = [transforms.open_gray(f) for f in inputs.find([given.images]).files]
    config = apply_rows(common.get_config(), "lite0")
    config.model.pretrained = given.pretrained
    network = build_network(config, 2)

    def features(images: np.ndarray) -> np.ndarray:
        x = normalise(images, network.scale.mean, network.scale.std)
        _, out = network.model.apply(network.variables, x, "eval")
        return out.features.mean((1, 2))

    found = measure(grays, config.data.image_size, jax.jit(features))
    found |= {
        "images": Path(given.images).name,
        "number": len(grays),
        "features": "efficientnet_lite0, ImageNet weights, pooled",
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
    }
    write_json(RESULTS / f"{given.name}.json", found)
    print(found)


def measure(grays: Sequence[np.ndarray], size: int, features) -> dict:
    """Differences between both ways, over images.

    Args:
      grays: opened files, uint8 [H, W, 1] each.
      size: pixels, side of the network's input.
      features: uint8 [B, size, size, 1] -> [B, D].
    """
    straight = np.stack([transforms.squash(g, size) for g in grays])
    stored = [transforms.as_stored(g) for g in grays]
    twice = np.stack([transforms.squash(g, size) for g in stored])
    levels = np.abs(straight.astype(int) - twice)
    one, other = (np.asarray(features(x), np.float64) for x in (straight, twice))
    apart = np.linalg.norm(one[:, None] - one[None], axis=-1)
    between = np.median(apart[np.triu_indices(len(one), 1)])
    moved = np.linalg.norm(one - other, axis=1) / between
    full, small = (
        sum(len(transforms.encode_png(g)) for g in x) for x in (grays, stored)
    )
    return {
        "short_side_of_files": np.quantile(
            [min(g.shape[:2]) for g in grays], (0, 0.5, 1)
        ).tolist(),
        "gray_levels": {"mean": float(levels.mean()), "largest": int(levels.max())},
        "feature_distance_over_median_between_images": {
            "mean": float(moved.mean()),
            "largest": float(moved.max()),
        },
        "png_bytes_full_over_stored": full / small,
    }


if __name__ == "__main__":
    main()
