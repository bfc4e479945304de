"""ConvNeXt V1, V2 and isotropic: one class, with the official parameter names.

```
hierarchical   downsample_layers.0 (4x4 conv, LayerNorm) -> stages.0 -> downsample_layers.1 -> ...
isotropic      stem (16x16 conv) -> blocks
both           ... -> mean over positions -> norm -> head
block          x + factor * gamma * pwconv2([grn] gelu(pwconv1(norm(dwconv(x)))))
               factor is that of drop path, drawn for all blocks before the first one
```

Shapes: N images, C channels, H x W positions, K classes. Tensors between blocks are NCHW in
channels_last memory; see `layers` for why.

Source: facebookresearch/ConvNeXt@048efce models/convnext.py, models/convnext_isotropic.py;
facebookresearch/ConvNeXt-V2@2553895 models/convnextv2.py.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from convnext_cli.catalog.models import ISOTROPIC_RUN, Variant
from convnext_cli.catalog.ways import WHOLE, Way, list_ways
from convnext_cli.kernels.block import activate as fused_activate
from convnext_cli.kernels.block import activate_grn as fused_activate_grn
from convnext_cli.kernels.block import block as fused_block
from convnext_cli.kernels.block import positions as fused_positions
from convnext_cli.models.drop_path import DropPathKind, add_kept, add_scaled, draw_paths
from convnext_cli.models.layers import GRN, ChannelsFirstLayerNorm, LayerNorm, PatchConv

Checkpointing = Literal["none", "selective", "stages", "blocks"]
"""What is computed again in the backward pass instead of being kept: nothing, all but products and
convolutions, stages, or blocks."""

_PRODUCTS = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,  # noqa: SLF001  # in float8
    torch.ops.convnext.positions.default,
)
"""Operators whose results selective checkpointing keeps: all that take time of their own."""


_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""A function that is run again in the backward pass; it draws nothing."""

_Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


class Block(nn.Module):
    """Depthwise convolution and LayerNorm over space, then a two-layer network over channels.

    The two halves, `mix_positions` and `mix_channels`, meet in one NHWC tensor and share nothing
    else, so that either can be replaced by a faster operator.

    Args:
        dim: Channels of input and output.
        layer_scale_init: First value of `gamma`; None for a block without it.
        grn: Whether a GRN follows the activation.
        drop_path_kind: What `forward` is given for drop path.
    """

    def __init__(
        self,
        dim: int,
        *,
        layer_scale_init: float | None,
        grn: bool,
        drop_path_kind: DropPathKind = "scale",
    ) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim) if grn else None
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma: nn.Parameter | None = None
        if layer_scale_init is not None:
            self.gamma = nn.Parameter(torch.full((dim,), layer_scale_init))
        self.drop_path_kind: DropPathKind = drop_path_kind
        self.way: Way = "plain"
        """How the block is computed; the numbers are the same to rounding."""

    def ways(self) -> tuple[Way, ...]:
        """The ways in which this block can be computed, the most fused one last."""
        if type(self.pwconv1) is not nn.Linear:  # such as one in float8
            return ("plain",)
        return list_ways(self.pwconv1.in_features, grn=self.grn is not None)

    def mix_positions(self, x_NCHW: Tensor) -> Tensor:
        """The half over space: (N, C, H, W) to (N, H, W, C), normalised."""
        y_NHWC: Tensor = self.norm(self.dwconv(x_NCHW).permute(0, 2, 3, 1))
        return y_NHWC

    def mix_channels(self, y_NHWC: Tensor) -> Tensor:
        """The half over channels: (N, H, W, C) to the same shape."""
        h_NHWC = self.act(self.pwconv1(y_NHWC))
        if self.grn is not None:
            h_NHWC = self.grn(h_NHWC)
        out_NHWC: Tensor = self.pwconv2(h_NHWC)
        return out_NHWC

    def fold_norm(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight (in `dtype`) and bias of `pwconv1` with the affine part of `norm` in them."""
        weight = (self.pwconv1.weight * self.norm.weight).to(dtype)
        return weight, self.pwconv1.bias + (self.pwconv1.weight * self.norm.bias).sum(dim=1)

    def fold_scale(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight (in `dtype`) and bias of `pwconv2` with LayerScale in them; what is left of it.

        float16 is too narrow for weights times a young LayerScale, which is left as it is then.
        """
        weight, bias = self.pwconv2.weight, self.pwconv2.bias
        if self.gamma is None or dtype == torch.float16:
            return weight.to(dtype), bias, self.gamma
        return (self.gamma[:, None] * weight).to(dtype), self.gamma * bias, None

    def branch_with_kernels(self, x_NCHW: Tensor, factor_N: Tensor | None) -> Tensor:
        """What is added to each image, by its factor, all but the products in kernels.

        Written for the compiler. A bias is added where the next operator reads its product: as the
        product's own, it costs up to two thirds of the product's time again. What scales a row of
        the second product scales its input instead, in the pass that GELU makes anyway, and
        LayerScale its weights: so the block's gradient is that of the product, and nothing else is
        kept.
        """
        xhat_NHWC, _rstd = fused_positions(
            x_NCHW.permute(0, 2, 3, 1), self.dwconv.weight, self.dwconv.bias, self.norm.eps
        )
        dtype = xhat_NHWC.dtype
        factor_N111 = 1 if factor_N is None else factor_N[:, None, None, None]
        weight, bias = self.fold_norm(dtype)
        h_NHWC = functional.linear(xhat_NHWC, weight)
        if self.grn is None:
            h_NHWC = fused_activate(h_NHWC, bias, factor_N)
        else:
            h_NHWC, _squares = fused_activate_grn(
                h_NHWC, bias, self.grn.gamma.view(-1), self.grn.beta.view(-1), factor_N
            )
        weight, bias, gamma = self.fold_scale(dtype)
        out_NHWC = functional.linear(h_NHWC, weight) + (factor_N111 * bias).to(dtype)
        if gamma is not None:
            out_NHWC = gamma * out_NHWC
        return out_NHWC.permute(0, 3, 1, 2)

    def forward_fused(self, x_NCHW: Tensor, drawn: Tensor | None, *, recomputed: bool) -> Tensor:
        """The whole block as one operator: (N, C, H, W) to the same shape and dtype."""
        x_NHWC = x_NCHW.permute(0, 2, 3, 1)
        if drawn is None or self.drop_path_kind == "scale":
            out_NHWC = self.fuse(x_NHWC, drawn, recomputed=recomputed)
            return out_NHWC.permute(0, 3, 1, 2)
        dtype = torch.promote_types(x_NHWC.dtype, torch.float32)
        factor = len(x_NHWC) / len(drawn)
        factor_k = torch.full(drawn.shape, factor, dtype=dtype, device=drawn.device)
        out_kHWC = self.fuse(x_NHWC.index_select(0, drawn), factor_k, recomputed=recomputed)
        return x_NHWC.index_copy(0, drawn, out_kHWC).permute(0, 3, 1, 2)

    def fuse(self, x_NHWC: Tensor, factor_N: Tensor | None, *, recomputed: bool) -> Tensor:
        """The operator: x plus the branch of each image by its factor; None: by 1."""
        weight, bias = self.fold_norm(x_NHWC.dtype)
        out_NHWC: Tensor = fused_block(
            x_NHWC,
            self.dwconv.weight,
            self.dwconv.bias,
            weight,
            bias,
            self.pwconv2.weight.to(x_NHWC.dtype),
            self.pwconv2.bias,
            self.gamma,
            factor_N,
            self.norm.eps,
            recomputed,
        )[0]
        return out_NHWC

    def branch(self, x_NCHW: Tensor) -> Tensor:
        """What is added to the images: (N, C, H, W) to the same shape."""
        if self.way != "plain":
            return self.branch_with_kernels(x_NCHW, None)
        y_NHWC = self.mix_channels(self.mix_positions(x_NCHW))
        if self.gamma is not None:
            y_NHWC = self.gamma * y_NHWC
        return y_NHWC.permute(0, 3, 1, 2)

    def compute(self, x_NCHW: Tensor, drawn: Tensor | None) -> Tensor:
        """What `forward` gives, its intermediate results kept for the backward pass."""
        if self.way in WHOLE:
            return self.forward_fused(x_NCHW, drawn, recomputed=self.way == "recomputed")
        if drawn is not None and self.drop_path_kind == "skip":
            return add_kept(x_NCHW, self.branch, drawn)
        if self.way == "plain":
            return add_scaled(x_NCHW, self.branch(x_NCHW), drawn)
        return add_scaled(x_NCHW, self.branch_with_kernels(x_NCHW, drawn), None)

    def forward(
        self, x_NCHW: Tensor, drawn: Tensor | None = None, checkpointing: Checkpointing = "none"
    ) -> Tensor:
        """Map (N, C, H, W) to the same shape and dtype.

        Args:
            x_NCHW: Images.
            drawn: What `draw_paths` has for this block; None: no image is dropped.
            checkpointing: What of the block the backward pass computes again. `selective`
                (Korthikanti et al. 2022, arXiv 2205.05198) leaves a block that is one operator as
                it is; `stages` is for who calls the stage.
        """
        match checkpointing:
            case "none" | "stages":
                out_NCHW = self.compute(x_NCHW, drawn)
            case "selective" if self.way in WHOLE:
                out_NCHW = self.compute(x_NCHW, drawn)
            case "selective":
                out_NCHW = _checkpoint(self.compute, x_NCHW, drawn, context_fn=_keep_products)
            case "blocks":
                out_NCHW = _checkpoint(self.compute, x_NCHW, drawn)
            case _:
                assert_never(checkpointing)
        return out_NCHW


class ConvNeXt(nn.Module):
    """The classifier.

    Args:
        depths: Blocks per stage; one number if isotropic.
        dims: Channels per stage; one number if isotropic.
        num_classes: Outputs of the head.
        drop_path: Drop probability of the last block; it grows linearly from 0 in the first.
        layer_scale_init: First value of every LayerScale; None for none.
        grn: Whether blocks hold a GRN (V2).
        isotropic: Whether one resolution and one width run through all blocks.
        head_init_scale: Factor on the head's first weight and bias (0.001 for fine-tuning).
        gradient_checkpointing: What the backward pass computes again. For isotropic models
            `stages` means runs of six blocks.
        drop_path_kind: See `draw_paths`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        dims: Sequence[int],
        num_classes: int,
        drop_path: float = 0.0,
        layer_scale_init: float | None = None,
        grn: bool = False,
        isotropic: bool = False,
        head_init_scale: float = 1.0,
        gradient_checkpointing: Checkpointing = "none",
        drop_path_kind: DropPathKind = "scale",
    ) -> None:
        super().__init__()
        if len(depths) != len(dims) or not depths or (isotropic and len(depths) != 1):
            raise ValueError(f"depths {tuple(depths)} and dims {tuple(dims)} do not fit together")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), not {drop_path}")
        self.gradient_checkpointing: Checkpointing = gradient_checkpointing
        self.drop_path = drop_path
        self.drop_path_kind: DropPathKind = drop_path_kind
        widths = [dim for depth, dim in zip(depths, dims, strict=True) for _ in range(depth)]
        self.num_blocks = len(widths)
        blocks = iter(
            Block(dim, layer_scale_init=layer_scale_init, grn=grn, drop_path_kind=drop_path_kind)
            for dim in widths
        )
        self.isotropic = isotropic
        if isotropic:
            self.stem = PatchConv(3, dims[0], side=16)
            self.blocks = nn.Sequential(*blocks)
        else:
            self.downsample_layers = nn.ModuleList(
                [
                    nn.Sequential(
                        PatchConv(3, dims[0], side=4),
                        ChannelsFirstLayerNorm(dims[0]),
                    )
                ]
            )
            for narrow, wide in itertools.pairwise(dims):
                self.downsample_layers.append(
                    nn.Sequential(
                        ChannelsFirstLayerNorm(narrow),
                        PatchConv(narrow, wide, side=2),
                    )
                )
            self.stages = nn.ModuleList(
                nn.Sequential(*(next(blocks) for _ in range(depth))) for depth in depths
            )
        self.norm = LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        self.layer_scale_init = layer_scale_init
        self.init_weights(head_init_scale=head_init_scale)

    def init_weights(self, *, head_init_scale: float = 1.0) -> None:
        """Give every parameter its first value; also what a model made on `meta` needs.

        Draws from the global generator: the same on every rank only after the same seed.

        Source: facebookresearch/ConvNeXt@048efce models/convnext.py `_init_weights`. (The paper
        prints a standard deviation of 0.2; the code's 0.02 is what was trained.)
        """
        for module in self.modules():
            match module:
                case nn.Conv2d() | nn.Linear():
                    nn.init.trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
                case nn.LayerNorm():
                    module.reset_parameters()
                case GRN():
                    nn.init.zeros_(module.gamma)
                    nn.init.zeros_(module.beta)
                case Block(gamma=nn.Parameter() as gamma) if self.layer_scale_init is not None:
                    nn.init.constant_(gamma, self.layer_scale_init)
                case _:
                    pass
        with torch.no_grad():
            self.head.weight.mul_(head_init_scale)
            self.head.bias.mul_(head_init_scale)

    def list_stages(self) -> list[list[Block]]:
        """The blocks of each stage; an isotropic model has one."""
        stages = (self.blocks,) if self.isotropic else tuple(self.stages)
        return [[part for part in stage.modules() if isinstance(part, Block)] for stage in stages]

    def use_ways(self, ways: Sequence[Way]) -> None:
        """Have the blocks of each stage computed in a way; parameters and their names stay.

        Raises:
            ValueError: A stage cannot be computed so.
        """
        for blocks, way in zip(self.list_stages(), ways, strict=True):
            for block in blocks:
                if way not in block.ways():
                    dim = block.pwconv1.in_features
                    raise ValueError(f"blocks of {dim} channels have no way {way}")
                block.way = way

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to pooled and normalised features (N, C)."""
        drop_path = self.drop_path if self.training else 0.0
        blocks, kind = self.num_blocks, self.drop_path_kind
        drawn = iter(draw_paths(x_NCHW, blocks=blocks, drop_path=drop_path, kind=kind))
        if self.isotropic:
            # Without a LayerNorm after the stem, nothing else brings the stream into this memory
            # format; a block of another format would copy at both of its permutes.
            x_NCHW = self.stem(x_NCHW).contiguous(memory_format=torch.channels_last)
            for start in range(0, len(self.blocks), ISOTROPIC_RUN):
                x_NCHW = self._run(self.blocks[start : start + ISOTROPIC_RUN], x_NCHW, drawn)
        else:
            for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
                x_NCHW = self._run(stage, downsample(x_NCHW), drawn)
        # Over NHWC, so that the gradient comes in this memory format.
        features_NC: Tensor = self.norm(x_NCHW.permute(0, 2, 3, 1).mean(dim=(1, 2)))
        return features_NC

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to logits (N, K)."""
        logits_NK: Tensor = self.head(self.forward_features(x_NCHW))
        return logits_NK

    def _run(self, stage: nn.Module, x_NCHW: Tensor, drawn: Iterator[Tensor | None]) -> Tensor:
        recomputes = self.training and torch.is_grad_enabled()
        mode: Checkpointing = self.gradient_checkpointing if recomputes else "none"
        blocks = [(block, next(drawn)) for block in stage.children()]

        def run(x_NCHW: Tensor) -> Tensor:
            for block, given in blocks:
                x_NCHW = block(x_NCHW, given, mode)
            return x_NCHW

        return _checkpoint(run, x_NCHW) if mode == "stages" else run(x_NCHW)


def _keep_products() -> _Contexts:
    contexts: _Contexts
    contexts = create_selective_checkpoint_contexts(list(_PRODUCTS))  # type: ignore[no-untyped-call]
    return contexts


def build_convnext(
    variant: Variant,
    *,
    num_classes: int,
    drop_path: float = 0.0,
    layer_scale_init: float | Literal["auto"] | None = "auto",
    head_init_scale: float = 1.0,
    gradient_checkpointing: Checkpointing = "none",
    drop_path_kind: DropPathKind = "scale",
) -> ConvNeXt:
    """A ConvNeXt of a catalogued shape; `auto` takes the variant's own LayerScale."""
    if variant.family == "timm":
        raise ValueError(f"{variant.name} is no ConvNeXt; see build_comparison")
    if layer_scale_init == "auto":
        layer_scale_init = variant.layer_scale_init
    return ConvNeXt(
        depths=variant.depths,
        dims=variant.dims,
        num_classes=num_classes,
        drop_path=drop_path,
        layer_scale_init=layer_scale_init,
        grn=variant.grn,
        isotropic=variant.isotropic,
        head_init_scale=head_init_scale,
        gradient_checkpointing=gradient_checkpointing,
        drop_path_kind=drop_path_kind,
    )


def build_comparison(variant: Variant, *, num_classes: int, drop_path: float = 0.0) -> nn.Module:
    """The timm model of a comparison family, with fresh weights."""
    import timm  # noqa: PLC0415  # takes seconds, and no ConvNeXt needs it

    if variant.family != "timm" or variant.timm_name is None:
        raise ValueError(f"{variant.name} is no comparison model; see build_convnext")
    model: nn.Module = timm.create_model(
        variant.timm_name, pretrained=False, num_classes=num_classes, drop_path_rate=drop_path
    )
    return model
