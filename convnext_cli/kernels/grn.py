"""GELU followed by GRN over the hidden units of a V2 block, in two passes and without a copy.

GRN's output is `a scale + shift` with a = gelu(h), where scale, of each image and unit, is known
once the squares of a are summed over the positions. The product after it applies both on its way.

Shapes: h (rows, K), rows = images x positions, K hidden units; gamma and beta (K); scale, shift,
slope and the sums (images, K), float32.

Source: ConvNeXt V2 section 3.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional

from convnext_cli.kernels.launch import uses_triton
from convnext_cli.kernels.triton_rows import gelu_grn_backward_kernel, gelu_grn_sums_kernel

EPS = 1e-6
"""Source: facebookresearch/ConvNeXt-V2@2553895 models/utils.py `GRN`."""
_ROWS, _BLOCK = 16, 128


def sum_squares(h_MK: Tensor, *, images: int) -> Tensor:
    """Sum of gelu(h) squared over the positions of each image."""
    if not uses_triton(h_MK):
        return sum_squares_twin(h_MK, images=images)
    sums = _empty_sums(h_MK, images)
    _launch_sums(h_MK, None, sums, sums, images=images)
    return sums


def sum_squares_twin(h_MK: Tensor, *, images: int) -> Tensor:
    """Define `sum_squares`."""
    return _gelu(h_MK).square().view(images, -1, h_MK.shape[1]).sum(dim=1)


def sum_products(h_MK: Tensor, grad_MK: Tensor, *, images: int) -> tuple[Tensor, Tensor]:
    """Sums of grad times gelu(h), and of grad, over the positions of each image."""
    if not uses_triton(h_MK):
        return sum_products_twin(h_MK, grad_MK, images=images)
    products, totals = _empty_sums(h_MK, images), _empty_sums(h_MK, images)
    _launch_sums(h_MK, grad_MK, products, totals, images=images)
    return products, totals


def sum_products_twin(h_MK: Tensor, grad_MK: Tensor, *, images: int) -> tuple[Tensor, Tensor]:
    """Define `sum_products`."""
    shape = (images, -1, h_MK.shape[1])
    a_MK = _gelu(h_MK)
    grad = grad_MK.to(a_MK.dtype)
    return (grad * a_MK).view(shape).sum(dim=1), grad.view(shape).sum(dim=1)


def make_scale(squares: Tensor, gamma_K: Tensor) -> Tensor:
    """Scale of each image and unit: 1 + gamma times the unit's share of the image's energy."""
    energy = squares.sqrt()
    return 1 + gamma_K * energy / (energy.mean(dim=1, keepdim=True) + EPS)


def make_slope(squares: Tensor, gamma_K: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """(slope, gradient of gamma): what a's gradient has besides grad times scale, divided by a."""
    energy = squares.sqrt()
    mean = energy.mean(dim=1, keepdim=True) + EPS
    share = energy / mean
    d_share = gamma_K * products
    d_energy = (d_share - (d_share * share).mean(dim=1, keepdim=True)) / mean
    slope = torch.where(energy > 0, d_energy / energy, 0.0)
    return slope, (share * products).sum(dim=0)


def gelu_grn_backward(
    h_MK: Tensor, grad_MK: Tensor, *, scale: Tensor, shift: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of h, a scale + shift), in the dtype of h.

    Drop path's factor of an image may be in scale and shift: both results have it then.
    """
    if not uses_triton(h_MK):
        return gelu_grn_backward_twin(h_MK, grad_MK, scale=scale, shift=shift, slope=slope)
    images, units = scale.shape
    positions = len(h_MK) // images
    dh_MK, out_MK = torch.empty_like(h_MK), torch.empty_like(h_MK)
    grid = (images, triton.cdiv(units, _BLOCK), triton.cdiv(positions, _ROWS))
    gelu_grn_backward_kernel[grid](
        h_MK,
        grad_MK,
        scale,
        shift,
        slope,
        dh_MK,
        out_MK,
        positions,
        HIDDEN=units,
        ROWS=_ROWS,
        BLOCK=_BLOCK,
    )
    return dh_MK, out_MK


def gelu_grn_backward_twin(
    h_MK: Tensor, grad_MK: Tensor, *, scale: Tensor, shift: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Define `gelu_grn_backward`."""
    images = len(scale)
    a = _gelu(h_MK)
    grad = grad_MK.to(a.dtype)
    scale_MK, shift_MK, slope_MK = (
        value.repeat_interleave(len(h_MK) // images, dim=0) for value in (scale, shift, slope)
    )
    dh = torch.ops.aten.gelu_backward(grad * scale_MK + a * slope_MK, h_MK.to(a.dtype))
    return dh.to(h_MK.dtype), (a * scale_MK + shift_MK).to(h_MK.dtype)


def _gelu(h_MK: Tensor) -> Tensor:
    return functional.gelu(h_MK.to(torch.promote_types(h_MK.dtype, torch.float32)))


def _empty_sums(h_MK: Tensor, images: int) -> Tensor:
    return torch.empty((images, h_MK.shape[1]), dtype=torch.float32, device=h_MK.device)


def _launch_sums(
    h_MK: Tensor, grad_MK: Tensor | None, first: Tensor, second: Tensor, *, images: int
) -> None:
    units = h_MK.shape[1]
    gelu_grn_sums_kernel[(images, triton.cdiv(units, _BLOCK))](
        h_MK,
        h_MK if grad_MK is None else grad_MK,
        first,
        second,
        len(h_MK) // images,
        HIDDEN=units,
        ROWS=_ROWS,
        BLOCK=_BLOCK,
        BACKWARD=grad_MK is not None,
    )
