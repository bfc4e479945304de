"""The 7x7 depthwise convolution over NHWC, alone or with LayerNorm after it, and its gradients.

Each operator has a twin in plain PyTorch, which defines it and runs where Triton does not. Sums are
float32 whatever the inputs are; the gradient of the weights is the same to the bit every time.

Shapes: N images, H x W positions, C channels; weights (C, 1, 7, 7), biases (C). `rstd`, 1 / std of
each position, is (N, H, W).
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from convnext_cli.kernels.launch import count_programs, power_of_two_in, uses_triton
from convnext_cli.kernels.norm import normalise, normalise_twin
from convnext_cli.kernels.triton_depthwise import (
    depthwise_input_grad_kernel,
    depthwise_kernel,
    depthwise_weight_grad_kernel,
)

_THREAD_CHANNELS = 2
"""Channels of a thread: one 32-bit load in bfloat16, and 98 weights in registers."""
_WARPS = 4
_AHEAD = 1
"""Columns that are read before their turn: each takes seven registers of a thread."""
_FUSED_NORM_CHANNELS = 256
"""Up to here one program holds all channels of a line, and normalises before it writes."""


def depthwise(x_NHWC: Tensor, weight: Tensor, bias_C: Tensor) -> Tensor:
    """The convolution with padding 3: (N, H, W, C) to the same shape and dtype."""
    if not uses_triton(x_NHWC):
        return depthwise_twin(x_NHWC, weight, bias_C)
    out_NHWC, _rstd = _launch(x_NHWC, weight, bias_C, eps=None)
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

    One kernel where a program can hold all channels and none is padding; else the second one
    normalises in place.
    """
    if not uses_triton(x_NHWC):
        return depthwise_norm_twin(x_NHWC, weight, bias_C, eps=eps)
    channels = x_NHWC.shape[-1]
    if channels <= _FUSED_NORM_CHANNELS and power_of_two_in(channels, most=channels) == channels:
        return _launch(x_NHWC, weight, bias_C, eps=eps)
    out_NHWC, _rstd = _launch(x_NHWC, weight, bias_C, eps=None)
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
    images, height, width, channels = grad_NHWC.shape
    rows, block = _tile(channels)
    out_NHWC = torch.empty_like(grad_NHWC)
    lines = images * height
    depthwise_input_grad_kernel[(triton.cdiv(channels, block), triton.cdiv(lines, rows))](
        grad_NHWC,
        _taps(weight),
        grad_NHWC if add_NHWC is None else add_NHWC,
        out_NHWC,
        lines,
        HEIGHT=height,
        WIDTH=width,
        CHANNELS=channels,
        ROWS=rows,
        BLOCK=block,
        UNROLL=_unroll(width),
        AHEAD=_AHEAD,
        HAS_ADD=add_NHWC is not None,
        num_warps=_WARPS,
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
    images, height, width, channels = x_NHWC.shape
    rows, block = _tile(channels)
    blocks = triton.cdiv(channels, block)
    lines = images * height
    wanted = max(1, count_programs(x_NHWC.device) // blocks)
    steps = triton.cdiv(triton.cdiv(lines, rows), wanted)
    parts = triton.cdiv(triton.cdiv(lines, rows), steps)
    part = torch.empty((parts, 50, channels), dtype=torch.float32, device=x_NHWC.device)
    depthwise_weight_grad_kernel[(blocks, parts)](
        x_NHWC,
        grad_NHWC,
        part,
        lines,
        steps,
        HEIGHT=height,
        WIDTH=width,
        CHANNELS=channels,
        ROWS=rows,
        BLOCK=block,
        UNROLL=_unroll(width),
        AHEAD=_AHEAD,
        num_warps=_WARPS,
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


def _launch(
    x_NHWC: Tensor, weight: Tensor, bias_C: Tensor, *, eps: float | None
) -> tuple[Tensor, Tensor]:
    images, height, width, channels = x_NHWC.shape
    rows, block = _tile(channels)
    if eps is not None:
        rows, block = max(1, _THREAD_CHANNELS * 32 * _WARPS // channels), channels
    out_NHWC = torch.empty_like(x_NHWC)
    rstd_NHW = torch.empty((images, height, width), dtype=torch.float32, device=x_NHWC.device)
    lines = images * height
    depthwise_kernel[(triton.cdiv(channels, block), triton.cdiv(lines, rows))](
        x_NHWC,
        _taps(weight),
        bias_C.float(),
        out_NHWC,
        rstd_NHW,
        lines,
        0.0 if eps is None else eps,
        HEIGHT=height,
        WIDTH=width,
        CHANNELS=channels,
        ROWS=rows,
        BLOCK=block,
        UNROLL=_unroll(width),
        AHEAD=_AHEAD,
        NORMALISED=eps is not None,
        num_warps=_WARPS,
    )
    return out_NHWC, rstd_NHW


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, 7, 7) to (49, C) in float32, so that the threads of a warp read neighbours."""
    return weight.reshape(len(weight), 49).t().float().contiguous()


def _tile(channels: int) -> tuple[int, int]:
    """Lines and channels of a program."""
    block = 64 if channels % 64 == 0 else 32
    return _THREAD_CHANNELS * 32 * _WARPS // block, block


def _unroll(width: int) -> int:
    """Columns that are written out in the loop: the most, up to 8, that divide the width."""
    return next(columns for columns in range(8, 0, -1) if width % columns == 0)
