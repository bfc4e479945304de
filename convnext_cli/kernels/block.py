"""A whole ConvNeXt block, and parts of it, as operators of PyTorch with gradients.

```
positions     (x) -> xhat                 7x7 depthwise convolution, LayerNorm without affine part
activate      (h) -> keep gelu(h + bias)  between the two products
activate_grn  (h) -> keep grn(gelu(h + bias))
block         (x) -> x + keep gamma mlp(positions(x))
```

All are `torch.library` operators: under torch.compile they are one node each, with a body for the
CPU that is made of twins. What a block keeps for its backward pass is x, xhat and 1 / std, and
where the hidden units are not recomputed, h: the residual's gradient joins inside the last kernel.

Shapes: x (N, H, W, C); M = N H W rows; otherwise as in `mlp` and `depthwise`.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from convnext_cli.kernels.depthwise import (
    depthwise_input_grad,
    depthwise_norm,
    depthwise_weight_grad,
)
from convnext_cli.kernels.gelu import gelu, gelu_backward
from convnext_cli.kernels.grn import gelu_grn, gelu_grn_backward
from convnext_cli.kernels.mlp import (
    Mlp,
    backward_kept,
    backward_recomputed,
    forward_kept,
    forward_recomputed,
)
from convnext_cli.kernels.norm import normalise_backward

P = ParamSpec("P")
R = TypeVar("R")


def _without_autocast(body: Callable[P, R]) -> Callable[P, R]:
    """The dtypes of an operator's inputs are final; autocast would go on choosing inside it."""

    @functools.wraps(body)
    def run(*inputs: P.args, **named: P.kwargs) -> R:
        first = inputs[0]
        assert isinstance(first, Tensor)
        # Triton launches on the current device, whatever its arguments lie on.
        device = torch.cuda.device_of(first)  # type: ignore[no-untyped-call]
        with device, torch.autocast(first.device.type, enabled=False):
            return body(*inputs, **named)

    return run


@torch.library.custom_op("convnext::positions", mutates_args=())
@_without_autocast
def positions(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(xhat, rstd): (N, H, W, C) normalised, and 1 / std (N, H, W)."""
    return depthwise_norm(x.contiguous(), weight, bias, eps=eps)


@torch.library.custom_op("convnext::positions_backward", mutates_args=())
@_without_autocast
def positions_backward(
    grad: Tensor, x: Tensor, xhat: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from that of xhat."""
    dz = normalise_backward(grad.contiguous(), xhat, rstd)
    dweight, dbias = depthwise_weight_grad(x.contiguous(), dz)
    return depthwise_input_grad(dz, weight), dweight.to(weight.dtype), dbias


@positions.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    del weight, bias, eps
    return torch.empty_like(x, memory_format=torch.contiguous_format), _float(x, *x.shape[:3])


@positions_backward.register_fake
def _(
    grad: Tensor, x: Tensor, xhat: Tensor, rstd: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    del grad, x, rstd
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return torch.empty_like(xhat), dweight, _float(xhat, len(weight))


def _keep_positions(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401  # torch's own
    x, weight, _bias, _eps = inputs
    xhat, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(value=False)  # else a tensor of zeros stands for each that has none
    ctx.save_for_backward(x, xhat, rstd, weight)


def _positions_grads(ctx: Any, grad: Tensor, _rstd: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return (*positions_backward(grad, *ctx.saved_tensors), None)


positions.register_autograd(_positions_grads, setup_context=_keep_positions)


@torch.library.custom_op("convnext::activate", mutates_args=())
@_without_autocast
def activate(h: Tensor, bias: Tensor, keep: Tensor | None) -> Tensor:
    """GELU of h + bias by keep: (N, H, W, K) to the same shape and dtype; bias (K), keep (N)."""
    return gelu(h.contiguous().view(-1, len(bias)), bias, keep).view(h.shape)


@torch.library.custom_op("convnext::activate_backward", mutates_args=())
@_without_autocast
def activate_backward(
    grad: Tensor, h: Tensor, bias: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of h and bias."""
    grad_MK, h_MK = (value.contiguous().view(-1, len(bias)) for value in (grad, h))
    dh_MK, dbias = gelu_backward(grad_MK, h_MK, bias, keep)
    return dh_MK.view(h.shape), dbias


@activate.register_fake
def _(h: Tensor, bias: Tensor, keep: Tensor | None) -> Tensor:
    del bias, keep
    return torch.empty_like(h, memory_format=torch.contiguous_format)


@activate_backward.register_fake
def _(grad: Tensor, h: Tensor, bias: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    del grad, keep
    return torch.empty_like(h, memory_format=torch.contiguous_format), _float(h, len(bias))


def _keep_hidden(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    del output
    ctx.save_for_backward(*inputs)


def _activate_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return (*activate_backward(grad, *ctx.saved_tensors), None)


activate.register_autograd(_activate_grads, setup_context=_keep_hidden)


@torch.library.custom_op("convnext::activate_grn", mutates_args=())
@_without_autocast
def activate_grn(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, squares): GRN of GELU of h + bias by keep, and its sums (N, K) for the backward pass.

    h and out are (N, H, W, K) of one dtype; bias, gamma and beta (K), keep (N).
    """
    h_MK = h.contiguous().view(-1, len(bias))
    out_MK, squares = gelu_grn(h_MK, bias, gamma, beta, keep, images=len(h))
    return out_MK.view(h.shape), squares


@torch.library.custom_op("convnext::activate_grn_backward", mutates_args=())
@_without_autocast
def activate_grn_backward(
    grad: Tensor, h: Tensor, squares: Tensor, bias: Tensor, gamma: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, bias, gamma and beta."""
    grad_MK, h_MK = (value.contiguous().view(-1, len(bias)) for value in (grad, h))
    dh_MK, dbias, dgamma, dbeta = gelu_grn_backward(grad_MK, h_MK, squares, bias, gamma, keep)
    return dh_MK.view(h.shape), dbias, dgamma, dbeta


@activate_grn.register_fake
def _(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    del gamma, beta, keep
    out = torch.empty_like(h, memory_format=torch.contiguous_format)
    return out, _float(h, len(h), len(bias))


@activate_grn_backward.register_fake
def _(
    grad: Tensor, h: Tensor, squares: Tensor, bias: Tensor, gamma: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del grad, squares, gamma, keep
    sums = (_float(h, len(bias)), _float(h, len(bias)), _float(h, len(bias)))
    return torch.empty_like(h, memory_format=torch.contiguous_format), *sums


def _keep_hidden_and_squares(
    ctx: Any,  # noqa: ANN401
    inputs: tuple[Any, ...],
    output: tuple[Tensor, Tensor],
) -> None:
    h, bias, gamma, _beta, keep = inputs
    _out, squares = output
    ctx.mark_non_differentiable(squares)
    ctx.set_materialize_grads(value=False)
    ctx.save_for_backward(h, squares, bias, gamma, keep)


def _activate_grn_grads(ctx: Any, grad: Tensor, _squares: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return (*activate_grn_backward(grad, *ctx.saved_tensors), None)


activate_grn.register_autograd(_activate_grn_grads, setup_context=_keep_hidden_and_squares)


@torch.library.custom_op("convnext::block", mutates_args=())
@_without_autocast
def block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    eps: float,
    recomputed: bool,  # noqa: FBT001  # an operator's schema
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, xhat, rstd, h): the output, and what the backward pass needs.

    h is empty where it is recomputed.
    """
    x = x.contiguous()
    channels = x.shape[-1]
    mlp = Mlp(w1, b1, w2, b2, gamma, keep)
    xhat, rstd = depthwise_norm(x, weight, bias, eps=eps)
    x_MC, xhat_MC = x.view(-1, channels), xhat.view(-1, channels)
    if recomputed:
        out_MC = forward_recomputed(xhat_MC, x_MC, mlp)
        return out_MC.view(x.shape), xhat, rstd, x.new_empty(0)
    out_MC, h_MK = forward_kept(xhat_MC, x_MC, mlp)
    return out_MC.view(x.shape), xhat, rstd, h_MK


@torch.library.custom_op("convnext::block_backward", mutates_args=())
@_without_autocast
def block_backward(
    grad: Tensor,
    x: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    h: Tensor,
    weight: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    recomputed: bool,  # noqa: FBT001  # an operator's schema
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, w1, b1, w2, b2 and gamma; empty: none."""
    grad, x = grad.contiguous(), x.contiguous()
    mlp = Mlp(w1, b1, w2, b2, gamma, keep)
    grad_MC, xhat_MC, rstd_M = grad.view(-1, x.shape[-1]), xhat.view(-1, x.shape[-1]), rstd.view(-1)
    if recomputed:
        grads = backward_recomputed(grad_MC, xhat_MC, rstd_M, mlp)
    else:
        grads = backward_kept(grad_MC, xhat_MC, rstd_M, h, mlp)
    dz = grads.z.view(x.shape)
    dweight, dbias = depthwise_weight_grad(x, dz)
    dx = depthwise_input_grad(dz, weight, add_NHWC=grad)
    dgamma = _float(x, 0) if grads.gamma is None else grads.gamma
    rest = (grads.w1, grads.b1, grads.w2, grads.b2, dgamma)
    return dx, dweight.to(weight.dtype), dbias, *rest


@block.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    eps: float,
    recomputed: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del weight, bias, b1, w2, b2, gamma, keep, eps
    images, height, width, _channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if recomputed else x.new_empty(images * height * width, len(w1))
    return out, torch.empty_like(out), _float(x, images, height, width), h


@block_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    h: Tensor,
    weight: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    recomputed: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    del grad, x, rstd, h, b1, keep, recomputed
    dim, units = w2.shape
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dgamma = _float(xhat, 0 if gamma is None else dim)
    matrices = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in (w1, w2)]
    vectors = [_float(xhat, length) for length in (dim, units, len(b2))]
    return (
        *(torch.empty_like(xhat), dweight, vectors[0], matrices[0], vectors[1], matrices[1]),
        *(vectors[2], dgamma),
    )


def _keep_block(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    x, weight, _bias, *rest, _eps, recomputed = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(value=False)
    ctx.recomputed = recomputed
    ctx.present = [tensor is not None for tensor in rest]
    given = [tensor for tensor in rest if tensor is not None]
    ctx.save_for_backward(x, *output[1:], weight, *given)


def _block_grads(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, xhat, rstd, h, weight, *given = ctx.saved_tensors
    left = iter(given)
    rest = [next(left) if there else None for there in ctx.present]
    *grads, dgamma = block_backward(grad, x, xhat, rstd, h, weight, *rest, ctx.recomputed)
    # keep, eps and recomputed have none
    return (*grads, dgamma if ctx.present[4] else None, None, None, None)


block.register_autograd(_block_grads, setup_context=_keep_block)


def _float(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor of the dtype that sums have."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.empty(shape, dtype=dtype, device=like.device)
