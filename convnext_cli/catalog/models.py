"""Every model variant: shape, size and published accuracy; exact counts by arithmetic, no torch.

Families: `v1` is ConvNeXt (LayerScale), `isotropic` its ViT-like form (one resolution, one width),
`v2` is ConvNeXt V2 (GRN in place of LayerScale), `timm` the models it is compared with.

Arithmetic below: C is a block's width; a block holds a 7x7 depthwise convolution, a LayerNorm and
two linear layers C -> 4C -> C. GMACs are 1e9 multiply-adds of convolutions and matrix products
alone, which is what the papers print as "FLOPs".

Source: ConvNeXt (arXiv 2201.03545) Tables 1, 2, 10 and 11; ConvNeXt V2 (arXiv 2301.00808) Tables
3, 4, 5 and 7; facebookresearch/ConvNeXt@048efce and facebookresearch/ConvNeXt-V2@2553895 READMEs;
re-evaluations from huggingface/pytorch-image-models@aa4b585 results/*.csv.
"""

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from convnext_cli.errors import RecipeError

Family = Literal["v1", "isotropic", "v2", "timm"]

Training = Literal["1k", "22k_1k", "fcmae_1k", "fcmae_22k_1k"]
"""How the weights came to be, in order: the data sets trained on; `fcmae` is self-supervised."""

ISOTROPIC_RUN: Final = 6
"""Blocks that an isotropic model computes again together under `stages`."""

_KERNEL_PX: Final = 7
_EXPANSION: Final = 4
_LAYER_SCALE: Final = 1e-6
_FP8_CHANNELS: Final = 512


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One published ImageNet-1K top-1, in percent."""

    training: Training
    image_px: int
    top1: float
    retested: float | None
    """Top-1 of the released weights as timm measures it: crop 0.875 at 224 px, warp above."""
    source: str


@dataclass(frozen=True, slots=True)
class Variant:
    """One architecture.

    `depths` counts blocks per stage and `dims` is the width of each stage, so `dims[-1]` is the
    width that the head sees. `isotropic` variants have one stage.
    """

    name: str
    family: Family
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    layer_scale_init: float | None
    """First value of LayerScale; None where blocks have none."""
    parameters_1k: int
    """With a head of 1,000 classes."""
    gmacs_224: float
    """At 224 px with a head of 1,000 classes."""
    accuracies: tuple[Accuracy, ...] = ()
    timm_name: str | None = None
    """The same architecture in timm; for the `timm` family, what is built."""
    torchvision_name: str | None = None
    fixed_px: int | None = None
    """The only image size that the architecture takes; None where any size works."""

    @property
    def grn(self) -> bool:
        """Whether blocks hold a global response normalisation."""
        return self.family == "v2"

    @property
    def isotropic(self) -> bool:
        """Whether one resolution and one width run through all blocks."""
        return self.family == "isotropic"

    @property
    def smallest_px(self) -> int:
        """The smallest image of which something is left after all halvings."""
        return 16 if self.isotropic else 32


def count_parameters(variant: Variant, *, num_classes: int) -> int:
    """Exact number of parameters with a head of `num_classes`.

    Depends on the arguments alone. LayerScale is counted as `variant.layer_scale_init` says.
    """
    if variant.family == "timm":
        return variant.parameters_1k + (num_classes - 1000) * (variant.dims[-1] + 1)
    stem_px = 16 if variant.isotropic else 4
    total = variant.dims[0] * (3 * stem_px**2 + 1)
    if not variant.isotropic:
        total += 2 * variant.dims[0]  # the LayerNorm after the stem
    for narrow, wide in itertools.pairwise(variant.dims):
        total += 2 * narrow + wide * (4 * narrow + 1)
    for depth, dim in zip(variant.depths, variant.dims, strict=True):
        hidden = _EXPANSION * dim
        block = dim * (_KERNEL_PX**2 + 1) + 2 * dim + hidden * (dim + 1) + dim * (hidden + 1)
        if variant.grn:
            block += 2 * hidden
        if variant.layer_scale_init is not None:
            block += dim
        total += depth * block
    return total + 2 * variant.dims[-1] + num_classes * (variant.dims[-1] + 1)


def estimate_macs(variant: Variant, *, image_px: int, num_classes: int) -> int:
    """Multiply-adds of one image's forward pass, convolutions and matrix products alone.

    Exact for ConvNeXt at any size. The `timm` family starts from the stored count at 224 px;
    ResNets scale it by area, which is exact at multiples of 32 px.

    Raises:
        RecipeError: The architecture takes one image size only, and it is another one.
    """
    head = num_classes * variant.dims[-1]
    if variant.family == "timm":
        if variant.fixed_px is not None and image_px != variant.fixed_px:
            raise RecipeError(
                f"{variant.name} takes images of {variant.fixed_px} px only, not {image_px} px",
                hint=f"use images of {variant.fixed_px} px, or another model",
            )
        trunk = round(variant.gmacs_224 * 1e9) - 1000 * variant.dims[-1]
        return trunk * image_px**2 // 224**2 + head
    stem_px = 16 if variant.isotropic else 4
    side = image_px // stem_px
    total = side**2 * variant.dims[0] * 3 * stem_px**2
    for narrow, wide in itertools.pairwise(variant.dims):
        side //= 2
        total += side**2 * wide * narrow * 4
    return total + sum(estimate_block_macs(variant, image_px=image_px)) + head


def estimate_block_macs(variant: Variant, *, image_px: int) -> tuple[int, ...]:
    """Multiply-adds of each block of a ConvNeXt for one image, from the first block to the last."""
    side = image_px // (16 if variant.isotropic else 4)
    return tuple(
        (side >> stage) ** 2 * dim * (_KERNEL_PX**2 + 2 * _EXPANSION * dim)
        for stage, (depth, dim) in enumerate(zip(variant.depths, variant.dims, strict=True))
        for _ in range(depth)
    )


def drop_fracs(num_blocks: int, *, drop_path: float) -> tuple[float, ...]:
    """Drop probability of each block: linearly from 0 in the first to `drop_path` in the last."""
    return tuple(drop_path * index / max(num_blocks - 1, 1) for index in range(num_blocks))


def count_kept(images: int, *, drop_frac: float) -> int:
    """Images of a pass that a block's branch computes where dropped ones are left out; at least 1.

    A number and not a draw, so that shapes are fixed: `images * (1 - drop_frac)`, rounded.
    """
    return max(1, round(images * (1 - drop_frac)))


def takes_fp8(dim: int) -> bool:
    """Whether the pointwise layers of a block of this width gain from fp8.

    The hardware takes multiples of 16. Narrow products are bound by memory, and casting costs more
    than it saves (torchao's float8 README); that 512 channels suffice is estimated, not measured.
    """
    return dim >= _FP8_CHANNELS and dim % 16 == 0


def count_fp8_layers(variant: Variant) -> int:
    """Pointwise layers of a ConvNeXt that gain from fp8."""
    return sum(
        2 * depth
        for depth, dim in zip(variant.depths, variant.dims, strict=True)
        if variant.family != "timm" and takes_fp8(dim)
    )


def find_variant(name: str) -> Variant:
    """The variant called `name`.

    Raises:
        RecipeError: There is none; the message names the nearest one.
    """
    variant = VARIANTS.get(name)
    if variant is not None:
        return variant
    near = difflib.get_close_matches(name, VARIANTS, n=1, cutoff=0.0)
    raise RecipeError(
        f"there is no model called {name!r}; the nearest name is {near[0]!r}",
        hint=f"use one of: {', '.join(VARIANTS)}",
    )


def find_architecture(
    depths: Sequence[int], dims: Sequence[int], *, has_grn: bool, isotropic: bool
) -> Variant | None:
    """The ConvNeXt variant with these stages, or None: so that a checkpoint can be recognised."""
    for variant in VARIANTS.values():
        if (
            variant.family != "timm"
            and variant.depths == tuple(depths)
            and variant.dims == tuple(dims)
            and variant.grn == has_grn
            and variant.isotropic == isotropic
        ):
            return variant
    return None


def _v1(
    size: str,
    depths: tuple[int, int, int, int],
    width: int,
    parameters: int,
    gmacs: float,
    *accuracies: tuple[Training, int, float, float | None],
) -> Variant:
    source = "ConvNeXt Table 1"
    return Variant(
        name=f"convnext_{size}",
        family="v1",
        depths=depths,
        dims=(width, 2 * width, 4 * width, 8 * width),
        layer_scale_init=_LAYER_SCALE,
        parameters_1k=parameters,
        gmacs_224=gmacs,
        accuracies=tuple(Accuracy(*accuracy, source) for accuracy in accuracies),
        timm_name=f"convnext_{size}",
        torchvision_name=None if size == "xlarge" else f"convnext_{size}",
    )


def _isotropic(
    size: str,
    depth: int,
    dim: int,
    layer_scale: float | None,
    parameters: int,
    gmacs: float,
    top1: float,
    source: str = "ConvNeXt Table 2",
) -> Variant:
    return Variant(
        name=f"convnext_isotropic_{size}",
        family="isotropic",
        depths=(depth,),
        dims=(dim,),
        layer_scale_init=layer_scale,
        parameters_1k=parameters,
        gmacs_224=gmacs,
        accuracies=(Accuracy("1k", 224, top1, None, source),),
    )


def _v2(
    size: str,
    depths: tuple[int, int, int, int],
    width: int,
    parameters: int,
    gmacs: float,
    *accuracies: tuple[Training, int, float, float | None],
) -> Variant:
    source = "ConvNeXt V2, tables and README"
    return Variant(
        name=f"convnextv2_{size}",
        family="v2",
        depths=depths,
        dims=(width, 2 * width, 4 * width, 8 * width),
        layer_scale_init=None,
        parameters_1k=parameters,
        gmacs_224=gmacs,
        accuracies=tuple(Accuracy(*accuracy, source) for accuracy in accuracies),
        timm_name=f"convnextv2_{size}",
    )


def _timm(
    name: str,
    timm_name: str,
    depths: tuple[int, ...],
    dims: tuple[int, ...],
    parameters: int,
    macs: int,
    top1: float,
    source: str,
    fixed_px: int | None = 224,
) -> Variant:
    return Variant(
        name=name,
        family="timm",
        depths=depths,
        dims=dims,
        layer_scale_init=None,
        parameters_1k=parameters,
        gmacs_224=macs / 1e9,
        accuracies=(Accuracy("1k", 224, top1, None, source),),
        timm_name=timm_name,
        fixed_px=fixed_px,
    )


_RESNET_DIMS: Final = (256, 512, 1024, 2048)
_RESNET_SOURCE: Final = "ConvNeXt Tables 10 and 11: ResNet under ConvNeXt's recipe, mean of 3 seeds"
_VIT_SOURCE: Final = "ConvNeXt Table 2: DeiT's ViT"
_DEIT_SOURCE: Final = "ConvNeXt Table 1: DeiT"
_SWIN_SOURCE: Final = "ConvNeXt Table 1: Swin"

# Sizes of the timm family: parameters and multiply-adds counted over timm 1.0's own modules; they
# round to what the papers print (4.1G, 15.0G, 4.6G, 17.6G, 4.5G, 8.7G, 15.4G).
_ALL: Final = (
    _v1(
        "tiny", (3, 3, 9, 3), 96, 28_589_128, 4.46,
        ("1k", 224, 82.1, 82.066), ("22k_1k", 224, 82.9, 82.900), ("22k_1k", 384, 84.1, 84.098),
    ),
    _v1(
        "small", (3, 3, 27, 3), 96, 50_223_688, 8.68,
        ("1k", 224, 83.1, 83.144), ("22k_1k", 224, 84.6, 84.582), ("22k_1k", 384, 85.8, 85.752),
    ),
    _v1(
        "base", (3, 3, 27, 3), 128, 88_591_464, 15.35,
        ("1k", 224, 83.8, 83.838), ("1k", 384, 85.1, None),
        ("22k_1k", 224, 85.8, 85.814), ("22k_1k", 384, 86.8, 86.826),
    ),
    _v1(
        "large", (3, 3, 27, 3), 192, 197_767_336, 34.36,
        ("1k", 224, 84.3, 84.304), ("1k", 384, 85.5, None),
        ("22k_1k", 224, 86.6, 86.612), ("22k_1k", 384, 87.5, 87.456),
    ),
    _v1(
        "xlarge", (3, 3, 27, 3), 256, 350_196_968, 60.92,
        ("22k_1k", 224, 87.0, 86.970), ("22k_1k", 384, 87.8, 87.764),
    ),
    _isotropic(
        "small", 18, 384, None, 22_308_712, 4.29, 79.7,
        "ConvNeXt Table 2 (the official README prints 78.7)",
    ),
    _isotropic("base", 18, 768, None, 87_083_752, 16.90, 82.0),
    _isotropic("large", 36, 1024, _LAYER_SCALE, 305_942_504, 59.70, 82.6),
    _v2(
        "atto", (2, 2, 6, 2), 40, 3_708_400, 0.55,
        ("1k", 224, 76.2, None), ("fcmae_1k", 224, 76.7, 76.644),
    ),
    _v2(
        "femto", (2, 2, 6, 2), 48, 5_233_240, 0.78,
        ("1k", 224, 78.0, None), ("fcmae_1k", 224, 78.5, 78.476),
    ),
    _v2(
        "pico", (2, 2, 6, 2), 64, 9_066_280, 1.37,
        ("1k", 224, 79.7, None), ("fcmae_1k", 224, 80.3, 80.304),
    ),
    _v2(
        "nano", (2, 2, 8, 2), 80, 15_623_800, 2.45,
        ("1k", 224, 81.2, None), ("fcmae_1k", 224, 81.9, 81.856),
        ("fcmae_22k_1k", 224, 82.1, 82.038), ("fcmae_22k_1k", 384, 83.4, 83.366),
    ),
    _v2(
        "tiny", (3, 3, 9, 3), 96, 28_635_496, 4.46,
        ("1k", 224, 82.5, None), ("fcmae_1k", 224, 83.0, 82.948),
        ("fcmae_22k_1k", 224, 83.9, 83.904), ("fcmae_22k_1k", 384, 85.1, 85.098),
    ),
    _v2("small", (3, 3, 27, 3), 96, 50_318_440, 8.68),
    _v2(
        "base", (3, 3, 27, 3), 128, 88_717_800, 15.35,
        ("1k", 224, 84.3, None), ("fcmae_1k", 224, 84.9, 84.890),
        ("fcmae_22k_1k", 224, 86.8, 86.752), ("fcmae_22k_1k", 384, 87.7, 87.638),
    ),
    _v2(
        "large", (3, 3, 27, 3), 192, 197_956_840, 34.36,
        ("1k", 224, 84.5, None), ("fcmae_1k", 224, 85.8, 85.762),
        ("fcmae_22k_1k", 224, 87.3, 87.266), ("fcmae_22k_1k", 384, 88.2, 88.180),
    ),
    _v2(
        "huge", (3, 3, 27, 3), 352, 660_289_640, 114.92,
        ("fcmae_1k", 224, 86.3, 86.260),
        ("fcmae_22k_1k", 384, 88.7, 88.666), ("fcmae_22k_1k", 512, 88.9, 88.860),
    ),
    _timm(
        "resnet50", "resnet50", (3, 4, 6, 3), _RESNET_DIMS,
        25_557_032, 4_089_184_256, 78.82, _RESNET_SOURCE, None,
    ),
    _timm(
        "resnet200", "resnet200", (3, 24, 36, 3), _RESNET_DIMS,
        64_673_832, 15_007_481_856, 81.14, _RESNET_SOURCE, None,
    ),
    _timm(
        "deit_small", "deit_small_patch16_224", (12,), (384,),
        22_050_664, 4_598_882_304, 79.8, _DEIT_SOURCE,
    ),
    _timm(
        "deit_base", "deit_base_patch16_224", (12,), (768,),
        86_567_656, 17_563_828_224, 81.8, _DEIT_SOURCE,
    ),
    _timm(
        "vit_small", "vit_small_patch16_224", (12,), (384,),
        22_050_664, 4_598_882_304, 79.8, _VIT_SOURCE,
    ),
    _timm(
        "vit_base", "vit_base_patch16_224", (12,), (768,),
        86_567_656, 17_563_828_224, 81.8, _VIT_SOURCE,
    ),
    _timm(
        "swin_tiny", "swin_tiny_patch4_window7_224", (2, 2, 6, 2), (96, 192, 384, 768),
        28_288_354, 4_490_566_656, 81.3, _SWIN_SOURCE,
    ),
    _timm(
        "swin_small", "swin_small_patch4_window7_224", (2, 2, 18, 2), (96, 192, 384, 768),
        49_606_258, 8_740_875_264, 83.0, _SWIN_SOURCE,
    ),
    _timm(
        "swin_base", "swin_base_patch4_window7_224", (2, 2, 18, 2), (128, 256, 512, 1024),
        87_768_224, 15_430_946_816, 83.5, _SWIN_SOURCE,
    ),
)  # fmt: skip

VARIANTS: Final[Mapping[str, Variant]] = MappingProxyType({each.name: each for each in _ALL})
"""Every variant by name, in the order in which they are listed."""
