"""What a step must cost: FLOPs and bytes of a ResNet-50, and the time they need.

Counted from the architecture and never from XLA's cost analysis, which also counts
recomputation and transposes. A floor is the sum over kernels of the larger of compute
time and memory time, because kernels run one after the other. A multiply-add is two
FLOPs; activations and weights move in `itemsize` bytes, master weights in float32.
"""

from typing import NamedTuple

BLOCKS = (3, 4, 6, 3)
OPTIMIZER_BYTES = 28  # Per weight: read p, m, g; write p, m, g; cast p and read it.


class Conv(NamedTuple):
    """One convolution of one image; element counts, square maps."""

    name: str
    inputs: int  # elements read
    outputs: int  # elements written
    weights: int
    flops: int
    ends_block: bool = False  # Its norm also adds the shortcut.
    is_shortcut: bool = False  # Its norm is part of the kernel that adds it.


class Machine(NamedTuple):
    """What `python -m tools.benchmark roof` measures."""

    bytes_per_s: float
    flops_per_s: float


class Kernel(NamedTuple):
    """Work of one kernel on one image, `weights` being read once per batch."""

    flops: int
    elements: int
    weights: int = 0


def resnet50(size: int = 224) -> tuple[Conv, ...]:
    """The 53 convolutions of a ResNet-50 v1.5 (stride in the 3x3), classifier apart.

    Args:
      size: pixels, side of the input.
    """

    def conv(name, side, channels, kernel, width, stride=1, **role):
        after = -(-side // stride)
        weights = kernel * kernel * channels * width
        outputs = after * after * width
        inputs = side * side * channels
        return Conv(name, inputs, outputs, weights, 2 * weights * after**2, **role)

    side = -(-size // 2)
    convs = [conv("conv1", size, 3, 7, 64, stride=2)]
    side, channels = -(-side // 2), 64
    for stage, count in enumerate(BLOCKS):
        width = 64 << stage
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            stride = 2 if stage and not block else 1
            after = -(-side // stride)
            if not block:
                convs.append(
                    conv(
                        f"{name}.downsample",
                        side,
                        channels,
                        1,
                        4 * width,
                        stride=stride,
                        is_shortcut=True,
                    )
                )
            convs += [
                conv(f"{name}.conv1", side, channels, 1, width),
                conv(f"{name}.conv2", side, width, 3, width, stride=stride),
                conv(f"{name}.conv3", after, width, 1, 4 * width, ends_block=True),
            ]
            side, channels = after, 4 * width
    return tuple(convs)


def forward_flops(size: int = 224) -> int:
    """FLOPs of one image's forward pass through the convolutions."""
    return sum(conv.flops for conv in resnet50(size))


def kernels(work: str, size: int = 224) -> list[Kernel]:
    """The kernels of one image's pass; norms included, optimiser not.

    Args:
      work: one of
        "infer_folded"   norm folded into the convolution, shortcut and ReLU in its
                         epilogue;
        "infer"          one elementwise kernel per norm;
        "forward"        norm by batch statistics: one more read of each output;
        "train"          forward and backward as XLA does it: statistics and apply,
                         then reduce, apply, input and weight gradient;
        "train_fused"    statistics, scale and ReLU inside the convolutions.
      size: pixels, side of the input.

    Raises:
      ValueError: for an unknown `work`.
    """
    if work not in ("infer_folded", "infer", "forward", "train", "train_fused"):
        raise ValueError(
            f"work is {work!r}; known: infer_folded, infer, forward, train, train_fused"
        )
    convs = resnet50(size)
    stem, pooled = convs[0].outputs, convs[0].outputs // 4
    result = [Kernel(0, stem + pooled)]
    for conv in convs:
        # Reads of the shortcut. A projected one is normalised where it is added, so
        # its own norm has no kernel that applies it.
        shortcut = conv.outputs if conv.ends_block else 0
        if work == "infer_folded":
            moved = conv.inputs + conv.outputs + shortcut
            result.append(Kernel(conv.flops, moved, conv.weights))
            continue
        result.append(Kernel(conv.flops, conv.inputs + conv.outputs, conv.weights))
        if work == "train_fused":
            if conv.ends_block:  # The block's output has two readers: write it out.
                result.append(Kernel(0, 3 * conv.outputs))
        else:
            if work != "infer":
                result.append(Kernel(0, conv.outputs))
            if not conv.is_shortcut:
                result.append(Kernel(0, 2 * conv.outputs + shortcut))
    if work not in ("train", "train_fused"):
        return result
    result.append(Kernel(0, stem + pooled))
    for conv in convs:
        fused = work == "train_fused"
        # ReLU's mask comes from the norm's input, at a block's end from its output.
        mask = conv.outputs if conv.ends_block and not fused else 0
        if not fused:
            result.append(Kernel(0, 2 * conv.outputs + mask))
        result.append(Kernel(0, 3 * conv.outputs + mask))
        moved = conv.inputs + conv.outputs
        result.append(Kernel(conv.flops, moved, conv.weights))
        if conv.name != "conv1":  # Nobody asks for the gradient of the image.
            masked = conv.inputs if fused else 0
            result.append(Kernel(conv.flops, moved + masked, conv.weights))
    return result


def bytes_per_image(
    work: str, *, batch: int, itemsize: int = 2, size: int = 224
) -> float:
    """Bytes that one image's pass must move, its share of the weights included."""
    return sum(
        itemsize * (kernel.elements + kernel.weights / batch)
        for kernel in kernels(work, size)
    )


def flops_per_image(work: str, size: int = 224) -> int:
    """FLOPs of one image's pass through the convolutions."""
    return sum(kernel.flops for kernel in kernels(work, size))


def floor_us(
    work: str, machine: Machine, *, batch: int, itemsize: int = 2, size: int = 224
) -> float:
    """Microseconds per image: sum over kernels of max(compute time, memory time)."""
    return 1e6 * sum(
        max(
            kernel.flops / machine.flops_per_s,
            itemsize * (kernel.elements + kernel.weights / batch) / machine.bytes_per_s,
        )
        for kernel in kernels(work, size)
    )


def optimizer_us(machine: Machine, *, batch: int, weights: int = 23_512_130) -> float:
    """Microseconds per image of SGD with momentum on float32 master weights.

    Args:
      batch: images per step.
      weights: all parameters; the default is a ResNet-50 with two classes.
    """
    return 1e6 * OPTIMIZER_BYTES * weights / batch / machine.bytes_per_s
