"""The small parts of ConvNeXt: LayerNorm over channels, GRN and DropPath.

Shapes: N images, k of them, C channels, H x W positions. Blocks compute in NHWC, where a linear
layer is one matrix product; between blocks tensors are NCHW in channels_last memory, so that the
permutes around a block are views.

In float32 every layer equals the published one. Under autocast they keep the dtype that they are
given: statistics and sums are float32 inside, but no float32 copy of an activation is kept for the
backward pass, as autocast's own rule for `layer_norm` would do.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from convnext_cli.catalog.models import count_kept
from convnext_cli.kernels.grn import EPS

DropPathKind = Literal["scale", "skip"]
"""What is done with the images that a block drops: multiplied by 0, or not computed."""


def _plain_math(x: Tensor) -> AbstractContextManager[object]:
    # Entered only when autocast is on: a disabled autocast region is still a node in an exported
    # graph, and ONNX has no such node. The meta device knows no autocast and raises when asked.
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis; the result has the dtype of the input.

    Mean and (biased) variance are float32 inside the operator, so float16 inputs near its largest
    value neither overflow nor lose their statistics.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to the same shape and dtype."""
        with _plain_math(x):
            return functional.layer_norm(
                x,
                self.normalized_shape,
                self.weight.to(x.dtype),
                self.bias.to(x.dtype),
                self.eps,
            )


class ChannelsFirstLayerNorm(LayerNorm):
    """LayerNorm over the channels of an NCHW tensor.

    Works on a permuted view, which costs no copy in channels_last memory; the result is in
    channels_last memory whatever the input was.

    Source: facebookresearch/ConvNeXt@048efce models/convnext.py `LayerNorm`. Differs: one operator
    in place of a hand-written mean and square, which overflows in float16.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape and dtype."""
        return super().forward(x_NCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(nn.Module):
    """Global response normalisation: channels of one image compete by their energy.

    `G = ||x||` over the positions of each image and channel, `N = G / (mean over channels of G +
    eps)`, result `gamma * (x * N) + beta + x`; with gamma and beta 0, as they start, the identity.
    Never mixes images. G and N are float32 whatever the input is.

    Source: ConvNeXt V2 section 3; facebookresearch/ConvNeXt-V2@2553895 models/utils.py `GRN`.
    Differs: computed as `x * (1 + gamma * N) + beta`, which is the same sum in one pass over the
    wide tensor instead of four.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, num_channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, num_channels))

    def forward(self, x_NHWC: Tensor) -> Tensor:
        """Map (N, H, W, C) to the same shape and dtype."""
        with _plain_math(x_NHWC):
            dtype = torch.promote_types(x_NHWC.dtype, torch.float32)
            energy_N11C = torch.linalg.vector_norm(x_NHWC, dim=(1, 2), keepdim=True, dtype=dtype)
            share_N11C = energy_N11C / (energy_N11C.mean(dim=-1, keepdim=True) + EPS)
            out_NHWC = torch.addcmul(self.beta, x_NHWC, 1 + self.gamma * share_N11C)
            return out_NHWC.to(x_NHWC.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.gamma.shape[-1]}, eps={EPS}"


class DropPath(nn.Module):
    """Stochastic depth: in training, a random share of the images goes past a block's branch.

    The branch of each image is left out with probability `drop_frac`, and multiplied by one over
    the probability of keeping it otherwise, so that the expected value stays. The factor is
    float32: rounded to bfloat16, as 1 / 0.9 = 1.109, it would shift every mean.

    scale: the branch computes all images, and each is dropped on its own by a factor of 0.
    Source: timm `drop_path`, as facebookresearch/ConvNeXt@048efce uses it.

    skip: the branch computes the images that are kept and no others. Their number is fixed, `k`
    of N (`count_kept`), and which they are is a random permutation. Each image is kept with
    probability k / N, which differs from `1 - drop_frac` by the rounding of k, and the factor is
    N / k; unlike under scale, images of a pass are not dropped independently of each other.
    Source: facebookresearch/dinov2 dinov2/layers/block.py `drop_add_residual_stochastic_depth`.
    """

    def __init__(self, drop_frac: float, *, kind: DropPathKind = "scale") -> None:
        super().__init__()
        if not 0 <= drop_frac < 1:
            raise ValueError(f"drop_frac must be in [0, 1), not {drop_frac}")
        self.drop_frac = drop_frac
        self.kind: DropPathKind = kind

    @property
    def skips(self) -> bool:
        """Whether the branch is to compute the images of `draw_kept` and no others."""
        return self.kind == "skip" and self.training and self.drop_frac > 0

    def draw_factor(self, x: Tensor) -> Tensor | None:
        """Factor (N) of each image's branch: 0, or 1 over the share kept; None: none is dropped.

        Draws N numbers from the device's generator.
        """
        if not self.training or self.drop_frac == 0:
            return None
        keep_frac = 1 - self.drop_frac
        # Drawn in float32 whatever comes in: a GPU draws other images in float64.
        kept = torch.empty(x.shape[0], dtype=torch.float32, device=x.device).bernoulli_(keep_frac)
        return kept.to(torch.promote_types(x.dtype, torch.float32)) / keep_frac

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, ...) to the same shape and dtype."""
        factor_N = self.draw_factor(x)
        if factor_N is None:
            return x
        return (x * factor_N.view(-1, *(1,) * (x.ndim - 1))).to(x.dtype)

    def draw_kept(self, x: Tensor) -> Tensor:
        """Which images (k) of N are kept under skip.

        Draws a permutation of N from the device's generator; the host does not wait for it.
        """
        num_kept = count_kept(x.shape[0], drop_frac=self.drop_frac)
        return torch.randperm(x.shape[0], device=x.device)[:num_kept]

    def add_kept(self, x_NCHW: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """`x` plus the branch of the images that are kept, which sees no others.

        Args:
            x_NCHW: What goes past the branch; its dtype is the result's.
            branch: Maps (k, C, H, W) in channels_last memory to the same shape.
        """
        kept_k = self.draw_kept(x_NCHW)
        # Picked from and added to NHWC: both operators give contiguous memory, forward and
        # backward, which would be another format than the blocks'.
        x_NHWC = x_NCHW.permute(0, 2, 3, 1)
        branch_kCHW = branch(x_NHWC.index_select(0, kept_k).permute(0, 3, 1, 2))
        branch_kHWC = (branch_kCHW.permute(0, 2, 3, 1) * (len(x_NCHW) / len(kept_k))).to(
            x_NCHW.dtype
        )
        # What `index_add` does, which keeps the branch for its backward pass without using it.
        return x_NHWC.index_put((kept_k,), branch_kHWC, accumulate=True).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.drop_frac:.3f}" + (", skip" if self.kind == "skip" else "")
