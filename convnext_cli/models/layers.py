"""The small parts of ConvNeXt: LayerNorm over channels, GRN and the convolution of patches.

Shapes: N images, C channels, H x W positions. Blocks compute in NHWC, where a linear
layer is one matrix product; between blocks tensors are NCHW in channels_last memory, so that the
permutes around a block are views.

In float32 every layer equals the published one. Under autocast they keep the dtype that they are
given: statistics and sums are float32 inside, but no float32 copy of an activation is kept for the
backward pass, as autocast's own rule for `layer_norm` would do.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from convnext_cli.kernels.grn import EPS


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
        x_NHWC = x_NCHW.permute(0, 2, 3, 1)
        # With positions in one axis: of three, the compiler may turn two in what it keeps, and with
        # them the gradient, which whoever takes it copies back.
        y_MC = super().forward(x_NHWC.flatten(0, 2))
        return y_MC.view(x_NHWC.shape).permute(0, 3, 1, 2)


class PatchConv(nn.Conv2d):
    """Convolution of square patches side by side, whose stride is their side.

    On a GPU it is one matrix product over the patches, which the compiler has the operator before
    write in this order. cuDNN's kernels take longer for it, most of all for the gradient of the
    stem's weight: it pads the three colours to eight channels.

    Source: ConvNeXt section 2.2 ("patchify" stem, separate downsampling layers).
    """

    def __init__(self, in_channels: int, out_channels: int, *, side: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=side, stride=side)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, O, H / side, W / side), rounded down."""
        height, width = x_NCHW.shape[2:]
        if x_NCHW.is_cuda and not (height % self.stride[0] or width % self.stride[1]):
            return self.multiply_patches(x_NCHW)
        return super().forward(x_NCHW)

    def multiply_patches(self, x_NCHW: Tensor) -> Tensor:
        """The same, where the sides of the images are multiples of that of a patch."""
        (images, channels, height, width), (side, _) = x_NCHW.shape, self.stride
        down, across = height // side, width // side
        lines = x_NCHW.permute(0, 2, 3, 1).reshape(images, down, side, across, side * channels)
        patches_NHWK = lines.transpose(2, 3).reshape(images, down, across, side * side * channels)
        weight_OK = self.weight.permute(0, 2, 3, 1).flatten(1)
        return functional.linear(patches_NHWK, weight_OK, self.bias).permute(0, 3, 1, 2)


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
