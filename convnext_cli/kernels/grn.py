"""GELU and GRN between the two matrix products of a V2 block, with the bias of the first.

```
a = gelu(h + bias)
out = keep (a scale + beta)
```

The scale of each image and unit is known once the squares of a are summed over the positions: one
pass over h sums, another one applies. Backward, the first pass sums what scale and beta need, the
second one writes the gradient of h and sums that of the bias on its way.

Shapes: h (M, K), M = images x positions rows, K hidden units; bias, gamma and beta (K), keep
(images), scale and squares (images, K), float32.

Source: ConvNeXt V2 section 3.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional

from convnext_cli.kernels.gelu import keep_rows
from convnext_cli.kernels.launch import count_programs, share_tiles, uses_triton
from convnext_cli.kernels.triton_rows import (
    gelu_grn_backward_kernel,
    gelu_grn_kernel,
    gelu_grn_sums_kernel,
    grn_scale_kernel,
    grn_slope_kernel,
)

EPS = 1e-6
"""Source: facebookresearch/ConvNeXt-V2@2553895 models/utils.py `GRN`."""
_ROWS, _BLOCK, _UNITS = 16, 128, 1024
_SUM_ROWS, _SUM_BLOCK, _STAGES = 32, 64, 3
_PROGRAMS = 16
"""Of a sum over the positions, for each multiprocessor: more than it holds at once, so that the
last ones leave little of the device without work."""


def gelu_grn(
    h_MK: Tensor,
    bias_K: Tensor,
    gamma_K: Tensor,
    beta_K: Tensor,
    keep_N: Tensor | None,
    *,
    images: int,
) -> tuple[Tensor, Tensor]:
    """(out, in the dtype of h; squares, which the backward pass needs)."""
    if not uses_triton(h_MK):
        return gelu_grn_twin(h_MK, bias_K, gamma_K, beta_K, keep_N, images=images)
    units, positions = len(bias_K), len(h_MK) // images
    (squares,) = _sum_over_positions(h_MK, None, bias_K, images=images)
    scale = torch.empty_like(squares)
    grn_scale_kernel[(images,)](squares, gamma_K, scale, EPS, HIDDEN=units, BLOCK=_UNITS)
    out_MK = torch.empty_like(h_MK)
    programs = triton.cdiv(units, _BLOCK) * triton.cdiv(positions, _ROWS) * images
    gelu_grn_kernel[(programs,)](
        h_MK,
        bias_K,
        scale,
        beta_K,
        bias_K if keep_N is None else keep_N,
        out_MK,
        positions,
        HIDDEN=units,
        ROWS=_ROWS,
        BLOCK=_BLOCK,
        HAS_KEEP=keep_N is not None,
    )
    return out_MK, squares


def gelu_grn_twin(
    h_MK: Tensor,
    bias_K: Tensor,
    gamma_K: Tensor,
    beta_K: Tensor,
    keep_N: Tensor | None,
    *,
    images: int,
) -> tuple[Tensor, Tensor]:
    """Define `gelu_grn`."""
    a = functional.gelu(h_MK + bias_K)
    squares = a.square().view(images, -1, len(bias_K)).sum(dim=1)
    scale_MK = (1 + gamma_K * _share(squares)).repeat_interleave(len(a) // images, dim=0)
    return keep_rows(torch.addcmul(beta_K, a, scale_MK), keep_N).to(h_MK.dtype), squares


def gelu_grn_backward(
    grad_MK: Tensor,
    h_MK: Tensor,
    squares: Tensor,
    bias_K: Tensor,
    gamma_K: Tensor,
    keep_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, in its dtype, bias, gamma and beta: the same to the bit every time."""
    if not uses_triton(h_MK):
        return gelu_grn_backward_twin(grad_MK, h_MK, squares, bias_K, gamma_K, keep_N)
    images, units = squares.shape
    keep = bias_K if keep_N is None else keep_N
    products, totals = _sum_over_positions(h_MK, grad_MK, bias_K, images=images)
    scale, slope = torch.empty_like(squares), torch.empty_like(squares)
    grn_slope_kernel[(images,)](
        squares,
        products,
        totals,
        gamma_K,
        keep,
        scale,
        slope,
        EPS,
        HIDDEN=units,
        BLOCK=_UNITS,
        HAS_KEEP=keep_N is not None,
    )
    dgamma_K, dbeta_K = products.sum(dim=0), totals.sum(dim=0)  # what the kernel made of them
    steps, parts = _cut_positions(h_MK, images)
    dh_MK = torch.empty_like(h_MK)
    part = torch.empty((images * parts, units), dtype=torch.float32, device=h_MK.device)
    gelu_grn_backward_kernel[(triton.cdiv(units, _SUM_BLOCK) * parts * images,)](
        grad_MK,
        h_MK,
        bias_K,
        scale,
        slope,
        dh_MK,
        part,
        len(h_MK) // images,
        steps,
        parts,
        HIDDEN=units,
        ROWS=_SUM_ROWS,
        BLOCK=_SUM_BLOCK,
        STAGES=_STAGES,
    )
    return dh_MK, part.sum(dim=0), dgamma_K, dbeta_K


def gelu_grn_backward_twin(
    grad_MK: Tensor,
    h_MK: Tensor,
    squares: Tensor,
    bias_K: Tensor,
    gamma_K: Tensor,
    keep_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Define `gelu_grn_backward`."""
    images, units = squares.shape
    h = h_MK + bias_K
    a = functional.gelu(h)
    grad = keep_rows(grad_MK.to(a.dtype), keep_N)
    products, totals = (value.view(images, -1, units).sum(dim=1) for value in (grad * a, grad))
    energy, share = squares.sqrt(), _share(squares)
    d_share = gamma_K * products
    d_energy = d_share - (d_share * share).mean(dim=1, keepdim=True)
    d_energy = d_energy / (energy.mean(dim=1, keepdim=True) + EPS)
    slope = torch.where(energy > 0, d_energy / energy, 0.0)
    scale_MK, slope_MK = (
        value.repeat_interleave(len(h) // images, dim=0) for value in (1 + gamma_K * share, slope)
    )
    dh = torch.ops.aten.gelu_backward(grad * scale_MK + a * slope_MK, h)
    dgamma_K, dbeta_K = (share * products).sum(dim=0), totals.sum(dim=0)
    return dh.to(h_MK.dtype), dh.sum(dim=0), dgamma_K, dbeta_K


def _share(squares: Tensor) -> Tensor:
    energy = squares.sqrt()
    return energy / (energy.mean(dim=1, keepdim=True) + EPS)


def _cut_positions(h_MK: Tensor, images: int) -> tuple[int, int]:
    """(steps, parts): blocks of rows of a program, and programs along an image's positions."""
    tiles = triton.cdiv(len(h_MK) // images, _SUM_ROWS)
    others = triton.cdiv(h_MK.shape[1], _SUM_BLOCK) * images
    programs = triton.cdiv(count_programs(h_MK.device, each=_PROGRAMS), others)
    return share_tiles(tiles, programs=programs)


def _sum_over_positions(
    h_MK: Tensor, grad_MK: Tensor | None, bias_K: Tensor, *, images: int
) -> Tensor:
    """(1, images, K): a squared. With a gradient (2, images, K): grad times a, and grad."""
    units = len(bias_K)
    steps, parts = _cut_positions(h_MK, images)
    shape = (1 if grad_MK is None else 2, parts, images, units)
    sums = torch.empty(shape, dtype=torch.float32, device=h_MK.device)
    gelu_grn_sums_kernel[(triton.cdiv(units, _SUM_BLOCK) * parts * images,)](
        h_MK if grad_MK is None else grad_MK,
        h_MK,
        bias_K,
        sums[0],
        sums[-1],
        images,
        len(h_MK) // images,
        steps,
        parts,
        HIDDEN=units,
        ROWS=_SUM_ROWS,
        BLOCK=_SUM_BLOCK,
        STAGES=_STAGES,
        BACKWARD=grad_MK is not None,
    )
    return sums[:, 0] if parts == 1 else sums.sum(dim=1)
