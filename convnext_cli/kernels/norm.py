"""LayerNorm over the channels without its affine part, which the matrix product after it takes in.

Statistics are float32; `rstd` is 1 / std. Shapes: (..., C) and (...).
"""

import torch
import triton
from torch import Tensor

from convnext_cli.kernels.launch import uses_triton
from convnext_cli.kernels.triton_rows import normalise_backward_kernel, normalise_kernel

_TILE_VALUES = 2048
"""Values of a program: 16 of each of 128 threads."""


def normalise(x: Tensor, *, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(xhat, rstd) of the rows of x; `out` may be x itself."""
    if not uses_triton(x):
        return normalise_twin(x, eps=eps)
    out = torch.empty_like(x) if out is None else out
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    channels = x.shape[-1]
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE_VALUES // block)
    normalise_kernel[(triton.cdiv(rstd.numel(), rows),)](
        x, out, rstd, rstd.numel(), eps, CHANNELS=channels, ROWS=rows, BLOCK=block
    )
    return out, rstd


def normalise_twin(x: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Define `normalise`."""
    x_float = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(x_float, dim=-1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    return ((x_float - mean) * rstd).to(x.dtype), rstd.squeeze(-1)


def normalise_backward(grad: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of what was normalised, from that of xhat."""
    if not uses_triton(xhat):
        return normalise_backward_twin(grad, xhat, rstd)
    out = torch.empty_like(xhat)
    channels = xhat.shape[-1]
    block = triton.next_power_of_2(channels)
    rows = max(1, _TILE_VALUES // block)
    normalise_backward_kernel[(triton.cdiv(rstd.numel(), rows),)](
        grad, xhat, rstd, out, rstd.numel(), CHANNELS=channels, ROWS=rows, BLOCK=block
    )
    return out


def normalise_backward_twin(grad: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    """Define `normalise_backward`."""
    dtype = torch.promote_types(xhat.dtype, torch.float32)
    grad_float, xhat_float = grad.to(dtype), xhat.to(dtype)
    mean = grad_float.mean(dim=-1, keepdim=True)
    along = (grad_float * xhat_float).mean(dim=-1, keepdim=True)
    return (rstd[..., None] * (grad_float - mean - xhat_float * along)).to(xhat.dtype)
