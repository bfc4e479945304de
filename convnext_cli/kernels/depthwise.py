"""The 7x7 depthwise convolution over NHWC, alone or with LayerNorm after it, and its gradients.

Each operator has a twin in plain PyTorch, which defines it and runs where Triton does not. Sums are
float32 whatever the inputs are; the gradient of the weights is the same to the bit every time.

Shapes: N images, H x W positions, C channels; weights (C, 1, 7, 7), biases (C). `rstd`, 1 / std of
each position, is (N, H, W).
"""

import math

import torch
import triton
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from convnext_cli.kernels.launch import count_programs, share_tiles, uses_triton
from convnext_cli.kernels.norm import normalise, normalise_twin
from convnext_cli.kernels.triton_depthwise import (
    depthwise_input_grad_kernel,
    depthwise_kernel,
    depthwise_weight_grad_kernel,
)

_WARPS = 4
_MOST_LINES = 7
"""Lines of a thread: it has registers for seven sums of each, beside the 49 weights."""
_SUMMING_PROGRAMS = 3
"""For each multiprocessor: what the registers of the weight's gradient leave room for."""


def depthwise(x_NHWC: Tensor, weight: Tensor, bias_C: Tensor) -> Tensor:
    """The convolution with padding 3: (N, H, W, C) to the same shape and dtype."""
    if not uses_triton(x_NHWC):
        return depthwise_twin(x_NHWC, weight, bias_C)
    out_NHWC = torch.empty_like(x_NHWC)
    grid, groups, constants = _cut(x_NHWC)
    depthwise_kernel[grid](x_NHWC, _taps(weight), bias_C.float(), out_NHWC, groups, **constants)
    return out_NHWC


def depthwise_twin(x_NHWC: Tensor, weight: Tensor, bias_C: Tensor) -> Tensor:
    """Define `depthwise`; the weights are rounded to the dtype of x, as autocast does."""
    dtype = x_NHWC.dtype
    out_NCHW = functional.conv2d(
        x_NHWC.permute(0, 3, 1, 2),
        weight.to(dtype),
        bias_C.to(dtype),
        padding=3,
        groups=len(weight),
    )
    return out_NCHW.permute(0, 2, 3, 1).contiguous()


def depthwise_norm(
    x_NHWC: Tensor, weight: Tensor, bias_C: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """The convolution, then LayerNorm over the channels without its affine part: (xhat, rstd).

    Two kernels, the second in place: with statistics over the threads of a program for each column,
    one took twice as long (H100, 128 channels: 0.47 ms, where the two take 0.22).
    """
    if not uses_triton(x_NHWC):
        return depthwise_norm_twin(x_NHWC, weight, bias_C, eps=eps)
    out_NHWC = depthwise(x_NHWC, weight, bias_C)
    return normalise(out_NHWC, eps=eps, out=out_NHWC)


def depthwise_norm_twin(
    x_NHWC: Tensor, weight: Tensor, bias_C: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Define `depthwise_norm`."""
    return normalise_twin(depthwise_twin(x_NHWC, weight, bias_C), eps=eps)


def depthwise_input_grad(
    grad_NHWC: Tensor, weight: Tensor, *, add_NHWC: Tensor | None = None
) -> Tensor:
    """Gradient of the input; plus `add_NHWC`, such as the gradient that goes past the block."""
    if not uses_triton(grad_NHWC):
        return depthwise_input_grad_twin(grad_NHWC, weight, add_NHWC=add_NHWC)
    out_NHWC = torch.empty_like(grad_NHWC)
    grid, groups, constants = _cut(grad_NHWC)
    depthwise_input_grad_kernel[grid](
        grad_NHWC,
        _taps(weight),
        grad_NHWC if add_NHWC is None else add_NHWC,
        out_NHWC,
        groups,
        HAS_ADD=add_NHWC is not None,
        **constants,
    )
    return out_NHWC


def depthwise_input_grad_twin(
    grad_NHWC: Tensor, weight: Tensor, *, add_NHWC: Tensor | None = None
) -> Tensor:
    """Define `depthwise_input_grad`: the convolution with the kernel turned round."""
    grad_NCHW = grad_NHWC.permute(0, 3, 1, 2)
    turned = weight.flip(2, 3).to(grad_NHWC.dtype)
    out_NCHW = functional.conv2d(grad_NCHW, turned, padding=3, groups=len(weight))
    out_NHWC = out_NCHW.permute(0, 2, 3, 1).contiguous()
    return out_NHWC if add_NHWC is None else out_NHWC + add_NHWC


def depthwise_weight_grad(x_NHWC: Tensor, grad_NHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight (C, 1, 7, 7) and bias (C), float32 and the same to the bit every time."""
    if not uses_triton(x_NHWC):
        return depthwise_weight_grad_twin(x_NHWC, grad_NHWC)
    channels = x_NHWC.shape[-1]
    (blocks, tiles), groups, constants = _cut(x_NHWC)
    programs = count_programs(x_NHWC.device, each=_SUMMING_PROGRAMS) // blocks
    steps, parts = share_tiles(tiles, programs=programs)
    part = torch.empty((parts, 50, channels), dtype=torch.float32, device=x_NHWC.device)
    depthwise_weight_grad_kernel[(blocks, parts)](
        x_NHWC, grad_NHWC, part, groups, steps, **constants
    )
    sums = part.sum(dim=0)
    return sums[:49].t().contiguous().view(channels, 1, 7, 7), sums[49]


def depthwise_weight_grad_twin(x_NHWC: Tensor, grad_NHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Define `depthwise_weight_grad`."""
    dtype = torch.promote_types(x_NHWC.dtype, torch.float32)
    x_NCHW, grad_NCHW = (t.permute(0, 3, 1, 2).to(dtype) for t in (x_NHWC, grad_NHWC))
    channels = x_NCHW.shape[1]
    weight: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
        x_NCHW, [channels, 1, 7, 7], grad_NCHW, padding=3, groups=channels
    )
    return weight, grad_NCHW.sum(dim=(0, 2, 3))


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, 7, 7) to (49, C) in float32, so that the threads of a warp read neighbours."""
    return weight.reshape(len(weight), 49).t().float().contiguous()


def _cut(x_NHWC: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """(blocks of channels and tiles of groups, groups of lines, what the compiler is told)."""
    images, height, width, channels = x_NHWC.shape
    lines = _lines(height)
    groups = images * triton.cdiv(height, lines)
    block = 64 if channels % 64 == 0 else 32
    rows = 32 * _WARPS // block  # each thread has a channel of a group
    constants = {
        "HEIGHT": height,
        "WIDTH": width,
        "CHANNELS": channels,
        "LINES": lines,
        "ROWS": rows,
        "BLOCK": block,
        # Columns that are written out in the loop: more take minutes to compile and gain little.
        "UNROLL": 2 if width % 2 == 0 else 1,
        "num_warps": _WARPS,
    }
    return (triton.cdiv(channels, block), triton.cdiv(groups, rows)), groups, constants


def _lines(height: int) -> int:
    """Lines of a thread: what takes the fewest instructions an image, halos and leftovers too."""

    def cost(lines: int) -> int:
        return math.ceil(height / lines) * (49 * lines + 3 * (lines + 6))

    return min(range(1, min(_MOST_LINES, height) + 1), key=cost)
