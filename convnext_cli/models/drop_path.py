"""Drop path (stochastic depth): in training, random images go past a block's branch.

```
draw_paths   once a pass, for all blocks   ->   what each block computes its branch with
add_scaled   kind scale: all images, each times its factor, 0 or one over the share that is kept
add_kept     kind skip: the images that are kept, and no others
```

What is random is drawn before the blocks, which are functions of what they are given: a block that
is computed again for its gradients needs no random state, and blocks of one shape share a compiled
graph whatever their rates are.

Shapes: N images, k of them that are kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, assert_never

import torch
from torch import Tensor

from convnext_cli.catalog.models import count_kept, drop_fracs

DropPathKind = Literal["scale", "skip"]
"""What is done with the images that a block drops: multiplied by 0, or not computed."""


def draw_paths(
    x: Tensor, *, blocks: int, drop_path: float, kind: DropPathKind
) -> tuple[Tensor | None, ...]:
    """What each block drops: factors (N) of images, or the k that it keeps; None: it drops none.

    Draws from the generator of the device, which the host does not wait for.

    scale: each image is dropped on its own. The factor is float32: rounded to bfloat16, as
    1 / 0.9 = 1.109, it would shift every mean.
    Source: timm `drop_path`, as facebookresearch/ConvNeXt@048efce uses it.

    skip: k is fixed (`count_kept`), and which images are kept is a random permutation. Each is kept
    with probability k / N, which differs from `1 - drop_frac` by the rounding of k; unlike under
    scale, images of a pass are not dropped independently of each other.
    Source: facebookresearch/dinov2 dinov2/layers/block.py `drop_add_residual_stochastic_depth`.

    Args:
        x: What goes into the network (N, ...): number of images, device and precision.
        blocks: Their number.
        drop_path: Probability of the last block of leaving an image's branch out, in [0, 1); it
            grows linearly from 0 in the first (`drop_fracs`).
        kind: See above.
    """
    fracs = drop_fracs(blocks, drop_path=drop_path)
    if fracs[-1] == 0:
        return (None,) * blocks
    # Drawn in float32 whatever comes in: a GPU draws other numbers in float64.
    chance_LN = torch.rand(blocks, len(x), device=x.device)
    drawn: Sequence[Tensor]
    match kind:
        case "scale":
            dtype = torch.promote_types(x.dtype, torch.float32)
            # made on the device: a copy from the host would wait for it
            drop_L1 = torch.linspace(0, drop_path, blocks, dtype=dtype, device=x.device)[:, None]
            drawn = ((chance_LN >= drop_L1).to(dtype) / (1 - drop_L1)).unbind()
        case "skip":
            order_LN = chance_LN.argsort(dim=1)
            drawn = [
                order_N[: count_kept(len(x), drop_frac=frac)]
                for order_N, frac in zip(order_LN.unbind(), fracs, strict=True)
            ]
        case _:
            assert_never(kind)
    return tuple(given if frac > 0 else None for given, frac in zip(drawn, fracs, strict=True))


def add_scaled(x_NCHW: Tensor, branch: Tensor, factor_N: Tensor | None) -> Tensor:
    """`x` plus the branch of each image by its factor; the dtype is that of `x`."""
    if factor_N is not None:
        branch = branch * factor_N.view(-1, *(1,) * (branch.ndim - 1))
    # Under autocast the float32 gamma would turn the stream between blocks into float32, twice the
    # memory traffic of everything that reads it; the sum goes back to the stream's dtype.
    return x_NCHW + branch.to(x_NCHW.dtype)


def add_kept(x_NCHW: Tensor, branch: Callable[[Tensor], Tensor], kept_k: Tensor) -> Tensor:
    """`x` plus the branch of the images that are kept, which sees no others.

    Args:
        x_NCHW: What goes past the branch; its dtype is the result's.
        branch: Maps (k, C, H, W) in channels_last memory to the same shape.
        kept_k: Which images.
    """
    # Picked from and added to NHWC: both operators give contiguous memory, forward and
    # backward, which would be another format than the blocks'.
    x_NHWC = x_NCHW.permute(0, 2, 3, 1)
    branch_kCHW = branch(x_NHWC.index_select(0, kept_k).permute(0, 3, 1, 2))
    branch_kHWC = (branch_kCHW.permute(0, 2, 3, 1) * (len(x_NCHW) / len(kept_k))).to(x_NCHW.dtype)
    out_NHWC: Tensor = _AddAt.apply(x_NHWC, branch_kHWC, kept_k)
    return out_NHWC.permute(0, 3, 1, 2)


class _AddAt(torch.autograd.Function):
    """`index_add`, whose own backward pass keeps the branch without using it.

    Not `index_put`, which reads the largest index on the host before it adds.
    """

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, branch_k: Tensor, kept_k: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(kept_k)
        return x_N.index_add(0, kept_k, branch_k)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        (kept_k,) = ctx.saved_tensors
        return grad_N, grad_N.index_select(0, kept_k), None
