"""GELU between two matrix products, with the bias of the first and drop path's factor.

```
out = keep gelu(h + bias)
```

Its backward pass sums the bias's gradient on its way, where the compiler would read everything and
compute the derivative a second time.

Shapes: h (M, K), M = images x positions rows, K hidden units; bias (K) and keep (images), float32.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional

from convnext_cli.kernels.launch import count_programs, share_tiles, uses_triton
from convnext_cli.kernels.triton_rows import gelu_backward_kernel, gelu_kernel

_ROWS, _BLOCK = 16, 128
_SUM_ROWS, _SUM_BLOCK = 32, 64
_PROGRAMS = 8
"""Of a sum over rows, for each multiprocessor: a small program keeps few registers."""


def gelu(h_MK: Tensor, bias_K: Tensor, keep_N: Tensor | None) -> Tensor:
    """GELU of h plus bias, times keep; in the dtype of h."""
    if not uses_triton(h_MK):
        return gelu_twin(h_MK, bias_K, keep_N)
    out_MK = torch.empty_like(h_MK)
    rows, units = h_MK.shape
    gelu_kernel[(triton.cdiv(units, _BLOCK) * triton.cdiv(rows, _ROWS),)](
        h_MK,
        bias_K,
        bias_K if keep_N is None else keep_N,
        out_MK,
        rows,
        count_positions(rows, keep_N),
        HIDDEN=units,
        ROWS=_ROWS,
        BLOCK=_BLOCK,
        HAS_KEEP=keep_N is not None,
    )
    return out_MK


def gelu_twin(h_MK: Tensor, bias_K: Tensor, keep_N: Tensor | None) -> Tensor:
    """Define `gelu`."""
    return keep_rows(functional.gelu(h_MK + bias_K), keep_N).to(h_MK.dtype)


def gelu_backward(
    grad_MK: Tensor, h_MK: Tensor, bias_K: Tensor, keep_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of h, in its dtype, and of the bias: the same to the bit every time."""
    if not uses_triton(h_MK):
        return gelu_backward_twin(grad_MK, h_MK, bias_K, keep_N)
    rows, units = h_MK.shape
    blocks = triton.cdiv(units, _SUM_BLOCK)
    programs = count_programs(h_MK.device, each=_PROGRAMS) // blocks
    steps, parts = share_tiles(triton.cdiv(rows, _SUM_ROWS), programs=programs)
    out_MK = torch.empty_like(h_MK)
    part = torch.empty((parts, units), dtype=torch.float32, device=h_MK.device)
    gelu_backward_kernel[(blocks, parts)](
        grad_MK,
        h_MK,
        bias_K,
        bias_K if keep_N is None else keep_N,
        out_MK,
        part,
        rows,
        count_positions(rows, keep_N),
        steps,
        HIDDEN=units,
        ROWS=_SUM_ROWS,
        BLOCK=_SUM_BLOCK,
        HAS_KEEP=keep_N is not None,
    )
    return out_MK, part.sum(dim=0)


def gelu_backward_twin(
    grad_MK: Tensor, h_MK: Tensor, bias_K: Tensor, keep_N: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Define `gelu_backward`."""
    h = h_MK + bias_K
    dh = torch.ops.aten.gelu_backward(keep_rows(grad_MK.to(h.dtype), keep_N), h)
    return dh.to(h_MK.dtype), dh.sum(dim=0)


def count_positions(rows: int, keep_N: Tensor | None) -> int:
    """Rows of an image; without factors, all are taken for one."""
    return rows if keep_N is None else rows // len(keep_N)


def keep_rows(y_MK: Tensor, keep_N: Tensor | None) -> Tensor:
    """Each row by its image's factor."""
    if keep_N is None:
        return y_MK
    return y_MK * keep_N.repeat_interleave(count_positions(len(y_MK), keep_N))[:, None]
