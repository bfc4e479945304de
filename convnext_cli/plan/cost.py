"""What a training step keeps on each device, by strategy: arithmetic only, no torch.

```
        weights  gradients  optimizer  EMA     each in fp32, P parameters, S devices that share
ddp     4P       4P         8P         4P
fsdp    4P/S     4P/S       8P/S       4P/S
zero1   4P       4P         12P/S      4P      DeepSpeed steps on a second copy of the weights,
zero2   4P       4P/S       12P/S      4P      of which each device has its share
zero3   4P/S     4P/S       12P/S      4P/S
```

Gradients that accumulate over several passes stay whole under fsdp, so that nothing is exchanged
before the last pass. Buffers of a few layers, in which shares are put together, come on top.

Source: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054) section 5; runtime/zero of DeepSpeed 0.19
for its copy of fp32 weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never, get_args

from convnext_cli.catalog.models import (
    ISOTROPIC_RUN,
    Variant,
    count_kept,
    drop_fracs,
    estimate_block_macs,
)
from convnext_cli.catalog.ways import (
    PRODUCT_WIDTHS,
    WHOLE,
    count_grad_widths,
    count_kept_widths,
    list_ways,
)
from convnext_cli.recipe.schema import GradientCheckpointing, Precision, Strategy

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
CHECKPOINTING: tuple[GradientCheckpointing, ...] = get_args(GradientCheckpointing)

_FP32_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on each device under one strategy."""

    strategy: Strategy
    weights: int
    gradients: int
    optimizer: int
    averaged: int
    activations: int | None
    """What the backward pass needs of the forward pass; None where no estimate is known."""

    @property
    def state(self) -> int:
        """Everything but the activations."""
        return self.weights + self.gradients + self.optimizer + self.averaged

    @property
    def total(self) -> int:
        """With the activations, as far as they are known."""
        return self.state + (self.activations or 0)


def estimate_memory(
    strategy: Strategy,
    *,
    parameters: int,
    shards: int,
    averages: bool,
    accumulates: bool,
    activations: int | None,
) -> Memory:
    """Memory of one device.

    Args:
        strategy: What is shared.
        parameters: Of the network.
        shards: Devices that share; 1: every device holds everything, whatever the strategy.
        averages: Whether there are averaged weights.
        accumulates: Whether a step takes several passes.
        activations: Bytes of them on a device.
    """
    whole = parameters * _FP32_BYTES
    share = -(-whole // shards)
    weights = gradients = averaged = whole
    optimizer = 2 * whole
    if shards > 1:
        match strategy:
            case "ddp":
                pass
            case "fsdp":
                weights = averaged = share
                gradients = whole if accumulates else share
                optimizer = 2 * share
            case "zero1":
                optimizer = 3 * share
            case "zero2":
                gradients, optimizer = share, 3 * share
            case "zero3":
                weights = gradients = averaged = share
                optimizer = 3 * share
            case _:
                assert_never(strategy)
    return Memory(
        strategy=strategy,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        averaged=averaged if averages else 0,
        activations=activations,
    )


def block_images(variant: Variant, *, images: int, drop_path: float) -> tuple[int, ...]:
    """Images of a pass that each block's branch computes where it skips those that it drops."""
    fracs = drop_fracs(sum(variant.depths), drop_path=drop_path)
    return tuple(count_kept(images, drop_frac=frac) for frac in fracs)


def estimate_skipped_macs(
    variant: Variant, *, image_px: int, images: int, computed: Sequence[int]
) -> float:
    """Multiply-adds of a forward pass that an image is spared on average.

    Args:
        variant: A ConvNeXt.
        image_px: Side of an image.
        images: Images of one pass on one device.
        computed: Images of it that each block computes (`block_images`).
    """
    blocks = estimate_block_macs(variant, image_px=image_px)
    skipped = (images - kept for kept in computed)
    return sum(macs * left for macs, left in zip(blocks, skipped, strict=True)) / images


def estimate_activations(
    variant: Variant,
    *,
    image_px: int,
    images: int,
    parameters: int,
    precision: Precision,
    checkpointing: GradientCheckpointing,
    fused: bool = False,
    computed: Sequence[int] | None = None,
) -> int | None:
    """Bytes that a ConvNeXt keeps for the backward pass; None for other models.

    Without compilation, which keeps less. What autocast casts is kept, too: a copy of the weights,
    which no strategy shares.

    Args:
        variant: The architecture.
        image_px: Side of an image.
        images: Images of one pass on one device.
        parameters: Of the network.
        precision: fp32 keeps four bytes a value, the others two.
        checkpointing: What is computed again and so not kept, but for the piece at work: stages
            and blocks count its gradients, too.
        fused: Whether every block is computed in the most fused way that it has.
        computed: Images of the pass that each block computes (`block_images`); None: all.
    """
    if variant.family == "timm":
        return None
    side = image_px // (16 if variant.isotropic else 4)
    left = list(computed or [images] * sum(variant.depths))
    kept = most = images * 3 * image_px**2
    if not variant.isotropic:  # what the stem's LayerNorm takes
        kept += images * side**2 * variant.dims[0]
    ways = [list_ways(dim, grn=variant.grn)[-1 if fused else 0] for dim in variant.dims]
    for depth, dim, way in zip(variant.depths, variant.dims, ways, strict=True):
        values = side**2 * dim
        widths = count_kept_widths(
            way, grn=variant.grn, layer_scale=variant.layer_scale_init is not None
        )
        stage, left = left[:depth], left[depth:]
        at_work = 0
        # Where little else is kept, they weigh: of one block at a time.
        grad_widths = count_grad_widths(way, grn=variant.grn, half=precision != "fp32")
        grads = max(stage) * values * grad_widths
        match checkpointing:
            case "selective" if way not in WHOLE:
                kept += (depth * images + sum(stage) * PRODUCT_WIDTHS) * values
                at_work = max(stage) * values * (widths - PRODUCT_WIDTHS - 1)
            case "none" | "selective":
                kept += sum(stage) * values * widths
            case "stages":
                run = ISOTROPIC_RUN if variant.isotropic else depth
                runs = [stage[start : start + run] for start in range(0, depth, run)]
                kept += len(runs) * images * values
                at_work = max(map(sum, runs)) * values * widths + grads
            case "blocks":
                kept += depth * images * values
                at_work = max(stage) * values * widths + grads
            case _:
                assert_never(checkpointing)
        most = max(most, kept + at_work)  # in the backward pass, what later stages kept is free
        if dim != variant.dims[-1]:  # what the LayerNorm and the convolution of downsampling take
            kept += 2 * images * values
        side //= 2
    copied = parameters if precision != "fp32" else 0
    if precision == "fp32" and fused:  # LayerNorm's affine part is in a copy of the first matrix
        copied = sum(
            depth * 4 * dim**2 for depth, dim in zip(variant.depths, variant.dims, strict=True)
        )
    in_parts = ways[-1] not in WHOLE  # the last stage has most of the weights
    if checkpointing in {"stages", "blocks"} or (checkpointing == "selective" and in_parts):
        copied = 0
    return (most + copied) * (4 if precision == "fp32" else 2)


def explain_sharding(memories: tuple[Memory, ...], *, shards: int) -> str:
    """One sentence: whether sharing the state among devices is worth it."""
    by_name = {memory.strategy: memory for memory in memories}
    ddp, fsdp = by_name["ddp"], by_name["fsdp"]
    if shards == 1:
        return "one device has nobody to share with: all strategies are the same"
    saved = ddp.state - fsdp.state
    said = f"fsdp saves {saved / 1e9:.2f} of {ddp.total / 1e9:.2f} GB a device"
    if ddp.activations is None:
        return f"{said}, activations not counted"
    if ddp.activations > saved:
        return (
            f"{said}: most of it is activations, which a smaller batch.per_device_images or"
            " compute.gradient_checkpointing=selective reduces without exchanging weights"
        )
    return f"{said}: sharding pays where the rest fits and the whole does not"
