"""Memory of a device by strategy: the arithmetic of sharing, and the advice."""

import dataclasses

import pytest

from convnext_cli.catalog.models import estimate_macs, find_variant
from convnext_cli.plan.cost import (
    STRATEGIES,
    Memory,
    block_images,
    estimate_activations,
    estimate_memory,
    estimate_skipped_macs,
    explain_sharding,
)


def memory_of(strategy, *, shards=4, averages=True, accumulates=False, activations=0) -> Memory:
    return estimate_memory(
        strategy,
        parameters=1000,
        shards=shards,
        averages=averages,
        accumulates=accumulates,
        activations=activations,
    )


@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [
        ("ddp", (4000, 4000, 8000, 4000)),
        ("fsdp", (1000, 1000, 2000, 1000)),
        ("zero1", (4000, 4000, 3000, 4000)),
        ("zero2", (4000, 1000, 3000, 4000)),
        ("zero3", (1000, 1000, 3000, 1000)),
    ],
)
def test_each_strategy_shares_what_its_name_says(strategy, sizes):
    memory = memory_of(strategy)

    assert (memory.weights, memory.gradients, memory.optimizer, memory.averaged) == sizes
    assert memory.state == sum(sizes)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_device_holds_everything(strategy):
    alone = memory_of(strategy, shards=1)

    assert alone == dataclasses.replace(memory_of("ddp"), strategy=strategy)


def test_gradients_that_accumulate_stay_whole_under_fsdp_alone():
    assert memory_of("fsdp", accumulates=True).gradients == 4000
    assert memory_of("zero3", accumulates=True).gradients == 1000


def test_without_averages_nothing_is_kept_for_them():
    assert memory_of("ddp", averages=False).state == 16_000


def test_a_share_that_does_not_divide_is_rounded_up():
    assert memory_of("fsdp", shards=3).weights == 1334


def activations(name: str, **changed) -> int | None:
    asked = {
        "image_px": 224, "images": 8, "parameters": 0, "precision": "fp32", "checkpointing": "none",
    }  # fmt: skip
    return estimate_activations(find_variant(name), **asked | changed)


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_base", "convnext_isotropic_small"])
def test_activations_grow_with_images_and_shrink_where_they_are_computed_again(name):
    whole = activations(name)

    assert activations(name, images=16) == 2 * whole
    assert activations(name, precision="bf16") == whole / 2
    assert activations(name, checkpointing="blocks") < activations(name, checkpointing="stages")
    assert activations(name, checkpointing="stages") < whole
    assert activations(name, checkpointing="selective") < 0.7 * whole


def test_of_a_base_that_computes_blocks_again_a_gpu_takes_what_is_said():
    # Measured on an H200 on 2026-11-26, torch 2.11: peaks of 50 steps of 32 images, DDP in bf16.
    parameters = 87_576_714

    def total(checkpointing: str) -> int:
        return 20 * parameters + activations(
            "convnext_base",
            images=32, parameters=parameters, precision="bf16", checkpointing=checkpointing,
        )  # fmt: skip

    assert total("none") == pytest.approx(5.365 * 2**30, rel=0.05)
    assert total("blocks") == pytest.approx(2.324 * 2**30, rel=0.1)


def test_selective_checkpointing_leaves_blocks_in_kernels_as_they_are():
    fused = activations("convnext_tiny", fused=True)

    assert activations("convnext_tiny", fused=True, checkpointing="selective") == fused
    assert fused < activations("convnext_tiny", checkpointing="selective")


def test_skipping_keeps_the_share_of_the_images_that_blocks_compute():
    tiny = find_variant("convnext_tiny")
    computed = block_images(tiny, images=8, drop_path=0.5)

    assert computed == (8, 8, 8, 7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4)
    assert block_images(tiny, images=8, drop_path=0.0) == (8,) * 18
    whole, skipped = activations("convnext_tiny"), activations("convnext_tiny", computed=computed)
    left_out = {(56, 96): 0, (28, 192): 3, (14, 384): 1 + 4 * 2 + 4 * 3, (7, 768): 3 * 4}
    values = sum(side**2 * dim * images for (side, dim), images in left_out.items())
    assert whole - skipped == values * 12 * 4


@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_isotropic_small"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "stages", "blocks"])
def test_skipping_nothing_keeps_what_is_kept_without(name, checkpointing):
    blocks = sum(find_variant(name).depths)

    assert activations(name, checkpointing=checkpointing, computed=(8,) * blocks) == activations(
        name, checkpointing=checkpointing
    )


def test_skipped_work_is_that_of_the_images_left_out():
    base = find_variant("convnext_base")
    macs = estimate_macs(base, image_px=224, num_classes=1000)

    half = estimate_skipped_macs(base, image_px=224, images=128, computed=(64,) * 36)
    recipe = estimate_skipped_macs(
        base,
        image_px=224,
        images=128,
        computed=block_images(base, images=128, drop_path=0.5),
    )

    # All but stem, downsampling and head are blocks: 98% of ConvNeXt-B.
    assert half / macs == pytest.approx(0.489, abs=0.001)
    # The mean drop rate is half of the last block's.
    assert recipe / macs == pytest.approx(0.24, abs=0.005)


def test_autocast_keeps_a_copy_of_the_weights():
    less = activations("convnext_tiny", precision="bf16")

    assert activations("convnext_tiny", precision="bf16", parameters=1000) == less + 2000


def test_other_models_have_no_estimate():
    assert activations("resnet50") is None


@pytest.mark.parametrize(
    ("shards", "size", "said"),
    [
        (1, 0, "one device has nobody to share with"),
        (4, None, "fsdp saves 0.00 of 0.00 GB a device, activations not counted"),
        (4, 10**6, "most of it is activations"),
        (4, 10, "sharding pays"),
    ],
)
def test_the_advice_follows_what_weighs_most(shards, size, said):
    memories = tuple(memory_of(name, shards=shards, activations=size) for name in STRATEGIES)

    assert said in explain_sharding(memories, shards=shards)
