"""The peer's single convolutions: ATen's own forward and backward, channels last."""

from collections.abc import Callable

import numpy as np
import torch

from tools.peer_networks import to_torch


def make_convolution(
    x: np.ndarray,
    kernel: np.ndarray,
    dy: np.ndarray,
    *,
    stride: int,
    padding: int,
    device: str = "cpu",
    bf16: bool = False,
) -> Callable[[tuple[str, int]], None]:
    """Builds `run((name of the pass, calls))`, synchronised at its end.

    `run.about` holds what each pass computes, in our layout and float32.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, C, D], or [k, k, 1, C] for a depthwise convolution.
      dy: [B, H', W', D], gradient of the output.
      stride: step in rows and columns.
      padding: zeros on each side.
      device: "cpu" or "cuda".
      bf16: all in bfloat16.
    """
    groups = x.shape[-1] // kernel.shape[2]
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, dy = (to_torch(a, device, channels_last=True).to(dtype) for a in (x, dy))
    weight = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()).to(device, dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    window = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)

    def backward(number: int):
        wanted = [number == i for i in range(3)]
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, *window, wanted
        )[number]

    passes = {
        "forward": lambda: torch.ops.aten.convolution(x, weight, None, *window),
        "input gradient": lambda: backward(0),
        "weight gradient": lambda: backward(1),
    }

    @torch.inference_mode()
    def run(asked: tuple[str, int]) -> None:
        name, calls = asked
        for _ in range(calls):
            passes[name]()
        if device == "cuda":
            torch.cuda.synchronize()

    def result(name: str) -> np.ndarray:
        axes = (2, 3, 1, 0) if name == "weight gradient" else (0, 2, 3, 1)
        with torch.inference_mode():
            return passes[name]().float().cpu().numpy().transpose(axes)

    run.about = {name: result(name) for name in passes}
    return run
