"""Pointwise layers whose matrix products are in fp8, by torchao.

Each product casts its two sides to fp8 (activations and weights e4m3, gradients e5m2) with a scale
for each tensor, from the largest magnitude in that very tensor. Weights stay float32 parameters of
the same names, so that checkpoints, averages and optimizers notice nothing.

Error of one layer (512 to 2048 and 1536 to 6144 channels, normal inputs) in torchao's emulation,
as the norm of the difference from float32 over the norm: 0.037 in the output and 0.059 in both
gradients; of bf16 it is 0.003 (`tests/unit/models/test_fp8.py`).
"""

from torch import nn

from convnext_cli.catalog.models import takes_fp8
from convnext_cli.models.convnext import Block


def use_fp8(model: nn.Module, *, emulated: bool = False) -> int:
    """Let the wide pointwise layers of a ConvNeXt compute in fp8, in place; returns how many.

    Args:
        model: Holds `Block`s.
        emulated: Round to fp8, but multiply in the precision of the inputs: for devices without
            such arithmetic.
    """
    # Takes seconds, is an extra, and changes a part of torch's compiler when it is used.
    from torchao.float8 import (  # noqa: PLC0415
        Float8LinearConfig,
        convert_to_float8_training,
    )

    wide = {
        id(layer)
        for block in model.modules()
        if isinstance(block, Block) and takes_fp8(block.pwconv1.in_features)
        for layer in (block.pwconv1, block.pwconv2)
    }
    convert_to_float8_training(
        model,
        module_filter_fn=lambda module, _name: id(module) in wide,
        # The product for a weight's gradient runs over positions, whose number may be odd.
        config=Float8LinearConfig(pad_inner_dim=True, emulate=emulated),
    )
    return len(wide)
