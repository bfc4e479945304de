"""The ways in which a ConvNeXt block can be computed, for which widths, and what each keeps.

| way | what it is |
|---|---|
| plain | PyTorch's operators, one by one or compiled |
| positions | convolution, LayerNorm, GELU and GRN in kernels of this project, the rest plain |
| kept | the whole block in such kernels; its hidden units are kept for the backward pass |
| recomputed | the same, and the hidden units are computed again: more arithmetic, fewer bytes |
"""

from typing import Literal, assert_never

Way = Literal["plain", "positions", "kept", "recomputed"]

WHOLE: frozenset[Way] = frozenset({"kept", "recomputed"})
"""Ways that make a block one operator, which chooses by itself what it computes again."""

PRODUCT_WIDTHS = 6
"""Values a position, in units of the width, that convolution and products give: 1, 4 and 1."""

NARROWEST = 32
"""A width in kernels for the tensor cores is a multiple of this."""

WIDEST_RECOMPUTED = 256
"""Widths up to which a program has room for whole rows. Above, the products are bound by arithmetic
anyway, and computing them twice would cost more than the bytes."""


def list_ways(dim: int, *, grn: bool) -> tuple[Way, ...]:
    """The ways of a block of `dim` channels, the most fused one last.

    GRN needs all hidden units of an image before the second product, which so cannot be fused.
    """
    ways: tuple[Way, ...] = ("plain", "positions")
    if grn or dim % NARROWEST:
        return ways
    return (*ways, "kept") if dim > WIDEST_RECOMPUTED else (*ways, "kept", "recomputed")


def count_kept_widths(way: Way, *, grn: bool, layer_scale: bool) -> int:
    """Values a position that a block keeps for its backward pass, in units of its width.

    Plain: the inputs of dwconv, norm and pwconv1 (3), of GELU and pwconv2 (8), of GRN (4) and of
    LayerScale (1). Positions: no input of norm or GRN, and LayerScale is in the weights. The whole
    block in kernels: its input and the normalised one (2), and the hidden units before GELU (4).
    """
    match way:
        case "plain":
            return 11 + 4 * grn + layer_scale
        case "positions":
            return 10
        case "kept":
            return 6
        case "recomputed":
            return 2
        case _:
            assert_never(way)


def count_grad_widths(way: Way, *, grn: bool, half: bool) -> int:
    """Values a position of a block's gradients that there are at once, in units of its width.

    Of its output (1), and: plain or in part, what pwconv2 gave (1), and what it and GRN, where it
    is apart, took (4 each); kept, the hidden units' and GELU once more (8); recomputed, what
    LayerNorm gave (1). GRN apart makes them in float32, which in half precision are three more
    tensors of twice the hidden units (24), else one (4).
    """
    match way:
        case "plain":
            return 6 + grn * (28 if half else 8)
        case "positions":
            return 6
        case "kept":
            return 9
        case "recomputed":
            return 2
        case _:
            assert_never(way)
