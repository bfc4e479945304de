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
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from convnext_cli.kernels.depthwise import (
    depthwise_input_grad,
    depthwise_norm,
    depthwise_weight_grad,
)
from convnext_cli.kernels.gelu import gelu, gelu_backward
from convnext_cli.kernels.grn import apply_scale, gelu_grn_backward, make_scale
from convnext_cli.kernels.mlp import (
    Mlp,
    MlpGrads,
    backward_kept,
    backward_recomputed,
    finish_backward,
    forward_kept,
    forward_recomputed,
    project,
    put_in,
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
    scale, squares = make_scale(h_MK, bias, gamma, images=len(h))
    return apply_scale(h_MK, bias, scale, beta, keep).view(h.shape), squares


@torch.library.custom_op("convnext::activate_grn_backward", mutates_args=())
@_without_autocast
def activate_grn_backward(
    grad: Tensor, h: Tensor, squares: Tensor, bias: Tensor, gamma: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of h, bias, gamma and beta."""
    grad_MK, h_MK = (value.contiguous().view(-1, len(bias)) for value in (grad, h))
    grads = gelu_grn_backward(grad_MK, h_MK, squares, bias, gamma, None, keep)
    return grads.h.view(h.shape), grads.bias, grads.gamma, grads.beta


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
    grn_gamma: Tensor | None,
    grn_beta: Tensor | None,
    keep: Tensor | None,
    eps: float,
    recomputed: bool,  # noqa: FBT001  # an operator's schema
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, xhat, rstd, h, squares): the output, and what the backward pass needs.

    h is empty where it is recomputed, and squares, GRN's sums (N, K), where there is no GRN; with
    GRN, b1 is not in h, as all that reads h adds it.
    """
    x = x.contiguous()
    channels = x.shape[-1]
    mlp = Mlp(w1, b1, w2, b2, gamma, keep)
    xhat, rstd = depthwise_norm(x, weight, bias, eps=eps)
    x_MC, xhat_MC = x.view(-1, channels), xhat.view(-1, channels)
    if recomputed:
        out_MC = forward_recomputed(xhat_MC, x_MC, mlp)
        return out_MC.view(x.shape), xhat, rstd, x.new_empty(0), _float(x, 0)
    if grn_gamma is None:
        out_MC, h_MK = forward_kept(xhat_MC, x_MC, mlp)
        return out_MC.view(x.shape), xhat, rstd, h_MK, _float(x, 0)
    h_MK = xhat_MC @ w1.t()
    scale, squares = make_scale(h_MK, b1, grn_gamma, images=len(x))
    out_MC = project(h_MK, x_MC, mlp, scale=scale, shift=grn_beta)
    return out_MC.view(x.shape), xhat, rstd, h_MK, squares


@torch.library.custom_op("convnext::block_backward", mutates_args=())
@_without_autocast
def block_backward(
    grad: Tensor,
    x: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    h: Tensor,
    squares: Tensor,
    weight: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    grn_gamma: Tensor | None,
    grn_beta: Tensor | None,
    keep: Tensor | None,
    recomputed: bool,  # noqa: FBT001  # an operator's schema
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, w1, b1, w2, b2, gamma, grn_gamma and grn_beta; empty: none."""
    grad, x = grad.contiguous(), x.contiguous()
    mlp = Mlp(w1, b1, w2, b2, gamma, keep)
    grad_MC, xhat_MC, rstd_M = grad.view(-1, x.shape[-1]), xhat.view(-1, x.shape[-1]), rstd.view(-1)
    dgrn_gamma, dgrn_beta = _float(x, 0), _float(x, 0)
    if recomputed:
        grads = backward_recomputed(grad_MC, xhat_MC, rstd_M, mlp)
    elif grn_gamma is None:
        grads = backward_kept(grad_MC, xhat_MC, rstd_M, h, mlp)
    else:
        assert grn_beta is not None
        grads, dgrn_gamma, dgrn_beta = _backward_grn(
            grad_MC, xhat_MC, rstd_M, h, squares, mlp=mlp, gamma=grn_gamma, beta=grn_beta
        )
    dz = grads.z.view(x.shape)
    dweight, dbias = depthwise_weight_grad(x, dz)
    dx = depthwise_input_grad(dz, weight, add_NHWC=grad)
    dgamma = _float(x, 0) if grads.gamma is None else grads.gamma
    rest = (grads.w1, grads.b1, grads.w2, grads.b2, dgamma, dgrn_gamma, dgrn_beta)
    return dx, dweight.to(weight.dtype), dbias, *rest


def _backward_grn(
    grad_MC: Tensor,
    xhat_MC: Tensor,
    rstd_M: Tensor,
    h_MK: Tensor,
    squares: Tensor,
    *,
    mlp: Mlp,
    gamma: Tensor,
    beta: Tensor,
) -> tuple[MlpGrads, Tensor, Tensor]:
    da_MK = grad_MC @ put_in(mlp.gamma, mlp.w2)  # without keep, which is in what follows
    through = gelu_grn_backward(da_MK, h_MK, squares, mlp.b1, gamma, beta, mlp.keep)
    assert through.out is not None
    grads = finish_backward(
        grad_MC,
        xhat_MC,
        rstd_M,
        dh_MK=through.h,
        dw1_KC=through.h.t() @ xhat_MC,
        product_CK=grad_MC.t() @ through.out,  # which has keep in it
        db1_K=through.bias,
        mlp=mlp,
    )
    return grads, through.gamma, through.beta


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
    grn_gamma: Tensor | None,
    grn_beta: Tensor | None,
    keep: Tensor | None,
    eps: float,
    recomputed: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del weight, bias, b1, w2, b2, gamma, grn_beta, keep, eps
    images, height, width, _channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0) if recomputed else x.new_empty(images * height * width, len(w1))
    squares = _float(x, 0) if grn_gamma is None else _float(x, images, len(w1))
    return out, torch.empty_like(out), _float(x, images, height, width), h, squares


@block_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    h: Tensor,
    squares: Tensor,
    weight: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    gamma: Tensor | None,
    grn_gamma: Tensor | None,
    grn_beta: Tensor | None,
    keep: Tensor | None,
    recomputed: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    del grad, x, rstd, h, squares, b1, grn_beta, keep, recomputed
    dim, units = w2.shape
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dgrn = [_float(xhat, 0 if grn_gamma is None else units) for _ in range(2)]
    dgamma = _float(xhat, 0 if gamma is None else dim)
    matrices = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in (w1, w2)]
    vectors = [_float(xhat, length) for length in (dim, units, len(b2))]
    return (
        *(torch.empty_like(xhat), dweight, vectors[0], matrices[0], vectors[1], matrices[1]),
        *(vectors[2], dgamma, dgrn[0], dgrn[1]),
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
    x, xhat, rstd, h, squares, weight, *given = ctx.saved_tensors
    left = iter(given)
    rest = [next(left) if there else None for there in ctx.present]
    grads: Sequence[Tensor] = block_backward(
        grad, x, xhat, rstd, h, squares, weight, *rest, ctx.recomputed
    )
    # gamma and GRN's two, in the order of the inputs; then keep, eps and recomputed have none
    optional = [
        dt if there else None for dt, there in zip(grads[7:], ctx.present[4:7], strict=True)
    ]
    return (*grads[:7], *optional, None, None, None)


block.register_autograd(_block_grads, setup_context=_keep_block)


def _float(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor of the dtype that sums have."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.empty(shape, dtype=dtype, device=like.device)
