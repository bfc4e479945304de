"""The arithmetic of the roofline, against numbers that were worked out on their own."""

import pytest

from convnext_cli.bench.roofline import (
    AUTOCAST,
    DATA_SHEETS,
    FP32,
    NARROW,
    OP_LISTS,
    Floor,
    OpList,
    Rates,
    Widths,
    estimate_floor,
)
from convnext_cli.catalog.models import find_variant

# Measured on an H100 SXM: a copy, and bf16 products; fp32 by the data sheet.
H100 = Rates(copy_bytes=3.0e12, matmul_flops=790e12, fp32_flops=66.9e12)


def floor(
    model: str, ops: OpList, *, images: int = 128, image_px: int = 224, **changed: Rates | Widths
) -> Floor:
    widths = AUTOCAST if ops in {"eager", "compiler"} else NARROW
    found = estimate_floor(
        find_variant(model),
        ops=ops,
        image_px=image_px,
        images=images,
        num_classes=1000,
        **{"widths": widths, "rates": H100} | changed,
    )
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("model", "ops", "megabytes", "microseconds"),
    [
        ("tiny", "eager", 621, 213),
        ("tiny", "compiler", 392, 137),
        ("tiny", "fused", 205, 72.8),
        ("tiny", "best per stage", 133, 56.2),
        ("base", "eager", 1324, 480),
        ("base", "compiler", 845, 320),
        ("base", "fused", 443, 177),
        ("base", "best per stage", 370, 161),
        ("large", "eager", 2015, 805),
        ("large", "compiler", 1290, 563),
        ("large", "fused", 682, 341),
        ("large", "best per stage", 588, 329),
    ],
)
def test_floors_are_those_of_a_count_by_another_hand(model, ops, megabytes, microseconds):
    """The other count is of each operator of a block; it differs in the optimizer's casts."""
    found = floor(f"convnext_{model}", ops)

    assert found.bytes_per_image / 1e6 == pytest.approx(megabytes, rel=0.01)
    assert 1e6 / found.images_per_second == pytest.approx(microseconds, rel=0.01)
    assert sum(found.microseconds.values()) == pytest.approx(1e6 / found.images_per_second)


def test_products_are_three_times_those_of_the_forward_pass_and_a_fused_mlp_repeats_some():
    variant = find_variant("convnext_tiny")
    depthwise = 49 * sum(
        depth * dim * (56 >> stage) ** 2
        for stage, (depth, dim) in enumerate(zip(variant.depths, variant.dims, strict=True))
    )
    stem = 56**2 * 96 * 48
    products = variant.gmacs_224 * 1e9 - depthwise
    fused, best = floor(variant.name, "fused"), floor(variant.name, "best per stage")

    # The images have no gradient.
    assert fused.flops_per_image == pytest.approx(6 * products - 2 * stem, rel=2e-3)
    assert best.flops_per_image > fused.flops_per_image
    assert best.bytes_per_image < fused.bytes_per_image


@pytest.mark.parametrize("model", ["convnext_base", "convnextv2_tiny", "convnext_isotropic_large"])
def test_each_list_is_faster_than_the_one_before(model):
    speeds = [floor(model, ops).images_per_second for ops in OP_LISTS]

    assert speeds == sorted(speeds)
    assert speeds[0] < speeds[1] < speeds[2]


def test_grn_costs_passes_over_the_hidden_tensor_and_forbids_one_kernel_for_the_mlp():
    v1, v2 = (
        {ops: floor(f"{name}_tiny", ops) for ops in OP_LISTS} for name in ("convnext", "convnextv2")
    )
    values = 2_145_024  # of all block inputs of an image

    # Two passes to sum, one for norms, 4C wide in bf16; LayerScale's own reads go.
    more = v2["compiler"].bytes_per_image - v1["compiler"].bytes_per_image
    assert more / values == pytest.approx(2 * (4 + 8 + 8) - 2, rel=0.01)
    assert v2["best per stage"].microseconds == v2["fused"].microseconds
    assert v2["eager"].bytes_per_image > 2 * v1["eager"].bytes_per_image


def test_a_narrow_stream_needs_no_casts_and_fewer_bytes():
    wide, narrow = floor("convnext_tiny", "eager"), floor("convnext_tiny", "eager", widths=NARROW)

    assert wide.microseconds["copies"] > 0
    assert "copies" not in narrow.microseconds
    assert narrow.bytes_per_image < wide.bytes_per_image
    assert floor("convnext_tiny", "fused", widths=FP32).bytes_per_image == pytest.approx(
        2 * floor("convnext_tiny", "fused").bytes_per_image, rel=0.06
    )


def test_the_optimizer_is_shared_by_the_images_of_a_step():
    few, many = (floor("convnext_large", "fused", images=images) for images in (64, 128))

    assert few.microseconds["optimizer"] == pytest.approx(2 * many.microseconds["optimizer"])
    assert few.microseconds["matrix product"] == many.microseconds["matrix product"]


def test_without_an_fp32_rate_bytes_and_products_are_the_floor():
    bare = Rates(copy_bytes=3.0e12, matmul_flops=790e12)
    found = floor("convnext_tiny", "fused", rates=bare)

    # 4 and 10 bytes a value at 3 TB/s
    assert found.microseconds["depthwise forward"] == pytest.approx(2.145024e6 * 4 / 3e6)
    assert found.microseconds["depthwise input gradient"] == pytest.approx(2.145024e6 * 10 / 3e6)


def test_models_of_timm_have_no_floor():
    assert (
        estimate_floor(
            find_variant("resnet50"),
            ops="eager",
            image_px=224,
            images=8,
            num_classes=1000,
            widths=AUTOCAST,
            rates=H100,
        )
        is None
    )


def test_data_sheets_are_of_dense_products():
    assert DATA_SHEETS["NVIDIA H100 80GB HBM3"].bf16_flops_per_second == pytest.approx(989.4e12)
    for sheet in DATA_SHEETS.values():
        assert 2 <= sheet.bf16_flops_per_second / sheet.fp32_flops_per_second <= 16
