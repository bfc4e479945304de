"""The estimate of activations against what autograd really keeps."""

import gc

import pytest
import torch

from convnext_cli.bench.memory import find_peak
from convnext_cli.bench.trace import record_events
from convnext_cli.catalog.models import find_variant
from convnext_cli.models.convnext import build_convnext
from convnext_cli.plan.cost import block_images, estimate_activations

IMAGES = 4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("drop_path_kind", ["scale", "skip"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_nano", "convnext_isotropic_small"])
def test_activations_are_those_that_autograd_keeps(name, precision, drop_path_kind, fused):
    variant = find_variant(name)
    model = build_convnext(variant, num_classes=10, drop_path=0.6, drop_path_kind=drop_path_kind)
    if fused:
        model.use_ways([blocks[-1].ways()[-1] for blocks in model.list_stages()])
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    images = torch.rand(IMAGES, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        logits = model(images)

    assert logits.requires_grad
    assert estimate_activations(
        variant,
        image_px=64,
        images=IMAGES,
        parameters=sum(weight.numel() for weight in model.parameters()),
        precision=precision,
        checkpointing="none",
        fused=fused,
        computed=block_images(variant, images=IMAGES, drop_path=0.6)
        if drop_path_kind == "skip"
        else None,
    ) == pytest.approx(sum(value.untyped_storage().nbytes() for value in kept.values()), rel=0.05)


@pytest.mark.parametrize("drop_path_kind", ["scale", "skip"])
@pytest.mark.parametrize(
    ("name", "fused"),
    [
        *(("convnext_tiny", False), ("convnext_isotropic_small", False)),
        *(("convnextv2_nano", False), ("convnextv2_nano", True)),
    ],
)
def test_selective_checkpointing_leaves_what_is_said_of_each_image(name, fused, drop_path_kind):
    variant = find_variant(name)
    model = build_convnext(
        variant,
        num_classes=10,
        drop_path=0.6,
        drop_path_kind=drop_path_kind,
        gradient_checkpointing="selective",
    )
    if fused:
        model.use_ways([blocks[-1].ways()[-1] for blocks in model.list_stages()])

    def measure(count: int) -> int:
        gc.collect()
        images = torch.rand(count, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        kept: list[torch.Tensor] = []

        def run() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(images)
            assert logits.requires_grad
            kept.append(logits)  # with all that it keeps

        events = record_events(run, memory=True)
        memory = [event for event in events if event["name"] == "[memory]"]
        return sum(event["args"]["Bytes"] for event in memory)

    def estimate(count: int) -> int:
        return estimate_activations(
            variant,
            image_px=64,
            images=count,
            parameters=0,
            precision="bf16",
            checkpointing="selective",
            fused=fused,
            computed=block_images(variant, images=count, drop_path=0.6)
            if drop_path_kind == "skip"
            else None,
        )

    said = estimate(3 * IMAGES) - estimate(IMAGES)
    assert said == pytest.approx(measure(3 * IMAGES) - measure(IMAGES), rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["stages", "blocks"])
def test_what_is_computed_again_takes_what_is_said_of_each_image(checkpointing, precision):
    """With GRN, whose gradients are float32: in half precision they weigh more than all else."""
    variant = find_variant("convnextv2_atto")
    model = build_convnext(variant, num_classes=10, gradient_checkpointing=checkpointing)

    def measure(count: int) -> int:
        images = torch.rand(count, 3, 96, 96).contiguous(memory_format=torch.channels_last)

        def run() -> None:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = model(images).sum()
            loss.backward()

        return find_peak(record_events(run, memory=True))

    def estimate(count: int) -> int:
        return estimate_activations(
            variant,
            image_px=96,
            images=count,
            parameters=0,
            precision=precision,
            checkpointing=checkpointing,
        )

    measure(2)  # gradients of weights are there from now on
    images = 3 * 96 * 96 * 4 * 16  # stand outside of what is measured, and are no autocast's
    said = estimate(32) - estimate(16) - (images if precision == "fp32" else images // 2)
    assert said == pytest.approx(measure(32) - measure(16), rel=0.08)
