"""The least time that a training step can take on a device: bytes and FLOPs alone, no torch.

```
kernel   max(bytes / copy bandwidth, matrix FLOPs / matrix rate, other FLOPs / fp32 rate)
model    the sum over the kernels of an operator list: blocks, stem, downsampling, head, optimizer
```

Operator lists say which kernels a step consists of, each one perfect:

- `eager`: every operator a kernel of its own, as timm runs under autocast.
- `compiler`: what Inductor fuses: pointwise work in one kernel, products and convolutions apart.
- `fused`: epilogues and prologues within the products, LayerNorm within the depthwise kernels.
- `best per stage`: the fastest for each stage of `fused`; one kernel for the MLP whose backward
  pass computes the hidden tensor again; and one kernel for each direction of it, which never
  writes the hidden tensor. GRN needs a sum over positions between the two products, so that V2 has
  `fused` alone.

Widths: a tensor of a block's input size, images x positions x C values, is the unit; the hidden
one, 4C wide, is four. Under autocast `narrow` tensors have 2 bytes a value and `wide` ones, the
stream between blocks and what LayerNorm reads and writes in timm, have 4. Where both are the same,
casts are no work. Weights of the products are not counted with them: at 128 images a tenth of a
percent.

Source: byte counts derived from facebookresearch/ConvNeXt@048efce models/convnext.py and timm 1.0
models/convnext.py, and from what Inductor writes for them; data sheets as named below.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, Self, assert_never

from convnext_cli.bench.operators import OperatorClass
from convnext_cli.catalog.models import Variant, count_parameters

OpList = Literal["eager", "compiler", "fused", "best per stage"]
OP_LISTS: Final[tuple[OpList, ...]] = ("eager", "compiler", "fused", "best per stage")

_Form = Literal["eager", "compiler", "fused", "recomputed", "unwritten"]
_FORMS: Final[Mapping[OpList, tuple[_Form, ...]]] = MappingProxyType(
    {
        "eager": ("eager",),
        "compiler": ("compiler",),
        "fused": ("fused",),
        "best per stage": ("fused", "recomputed", "unwritten"),
    }
)

_DEPTHWISE: Final = 2 * 7 * 7
_GELU, _GELU_GRAD = 4 * 25, 4 * 40
"""fp32 operations of the exact GELU and of its derivative, four hidden values an input value."""
_NORM, _NORM_GRAD = 8, 16
_SLICE = 128
"""Hidden channels that one program of an unwritten weight gradient holds. Four programs read the
same inputs at about the same time, so that three of them find them in the cache."""

_OPTIMIZER_BYTES: Final[Mapping[_Form, int]] = MappingProxyType(
    {"eager": 52, "compiler": 52, "fused": 36}
)
"""A parameter: AdamW reads four fp32 values and writes three (28), averaging reads two and writes
one (12), autocast copies the weight and its gradient (2 x 6); in one kernel, without the copies,
five are read and four written (36)."""


@dataclass(frozen=True)
class DataSheet:
    """What a vendor promises of a device."""

    bf16_flops_per_second: float
    """Dense, fp32 sums."""
    fp32_flops_per_second: float
    """Without tensor cores."""


# By the name that the driver gives. Source: NVIDIA's data sheets of H100, H200, A100 and L40S, half
# of what they print "with sparsity"; for the RTX 4090 its Ada architecture white paper, appendix A.
_H100_SXM = DataSheet(989.4e12, 66.9e12)
_A100 = DataSheet(312e12, 19.5e12)
DATA_SHEETS: Final[Mapping[str, DataSheet]] = MappingProxyType(
    {
        "NVIDIA H100 80GB HBM3": _H100_SXM,
        "NVIDIA H100 PCIe": DataSheet(756e12, 51.2e12),
        "NVIDIA H200": _H100_SXM,
        "NVIDIA A100-SXM4-40GB": _A100,
        "NVIDIA A100-SXM4-80GB": _A100,
        "NVIDIA A100-PCIE-40GB": _A100,
        "NVIDIA A100 80GB PCIe": _A100,
        "NVIDIA L40S": DataSheet(362e12, 91.6e12),
        "NVIDIA GeForce RTX 4090": DataSheet(165.2e12, 82.6e12),
    }
)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second."""

    copy_bytes: float
    """Read and written."""
    matmul_flops: float
    fp32_flops: float = math.inf
    """Not known: such work is taken to cost nothing beside its bytes."""


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Bytes of a value."""

    narrow: int
    wide: int


AUTOCAST: Final = Widths(narrow=2, wide=4)
"""bf16 with the stream between blocks in fp32, as timm's and torchvision's promote it."""
NARROW: Final = Widths(narrow=2, wide=2)
"""bf16 throughout, as this project keeps the stream."""
FP32: Final = Widths(narrow=4, wide=4)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least that a training step moves, computes and takes, an image."""

    ops: OpList
    bytes_per_image: float
    flops_per_image: float
    """Of matrix products as the list has them, recomputation included; no other work."""
    images_per_second: float
    """The most that the device can take."""
    microseconds: Mapping[OperatorClass, float]
    """By operator class; a fused kernel counts with its main work."""


@dataclass(frozen=True)
class _Kernel:
    """One kernel's work a value of its tensor."""

    kind: OperatorClass
    narrow: float
    """Tensors read and written."""
    wide: float = 0
    fp32: float = 0
    """FLOPs but those of matrix products."""
    matmul: float = 0
    """FLOPs of matrix products, in units of C."""
    cast: bool = False


_FORWARD: Final[OperatorClass] = "depthwise forward"
_INPUT_GRAD: Final[OperatorClass] = "depthwise input gradient"
_WEIGHT_GRAD: Final[OperatorClass] = "depthwise weight gradient"
_PRODUCT: Final[OperatorClass] = "matrix product"
_LAYER_NORM: Final[OperatorClass] = "normalisation"
_POINTWISE: Final[OperatorClass] = "elementwise"
_MLP: Final[OperatorClass] = "fused MLP"

_GEMM: Final = _Kernel(_PRODUCT, 5, matmul=8)
_CAST: Final = _Kernel("copies", 1, 1, cast=True)
_CAST_HIDDEN: Final = _Kernel("copies", 4, 4, cast=True)
_CONVOLVE: Final = _Kernel(_FORWARD, 2, fp32=_DEPTHWISE)
_CONVOLVE_GRADS: Final = (
    _Kernel(_INPUT_GRAD, 2, fp32=_DEPTHWISE),
    _Kernel(_WEIGHT_GRAD, 2, fp32=_DEPTHWISE),
    _Kernel(_POINTWISE, 1, fp32=1),  # of the bias
)
_FUSED_CONVOLVE: Final = _Kernel(_FORWARD, 2, fp32=_DEPTHWISE + _NORM)
_FUSED_CONVOLVE_GRADS: Final = _Kernel(_INPUT_GRAD, 5, fp32=2 * _DEPTHWISE + 8)
"""Both gradients, LayerNorm's and the sum with the residual's, in one pass."""


def _pointwise(narrow: float, wide: float, fp32: float = 1) -> _Kernel:
    return _Kernel(_POINTWISE, narrow, wide, fp32)


def _iter_eager(*, scale: bool, grn: bool) -> Iterator[_Kernel]:
    yield from (_CAST, _CONVOLVE, _CAST, _Kernel(_LAYER_NORM, 0, 2, 8), _CAST)
    yield from (_GEMM, _pointwise(8, 0, _GELU))
    if grn:  # as timm writes it: norm, x * share, addcmul, sum
        yield from (_CAST_HIDDEN, _Kernel(_LAYER_NORM, 0, 4, 8))
        yield from (_pointwise(4, 4), _pointwise(0, 8), _pointwise(4, 8), _CAST_HIDDEN)
    yield _GEMM
    if scale:
        yield _pointwise(1, 1)
    yield from (_pointwise(0, 2), _pointwise(0, 3))  # drop path, sum
    yield _pointwise(0, 2)  # drop path
    if scale:  # of the branch, and of the factor: product and sum
        yield from (_pointwise(0, 2), _CAST, _pointwise(1, 2), _pointwise(0, 1))
    else:
        yield _CAST
    yield from (_pointwise(1, 0), _GEMM, _GEMM)
    if grn:  # factor and shift, x * share, x, share, norm, and the sum of three gradients
        yield _CAST_HIDDEN
        yield from (_pointwise(0, 12), _pointwise(0, 4), _pointwise(0, 4), _pointwise(0, 8))
        yield from (_pointwise(0, 8), _pointwise(4, 8), _pointwise(0, 4))
        yield _Kernel(_LAYER_NORM, 0, 8, 8)
        yield from (_CAST_HIDDEN, _CAST_HIDDEN, _CAST_HIDDEN, _pointwise(24, 0))
    yield from (_pointwise(12, 0, _GELU_GRAD), _pointwise(4, 0, 4), _GEMM, _GEMM)
    yield from (_CAST, _Kernel(_LAYER_NORM, 0, 3, 12), _Kernel(_LAYER_NORM, 0, 2, 4), _CAST)
    yield from (*_CONVOLVE_GRADS, _CAST, _pointwise(0, 3))


def _iter_compiler(*, scale: bool, grn: bool) -> Iterator[_Kernel]:
    yield from (_CONVOLVE, _Kernel(_LAYER_NORM, 2, 0, 8), _GEMM)
    if grn:  # norms in a pass of their own
        yield _Kernel(_LAYER_NORM, 4, 0, _GELU + 8)
    yield from (_pointwise(8, 0, _GELU), _GEMM)
    # LayerScale, drop path and sum, and a narrow copy for the next convolution
    yield from (_pointwise(1, 2, 3), _Kernel(_POINTWISE, 1, cast=True))
    yield _pointwise(2 if scale else 1, 1, 3)
    yield from (_pointwise(1, 0), _GEMM, _GEMM)
    if grn:  # sums over the positions of an image, then over all for factor and shift
        yield from (_Kernel(_LAYER_NORM, 8, 0, _GELU + 8), _Kernel(_LAYER_NORM, 8, 0, _GELU + 16))
    yield from (_pointwise(12, 0, _GELU_GRAD), _pointwise(4, 0, 4), _GEMM, _GEMM)
    yield from (_Kernel(_LAYER_NORM, 3, 0, 12), _Kernel(_LAYER_NORM, 2, 0, 4))
    yield from (*_CONVOLVE_GRADS, _pointwise(1, 2))


def _iter_fused(*, grn: bool) -> Iterator[_Kernel]:
    yield from (_FUSED_CONVOLVE, _Kernel(_PRODUCT, 5, 0, _GELU, 8))
    yield _Kernel(_PRODUCT, 6, 0, 3, 8)  # GELU or GRN on the way in, LayerScale and sum after it
    if grn:  # its sums come out of the product, so that GELU's gradient waits for them
        yield from (_Kernel(_PRODUCT, 9, 0, _GELU, 8), _Kernel(_LAYER_NORM, 12, 0, _GELU_GRAD))
    else:
        yield _Kernel(_PRODUCT, 9, 0, _GELU_GRAD, 8)
    yield _Kernel(_PRODUCT, 5, 0, _GELU, 8)
    yield from (_Kernel(_PRODUCT, 6, 0, 8, 8), _GEMM, _FUSED_CONVOLVE_GRADS)


def _iter_recomputed() -> Iterator[_Kernel]:
    yield from (_FUSED_CONVOLVE, _Kernel(_MLP, 3, 0, _GELU + 3, 16))
    yield from (_Kernel(_MLP, 10, 0, _GELU_GRAD, 16), _GEMM, _Kernel(_PRODUCT, 6, 0, 8, 8), _GEMM)
    yield _FUSED_CONVOLVE_GRADS


def _iter_unwritten(dim: int) -> Iterator[_Kernel]:
    reads = 2 * max(1.0, 4 * dim / _SLICE / 4)
    yield from (_FUSED_CONVOLVE, _Kernel(_MLP, 3, 0, _GELU + 3, 16))
    yield from (_Kernel(_MLP, 4, 0, _GELU_GRAD, 24), _Kernel(_MLP, reads, 0, _GELU_GRAD, 32))
    yield _FUSED_CONVOLVE_GRADS


def _iter_block(form: _Form, variant: Variant, dim: int) -> Iterator[_Kernel]:
    scale, grn = variant.layer_scale_init is not None, variant.grn
    match form:
        case "eager":
            return _iter_eager(scale=scale, grn=grn)
        case "compiler":
            return _iter_compiler(scale=scale, grn=grn)
        case "fused":
            return _iter_fused(grn=grn)
        case "recomputed":
            return _iter_recomputed()
        case "unwritten":
            return _iter_unwritten(dim)
        case _:
            assert_never(form)


def _iter_stem(form: _Form) -> Iterator[_Kernel]:
    """LayerNorm after the stem, forward and backward, a value of its output."""
    match form:
        case "eager":
            yield from (_CAST, _Kernel(_LAYER_NORM, 0, 2, _NORM))
            yield from (_Kernel(_LAYER_NORM, 0, 3, 12), _Kernel(_LAYER_NORM, 0, 2, 4), _CAST)
        case "compiler":
            yield from (_Kernel(_LAYER_NORM, 1, 1, _NORM), _Kernel("copies", 1, cast=True))
            yield _Kernel(_LAYER_NORM, 3, 1, _NORM_GRAD)
        case _:
            yield _Kernel(_LAYER_NORM, 1, 0, _NORM_GRAD)  # the rest within the convolutions


def _iter_downsampling(form: _Form) -> Iterator[_Kernel]:
    """LayerNorm before a downsampling convolution, a value of its input."""
    match form:
        case "eager":
            yield from (_CAST, _Kernel(_LAYER_NORM, 0, 2, _NORM), _CAST)
            yield from (_CAST, _Kernel(_LAYER_NORM, 0, 3, 12), _Kernel(_LAYER_NORM, 0, 2, 4), _CAST)
        case "compiler":
            yield from (_Kernel(_LAYER_NORM, 1, 1, _NORM), _Kernel(_LAYER_NORM, 2, 2, _NORM_GRAD))
        case _:
            yield from (_Kernel(_LAYER_NORM, 2, 0, _NORM), _Kernel(_LAYER_NORM, 3, 0, _NORM_GRAD))


@dataclass
class _Sum:
    """Adds kernels up."""

    rates: Rates
    widths: Widths
    moved_bytes: float = 0
    matmul_flops: float = 0
    seconds: dict[OperatorClass, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def add(self, kind: OperatorClass, moved: float, matmul: float = 0, fp32: float = 0) -> None:
        """A kernel by its bytes and FLOPs."""
        rates = self.rates
        seconds = max(
            moved / rates.copy_bytes, matmul / rates.matmul_flops, fp32 / rates.fp32_flops
        )
        self.moved_bytes += moved
        self.matmul_flops += matmul
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def add_kernels(self, kernels: Iterable[_Kernel], *, values: float, dim: int) -> None:
        """Kernels over tensors of so many values, `dim` channels wide."""
        for kernel in kernels:
            if kernel.cast and self.widths.narrow == self.widths.wide:
                continue
            width = kernel.narrow * self.widths.narrow + kernel.wide * self.widths.wide
            work = (kernel.matmul * dim * values, kernel.fp32 * values)
            self.add(kernel.kind, width * values, *work)

    def merge(self, other: Self) -> None:
        """All of another sum."""
        self.moved_bytes += other.moved_bytes
        self.matmul_flops += other.matmul_flops
        for kind, seconds in other.seconds.items():
            self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds


def estimate_floor(
    variant: Variant,
    *,
    ops: OpList,
    image_px: int,
    images: int,
    num_classes: int,
    widths: Widths,
    rates: Rates,
) -> Floor | None:
    """The floor of a training step with AdamW and averaged weights; None for models of timm's.

    Args:
        variant: The architecture.
        ops: What is a kernel of its own.
        image_px: Side of an image.
        images: In a step, over which the optimizer's work is spread.
        num_classes: Outputs of the head.
        widths: Bytes of a value.
        rates: Of the device.
    """
    if variant.family == "timm":
        return None
    forms = _FORMS[ops][:1] if variant.grn else _FORMS[ops]
    total = _Sum(rates, widths)
    stem_px = 16 if variant.isotropic else 4
    side = image_px // stem_px
    narrow = widths.narrow
    pixels, before = 3.0 * image_px**2, 0.0
    for stage, (depth, dim) in enumerate(zip(variant.depths, variant.dims, strict=True)):
        if stage:
            total.add_kernels(_iter_downsampling(forms[0]), values=before, dim=dim)
            side //= 2
        values = float(side**2 * dim)
        inputs, patch = (before, 4 * variant.dims[stage - 1]) if stage else (pixels, 3 * stem_px**2)
        for _ in range(3 if stage else 2):  # forward, weights, inputs; images have no gradient
            total.add(_PRODUCT, (inputs + values) * narrow, 2.0 * patch * values)
        if not stage and not variant.isotropic:
            total.add_kernels(_iter_stem(forms[0]), values=values, dim=dim)
        sums = []
        for form in forms:
            sums.append(_Sum(rates, widths))
            sums[-1].add_kernels(_iter_block(form, variant, dim), values=depth * values, dim=dim)
        total.merge(min(sums, key=lambda each: each.total))
        before = values
    total.add(_POINTWISE, 2 * before * widths.wide)  # mean over positions, and back
    total.add(_PRODUCT, 0, 3 * 2.0 * variant.dims[-1] * num_classes)
    parameters = count_parameters(variant, num_classes=num_classes)
    total.add("optimizer", parameters * _OPTIMIZER_BYTES[forms[0]] / images)
    return Floor(
        ops=ops,
        bytes_per_image=total.moved_bytes,
        flops_per_image=total.matmul_flops,
        images_per_second=1 / total.total,
        microseconds={kind: seconds * 1e6 for kind, seconds in total.seconds.items()},
    )
