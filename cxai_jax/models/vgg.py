"""VGG-19 up to relu4_2 (Simonyan and Zisserman 2015), which only compares images.

Its maps say how far two images differ in content and style (Gatys et al. 2016). The
weights are never trained: ImageNet's from a file where one is at hand, otherwise random
ones, whose Gram matrices carry texture as well (Ustyuzhaninov et al. 2017).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cxai_jax.models import pretrained
from cxai_jax.types import Array, PyTree

# torchvision's number of each convolution, and its width in units of the first; a
# maximum over 2x2 stands before the first of each block but the first.
BLOCKS = (((0, 1), (2, 1)), ((5, 2), (7, 2)), ((10, 4), (12, 4), (14, 4), (16, 4)))
BLOCKS += (((19, 8), (21, 8)),)


class VGG19(nn.Module):
    """Maps relu1_1, relu2_1, relu3_1, relu4_1 for style and relu4_2 for content.

    Attributes:
      width: channels of the first block; the ImageNet weights have 64.
    """

    width: int = 64

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        """Images in -1..1 [B, H, W, 3], side 8 or more -> the five maps."""
        maps = []
        for block in BLOCKS:
            if maps:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for place, (number, times) in enumerate(block):
                layer = nn.Conv(
                    self.width * times,
                    (3, 3),
                    kernel_init=nn.initializers.he_normal(),
                    name=f"features{number}",
                )
                x = nn.relu(layer(x))
                if place == 0:
                    maps.append(x)
        return [*maps, x]


def weights(network: VGG19, spec: str, key: Array) -> PyTree:
    """Parameters from a file in torchvision's names, or random ones.

    Args:
      network: its width must be that of the file.
      spec: as `config.model.pretrained`; "" draws random weights from `key`.

    Raises:
      ValueError: if the file lacks a convolution or has one of another shape.
    """
    params = network.init(key, jnp.zeros((1, 32, 32, 3)))["params"]
    if not spec:
        return params
    tensors = pretrained.read_tensors(spec)
    filled = {}
    for layer, own in params.items():
        name = f"features.{layer.removeprefix('features')}"
        if f"{name}.weight" not in tensors:
            raise ValueError(f"{spec} has no {name}.weight; expected those of VGG-19")
        kernel = np.transpose(tensors[f"{name}.weight"], (2, 3, 1, 0))
        if kernel.shape != own["kernel"].shape:
            raise ValueError(
                f"{spec}: {name}.weight is {kernel.shape}, expected "
                f"{own['kernel'].shape}; config.adapt.perceptual_width must be 64"
            )
        filled[layer] = {
            "kernel": jnp.asarray(kernel, jnp.float32),
            "bias": jnp.asarray(tensors[f"{name}.bias"], jnp.float32),
        }
    return jax.tree.map(jnp.asarray, filled)
