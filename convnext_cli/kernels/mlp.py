"""The network over channels of a block, from the normalised input to the block's output.

```
out = x + keep gamma (act(xhat w1' + b1) w2' + b2)
```

Two ways to the gradients. `kept`: h = xhat w1' + b1 is kept for the backward pass, GELU and its
derivative are computed again while the next product reads it; with few channels one kernel makes
it and the output, and one its gradient and those of the matrices. The products that nothing is
fused into are cuBLAS's. `recomputed`: h never leaves the registers; a third of what `kept` keeps,
and 1.5 times the arithmetic.

Each operator has a twin in plain PyTorch, which defines it and runs where Triton does not.

Shapes: M = images x positions rows, C channels, K = 4 C hidden units, N images; xhat, x, out
(M, C); h (M, K); w1 (K, C) and w2 (C, K) in the dtype of x, as nn.Linear holds them; b1 (K), b2 and
gamma (C), keep (N), float32. The affine part of LayerNorm is in w1 and b1 already.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
from torch import Tensor
from torch.nn import functional

from convnext_cli.kernels.gelu import count_positions, keep_rows
from convnext_cli.kernels.launch import (
    count_programs,
    count_shared_bytes,
    dot_precision,
    power_of_two_in,
    share_tiles,
    uses_triton,
)
from convnext_cli.kernels.norm import normalise_backward
from convnext_cli.kernels.triton_mlp import (
    layer_scale_grad_kernel,
    mlp_forward_kernel,
    mlp_hidden_grad_kernel,
    mlp_input_grad_kernel,
    mlp_kept_grad_kernel,
    mlp_project_kernel,
    mlp_weight_grad_kernel,
)
from convnext_cli.kernels.triton_rows import sum_kept_kernel

Cut = TypeVar("Cut")

_WIDEST_FUSED_GRADS = 128
"""Channels up to which a program has the registers for the gradients of both matrices. Above, the
backward pass computes h again with one product, and goes on as if it had been kept."""


@dataclass(frozen=True)
class ForwardCut:
    """How `forward_kept` and `forward_recomputed` are cut into programs."""

    rows: int
    """Of a program."""
    units: int
    """Hidden units that are at work at a time."""
    warps: int
    stages: int
    tile: int | None = None
    """Channels of a product, or `widest_tile`'s."""


@dataclass(frozen=True)
class GradCut:
    """How `kept_grads` is cut into programs."""

    rows: int
    """Of a step."""
    units: int
    """Hidden units of a program."""
    warps: int
    stages: int
    programs: int = 1
    """For each multiprocessor."""
    both: bool = True
    """Whether both matrices' gradients are summed, or w1's is left to cuBLAS: half the registers,
    and one more pass over the gradient of h, which has another product anyway."""
    shared_bytes: int = 0
    """Without which the next wider cut is taken."""


FORWARD_KEPT: dict[int, ForwardCut] = {
    96: ForwardCut(rows=64, units=32, warps=4, stages=3, tile=32),
}
"""By the most channels each is for. Above, two kernels are faster (H100)."""

KEPT_GRADS: dict[int, GradCut] = {
    128: GradCut(rows=32, units=64, warps=4, stages=3, programs=2),
    192: GradCut(rows=32, units=128, warps=8, stages=3, both=False, shared_bytes=131_328),
    256: GradCut(rows=32, units=64, warps=4, stages=2, programs=2, both=False),
}
"""By the most channels each is for: the fastest of eight to ten on an H100. Above, a program has no
registers for the gradients."""


@dataclass(frozen=True)
class Mlp:
    """What the network over channels is made of."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    gamma: Tensor | None
    """LayerScale."""
    keep: Tensor | None
    """Factor of drop path on each image: 0, or 1 over the share that is kept."""


@dataclass(frozen=True)
class MlpGrads:
    """Gradients, those of weights in the dtype of the weight."""

    z: Tensor
    """Of what LayerNorm normalised."""
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    gamma: Tensor | None


def hidden(xhat_MC: Tensor, mlp: Mlp) -> Tensor:
    """h, before GELU, in the dtype of xhat."""
    return functional.linear(xhat_MC, mlp.w1, mlp.b1.to(xhat_MC.dtype))


def forward_recomputed(xhat_MC: Tensor, x_MC: Tensor, mlp: Mlp) -> Tensor:
    """The block's output; keeps nothing of K units."""
    if not uses_triton(x_MC):
        return project_twin(hidden(xhat_MC, mlp), x_MC, mlp)
    channels = x_MC.shape[1]
    units, tile = _unit_block(channels, most=64), power_of_two_in(channels, most=128)
    cut = ForwardCut(rows=128, units=units, warps=8, stages=2, tile=tile)
    return _run_forward(xhat_MC, x_MC, None, mlp, cut)


def forward_kept(
    xhat_MC: Tensor, x_MC: Tensor, mlp: Mlp, *, cut: ForwardCut | None = None
) -> tuple[Tensor, Tensor]:
    """(output, h) of the block; `cut` is for few channels, in place of FORWARD_KEPT's."""
    if not uses_triton(x_MC):
        return forward_kept_twin(xhat_MC, x_MC, mlp)
    cut = cut or _choose(FORWARD_KEPT, x_MC.shape[1])
    if cut is None:
        h_MK = hidden(xhat_MC, mlp)
        return project(h_MK, x_MC, mlp), h_MK
    h_MK = x_MC.new_empty(len(x_MC), len(mlp.w1))
    return _run_forward(xhat_MC, x_MC, h_MK, mlp, cut), h_MK


def forward_kept_twin(xhat_MC: Tensor, x_MC: Tensor, mlp: Mlp) -> tuple[Tensor, Tensor]:
    """Define `forward_kept`."""
    h_MK = hidden(xhat_MC, mlp)
    return project_twin(h_MK, x_MC, mlp), h_MK


def _run_forward(
    xhat_MC: Tensor, x_MC: Tensor, h_MK: Tensor | None, mlp: Mlp, cut: ForwardCut
) -> Tensor:
    """The output; h is written where there is room for it."""
    rows, channels = x_MC.shape
    constants = _constants(mlp, x_MC, rows=cut.rows, units=cut.units) | {
        "TILE": cut.tile or widest_tile(channels, most=128),
        "num_warps": cut.warps,
        "num_stages": cut.stages,
    }
    out_MC = torch.empty_like(x_MC)
    mlp_forward_kernel[(triton.cdiv(rows, cut.rows),)](
        xhat_MC,
        mlp.w1,
        mlp.b1,
        mlp.w2,
        mlp.b2,
        *_factors(mlp),
        x_MC,
        out_MC,
        out_MC if h_MK is None else h_MK,
        rows,
        count_positions(rows, mlp.keep),
        **constants,
        STORE_H=h_MK is not None,
    )
    return out_MC


def backward_recomputed(grad_MC: Tensor, xhat_MC: Tensor, rstd_M: Tensor, mlp: Mlp) -> MlpGrads:
    """All gradients but that of the residual, from the block's."""
    rows, channels = xhat_MC.shape
    if not uses_triton(xhat_MC) or channels > _WIDEST_FUSED_GRADS:
        h_MK = hidden(xhat_MC, mlp)
        return backward_kept(grad_MC, xhat_MC, rstd_M, h_MK, mlp)
    units = len(mlp.w1)
    dz_MC = torch.empty_like(xhat_MC)
    positions = count_positions(rows, mlp.keep)
    block = 128 if channels < 128 else 64
    mlp_input_grad_kernel[(triton.cdiv(rows, block),)](
        grad_MC,
        xhat_MC,
        rstd_M,
        mlp.w1,
        mlp.b1,
        mlp.w2,
        *_factors(mlp),
        dz_MC,
        rows,
        positions,
        **_constants(mlp, xhat_MC, rows=block, units=_unit_block(channels, most=64)),
    )
    block, unit_block = 32, _unit_block(channels, most=128)
    blocks = units // unit_block
    programs = count_programs(xhat_MC.device) // blocks
    steps, parts = share_tiles(triton.cdiv(rows, block), programs=programs)

    def empty(*shape: int) -> Tensor:
        return torch.empty((parts, *shape), dtype=torch.float32, device=xhat_MC.device)

    dw1, dw2, db1, db2 = (
        empty(units, channels),
        empty(units, channels),
        empty(units),
        empty(channels),
    )
    mlp_weight_grad_kernel[(blocks, parts)](
        grad_MC,
        xhat_MC,
        mlp.w1,
        mlp.b1,
        mlp.w2,
        *_factors(mlp),
        dw1,
        dw2,
        db1,
        db2,
        rows,
        positions,
        steps,
        **_constants(mlp, xhat_MC, rows=block, units=unit_block),
        LIFT=_lift(xhat_MC.dtype),
    )
    product_CK = dw2.sum(dim=0).t().contiguous()
    return _collect(dz_MC, dw1.sum(dim=0), db1.sum(dim=0), product_CK, db2.sum(dim=0), mlp)


def project(h_MK: Tensor, x_MC: Tensor, mlp: Mlp) -> Tensor:
    """The block's output from h and what it began with."""
    if not uses_triton(x_MC):
        return project_twin(h_MK, x_MC, mlp)
    rows, channels = x_MC.shape
    out_MC = torch.empty_like(x_MC)
    block, (tile, pieces) = 64, cut_columns(channels, most=256)
    mlp_project_kernel[(channels // (tile * pieces) * triton.cdiv(rows, block),)](
        h_MK,
        mlp.w2,
        mlp.b2,
        *_factors(mlp),
        x_MC,
        out_MC,
        rows,
        count_positions(rows, mlp.keep),
        CHANNELS=channels,
        HIDDEN=h_MK.shape[1],
        ROWS=block,
        TILE=tile,
        PIECES=pieces,
        UNITS=power_of_two_in(channels, most=64),
        HAS_GAMMA=mlp.gamma is not None,
        HAS_KEEP=mlp.keep is not None,
        PRECISION=dot_precision(x_MC.dtype),
        num_warps=4,
        num_stages=3,
    )
    return out_MC


def project_twin(h_MK: Tensor, x_MC: Tensor, mlp: Mlp) -> Tensor:
    """Define `project`."""
    y_MC = functional.linear(functional.gelu(h_MK), mlp.w2, mlp.b2.to(h_MK.dtype))
    if mlp.gamma is not None:
        y_MC = y_MC * mlp.gamma
    return (x_MC + keep_rows(y_MC, mlp.keep)).to(x_MC.dtype)


def backward_kept(
    grad_MC: Tensor, xhat_MC: Tensor, rstd_M: Tensor, h_MK: Tensor, mlp: Mlp
) -> MlpGrads:
    """All gradients but that of the residual, where h was kept."""
    dh_MK, dw1_KC, product_CK, db1_K = kept_grads(grad_MC, xhat_MC, h_MK, mlp)
    dz_MC = normalise_backward(dh_MK @ mlp.w1, xhat_MC, rstd_M)
    return _collect(dz_MC, dw1_KC, db1_K, product_CK, sum_kept(grad_MC, mlp.keep), mlp)


def kept_grads(
    grad_MC: Tensor, xhat_MC: Tensor, h_MK: Tensor, mlp: Mlp, *, cut: GradCut | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gradient of h, w1's, w2's without gamma, b1's), from the block's.

    Few channels: one kernel, which sums in an order that depends on nothing but the shapes and the
    device. `cut` is in place of KEPT_GRADS' then.
    """
    if not uses_triton(h_MK):
        return kept_grads_twin(grad_MC, xhat_MC, h_MK, mlp)
    rows, channels = grad_MC.shape
    room = count_shared_bytes(h_MK.device)
    fitting = {most: one for most, one in KEPT_GRADS.items() if one.shared_bytes <= room}
    cut = cut or _choose(fitting, channels)
    if cut is None:
        dh_MK, act_MK, db1_K = hidden_grad(grad_MC, h_MK, mlp)
        return dh_MK, dh_MK.t() @ xhat_MC, grad_MC.t() @ act_MK, db1_K
    units = h_MK.shape[1]
    blocks = units // cut.units
    programs = count_programs(h_MK.device, each=cut.programs) // blocks
    steps, parts = share_tiles(triton.cdiv(rows, cut.rows), programs=programs)
    lift = _lift(h_MK.dtype)
    dh_MK = torch.empty_like(h_MK)
    dw2 = torch.empty((parts, units, channels), dtype=torch.float32, device=h_MK.device)
    dw1 = torch.empty_like(dw2) if cut.both else dw2
    db1 = torch.empty((parts, units), dtype=torch.float32, device=h_MK.device)
    mlp_kept_grad_kernel[(blocks, parts)](
        grad_MC,
        xhat_MC,
        h_MK,
        _put_in(mlp.gamma, mlp.w2, lift=lift),
        _factors(mlp)[1],
        dh_MK,
        dw1,
        dw2,
        db1,
        rows,
        count_positions(rows, mlp.keep),
        steps,
        CHANNELS=channels,
        HIDDEN=units,
        ROWS=cut.rows,
        TILE=widest_tile(channels, most=128),
        UNITS=cut.units,
        LIFT=1.0 if mlp.gamma is None else lift,
        HAS_KEEP=mlp.keep is not None,
        PRECISION=dot_precision(h_MK.dtype),
        BOTH=cut.both,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    dw1_KC = dw1.sum(dim=0) if cut.both else dh_MK.t() @ xhat_MC
    return dh_MK, dw1_KC, dw2.sum(dim=0).t().contiguous(), db1.sum(dim=0)


def kept_grads_twin(
    grad_MC: Tensor, xhat_MC: Tensor, h_MK: Tensor, mlp: Mlp
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Define `kept_grads`."""
    dh_MK, act_MK, db1_K = hidden_grad_twin(grad_MC, h_MK, mlp)
    return dh_MK, dh_MK.t() @ xhat_MC, grad_MC.t() @ act_MK, db1_K


def hidden_grad(grad_MC: Tensor, h_MK: Tensor, mlp: Mlp) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of h, keep gelu(h), sum of the first over the rows), from the block's gradient."""
    if not uses_triton(h_MK):
        return hidden_grad_twin(grad_MC, h_MK, mlp)
    rows, channels = grad_MC.shape
    units = h_MK.shape[1]
    block, columns = 64, power_of_two_in(units, most=64)
    lift = _lift(h_MK.dtype)
    w2_CK = _put_in(mlp.gamma, mlp.w2, lift=lift)
    dh_MK, act_MK = torch.empty_like(h_MK), torch.empty_like(h_MK)
    parts = torch.empty((triton.cdiv(rows, block), units), dtype=torch.float32, device=h_MK.device)
    mlp_hidden_grad_kernel[(units // columns * len(parts),)](
        grad_MC,
        h_MK,
        w2_CK,
        _factors(mlp)[1],
        dh_MK,
        act_MK,
        parts,
        rows,
        count_positions(rows, mlp.keep),
        CHANNELS=channels,
        HIDDEN=units,
        ROWS=block,
        TILE=power_of_two_in(channels, most=64),
        UNITS=columns,
        LIFT=1.0 if mlp.gamma is None else lift,
        HAS_KEEP=mlp.keep is not None,
        PRECISION=dot_precision(h_MK.dtype),
        num_warps=4,
        num_stages=3,
    )
    return dh_MK, act_MK, parts.sum(dim=0)


def hidden_grad_twin(grad_MC: Tensor, h_MK: Tensor, mlp: Mlp) -> tuple[Tensor, Tensor, Tensor]:
    """Define `hidden_grad`."""
    dtype = torch.promote_types(h_MK.dtype, torch.float32)
    grad = grad_MC.to(dtype) if mlp.gamma is None else grad_MC * mlp.gamma
    da = (keep_rows(grad, mlp.keep).to(h_MK.dtype) @ mlp.w2).to(dtype)
    dh = torch.ops.aten.gelu_backward(da, h_MK.to(dtype))
    return (
        dh.to(h_MK.dtype),
        keep_rows(functional.gelu(h_MK), mlp.keep).to(h_MK.dtype),
        dh.sum(dim=0),
    )


def _put_in(gamma_C: Tensor | None, w2_CK: Tensor, *, lift: float = 1.0) -> Tensor:
    """w2 with gamma in it, `lift` times as large, in its own dtype; w2 itself without gamma."""
    if gamma_C is None:
        return w2_CK
    factor_C1 = (gamma_C if lift == 1.0 else lift * gamma_C)[:, None]
    return torch.mul(w2_CK, factor_C1, out=torch.empty_like(w2_CK))  # rounded as it is written


def widest_tile(channels: int, *, most: int) -> int:
    """The widest pieces, `most` or less, that leave a narrower power of two of channels, or none.

    The products of one sum wait for each other, so few of them are better.
    """
    tile = most
    while (rest := channels % tile) and (rest & (rest - 1) or rest < 16):
        tile //= 2
    return min(tile, channels)


def cut_columns(channels: int, *, most: int) -> tuple[int, int]:
    """(width of a piece, pieces) of a program of `project`, which has registers for `most` columns.

    Each program computes GELU of all hidden units anew, so the wider it is the fewer do; among
    equals, wide pieces.
    """
    widest = power_of_two_in(channels, most=128)
    tiles = [widest >> shift for shift in range(widest.bit_length()) if widest >> shift >= 16]
    cuts = [
        (tile, pieces)
        for tile in tiles
        for pieces in range(1, most // tile + 1)
        if channels % (tile * pieces) == 0
    ]
    return max(cuts, key=lambda cut: (cut[0] * cut[1], cut[0]))


def _lift(dtype: torch.dtype) -> float:
    """By what gamma w2 is multiplied where it is an operand.

    A young gamma makes it too small for fp16. A power of two, so that it is taken back exactly.
    """
    return 1024.0 if dtype == torch.float16 else 1.0


def _unit_block(channels: int, *, most: int) -> int:
    """Hidden units that are at work at a time; there are four for each channel."""
    return power_of_two_in(4 * channels, most=most)


def _choose(cuts: dict[int, Cut], channels: int) -> Cut | None:
    """The cut of the narrowest bound that holds, or None."""
    return next((cuts[most] for most in sorted(cuts) if channels <= most), None)


def _constants(mlp: Mlp, x_MC: Tensor, *, rows: int, units: int) -> dict[str, object]:
    """What the compiler is told of a program that holds whole rows."""
    channels = x_MC.shape[1]
    return {
        "CHANNELS": channels,
        "HIDDEN": len(mlp.w1),
        "ROWS": rows,
        "TILE": power_of_two_in(channels, most=128),
        "UNITS": units,
        "HAS_GAMMA": mlp.gamma is not None,
        "HAS_KEEP": mlp.keep is not None,
        "PRECISION": dot_precision(x_MC.dtype),
        "num_warps": 8,
        "num_stages": 2,
    }


def _factors(mlp: Mlp) -> tuple[Tensor, Tensor]:
    """Factors of channels and images, or something that is not read."""
    gamma = mlp.b2 if mlp.gamma is None else mlp.gamma
    return gamma, mlp.b2 if mlp.keep is None else mlp.keep


def sum_kept(grad_MC: Tensor, keep_N: Tensor | None) -> Tensor:
    """Sum of keep times the block's gradient over the rows (C): the same to the bit every time."""
    if not uses_triton(grad_MC):
        return sum_kept_twin(grad_MC, keep_N)
    rows, channels = grad_MC.shape
    block, blocks = 64, triton.cdiv(channels, 64)
    programs = count_programs(grad_MC.device, each=4) // blocks
    steps, parts = share_tiles(triton.cdiv(rows, block), programs=programs)
    sums = torch.empty((parts, channels), dtype=torch.float32, device=grad_MC.device)
    sum_kept_kernel[(blocks, parts)](
        grad_MC,
        sums if keep_N is None else keep_N,
        sums,
        rows,
        count_positions(rows, keep_N),
        steps,
        CHANNELS=channels,
        ROWS=block,
        BLOCK=block,
        STAGES=3,
        HAS_KEEP=keep_N is not None,
    )
    return sums.sum(dim=0)


def sum_kept_twin(grad_MC: Tensor, keep_N: Tensor | None) -> Tensor:
    """Define `sum_kept`."""
    dtype = torch.promote_types(grad_MC.dtype, torch.float32)
    return keep_rows(grad_MC.to(dtype), keep_N).sum(dim=0)


def _collect(
    dz_MC: Tensor, dw1: Tensor, db1: Tensor, product_CK: Tensor, total_C: Tensor, mlp: Mlp
) -> MlpGrads:
    """Put gamma into the gradients of w2 and b2, and make its own from them.

    With G the product of the kept gradient and act(h), dw2 = gamma G, and as the branch before
    gamma is y = act(h) w2' + b2, dgamma is the row sums of G w2, and b2 times the kept gradient's
    sum: no pass over activations.
    """
    if mlp.gamma is None:
        return MlpGrads(
            dz_MC, dw1.to(mlp.w1.dtype), db1, product_CK.to(mlp.w2.dtype), total_C, None
        )
    dw2, db2, dgamma = layer_scale_grad(product_CK, total_C, mlp.w2, mlp.b2, mlp.gamma)
    return MlpGrads(dz_MC, dw1.to(mlp.w1.dtype), db1, dw2, db2, dgamma)


def layer_scale_grad(
    product_CK: Tensor, total_C: Tensor, w2_CK: Tensor, b2_C: Tensor, gamma_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w2, in its dtype, b2 and gamma from those of w2 and b2 without gamma."""
    if not uses_triton(product_CK):
        return layer_scale_grad_twin(product_CK, total_C, w2_CK, b2_C, gamma_C)
    channels, units = w2_CK.shape
    dw2_CK, db2_C, dgamma_C = (torch.empty_like(t) for t in (w2_CK, total_C, total_C))
    rows = 4
    layer_scale_grad_kernel[(triton.cdiv(channels, rows),)](
        product_CK,
        total_C,
        w2_CK,
        b2_C,
        gamma_C,
        dw2_CK,
        db2_C,
        dgamma_C,
        CHANNELS=channels,
        HIDDEN=units,
        ROWS=rows,
        UNITS=power_of_two_in(units, most=256),
    )
    return dw2_CK, db2_C, dgamma_C


def layer_scale_grad_twin(
    product_CK: Tensor, total_C: Tensor, w2_CK: Tensor, b2_C: Tensor, gamma_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Define `layer_scale_grad`."""
    dgamma_C = (product_CK.to(total_C.dtype) * w2_CK).sum(dim=1) + total_C * b2_C
    return (gamma_C[:, None] * product_CK).to(w2_CK.dtype), gamma_C * total_C, dgamma_C
