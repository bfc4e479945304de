"""Counts that the papers print, and how variants are found."""

import pytest

from convnext_cli.catalog.models import (
    VARIANTS,
    count_parameters,
    estimate_macs,
    find_architecture,
    find_variant,
)
from convnext_cli.errors import RecipeError

CONVNEXT = [variant for variant in VARIANTS.values() if variant.family != "timm"]
COMPARISON = [variant for variant in VARIANTS.values() if variant.family == "timm"]

HEADS = {
    "convnext_tiny": (28_589_128, 44_615_857),
    "convnext_small": (50_223_688, 66_250_417),
    "convnext_base": (88_591_464, 109_953_489),
    "convnext_large": (197_767_336, 229_799_953),
    "convnext_xlarge": (350_196_968, 392_900_177),
    "convnextv2_atto": (3_708_400, 10_398_361),
    "convnextv2_femto": (5_233_240, 13_257_025),
    "convnextv2_pico": (9_066_280, 19_757_713),
    "convnextv2_nano": (15_623_800, 28_982_881),
    "convnextv2_tiny": (28_635_496, 44_662_225),
    "convnextv2_small": (50_318_440, 66_345_169),
    "convnextv2_base": (88_717_800, 110_079_825),
    "convnextv2_large": (197_956_840, 229_989_457),
    "convnextv2_huge": (660_289_640, 718_998_737),
}

GMACS = {
    "convnext_tiny": {224: 4.46, 288: 7.36, 384: 13.09},
    "convnext_small": {224: 8.68, 288: 14.35, 384: 25.52},
    "convnext_base": {224: 15.35, 288: 25.38, 384: 45.12},
    "convnext_large": {224: 34.36, 288: 56.80, 384: 100.98},
    "convnext_xlarge": {224: 60.92, 288: 100.70, 384: 179.03},
    "convnext_isotropic_small": {224: 4.29},
    "convnext_isotropic_base": {224: 16.90},
    "convnext_isotropic_large": {224: 59.70},
    "convnextv2_atto": {224: 0.55, 384: 1.61, 512: 2.86},
    "convnextv2_femto": {224: 0.78, 384: 2.29, 512: 4.07},
    "convnextv2_pico": {224: 1.37, 384: 4.02, 512: 7.14},
    "convnextv2_nano": {224: 2.45, 384: 7.19, 512: 12.77},
    "convnextv2_tiny": {224: 4.46, 384: 13.09, 512: 23.27},
    "convnextv2_small": {224: 8.68, 384: 25.52, 512: 45.36},
    "convnextv2_base": {224: 15.35, 384: 45.12, 512: 80.22},
    "convnextv2_large": {224: 34.36, 384: 100.98, 512: 179.51},
    "convnextv2_huge": {224: 114.92, 384: 337.72, 512: 600.40},
}


@pytest.mark.parametrize("name", HEADS)
def test_parameters_with_both_published_heads_are_exact(name):
    variant = find_variant(name)

    counts = tuple(count_parameters(variant, num_classes=classes) for classes in (1000, 21_841))

    assert counts == HEADS[name]


@pytest.mark.parametrize("variant", CONVNEXT, ids=lambda variant: variant.name)
def test_stored_sizes_are_what_the_arithmetic_gives(variant):
    assert count_parameters(variant, num_classes=1000) == variant.parameters_1k
    macs = estimate_macs(variant, image_px=224, num_classes=1000)
    assert round(macs / 1e9, 2) == variant.gmacs_224


@pytest.mark.parametrize("name", GMACS)
def test_gmacs_agree_to_two_decimals_at_every_published_size(name):
    counted = {
        px: round(estimate_macs(find_variant(name), image_px=px, num_classes=1000) / 1e9, 2)
        for px in GMACS[name]
    }

    assert counted == GMACS[name]


def test_another_head_changes_macs_by_its_own_size():
    variant = find_variant("resnet50")

    at_1k = estimate_macs(variant, image_px=224, num_classes=1000)
    at_22k = estimate_macs(variant, image_px=224, num_classes=21_841)

    assert at_1k == 4_089_184_256
    assert at_22k - at_1k == 2048 * 20_841


def test_a_resnet_costs_four_times_as_much_at_twice_the_side():
    variant = find_variant("resnet50")

    small = estimate_macs(variant, image_px=224, num_classes=1000) - 2_048_000
    large = estimate_macs(variant, image_px=448, num_classes=1000) - 2_048_000

    assert large == 4 * small


def test_a_model_of_one_size_refuses_another():
    with pytest.raises(RecipeError, match="swin_tiny takes images of 224 px only, not 384 px"):
        estimate_macs(find_variant("swin_tiny"), image_px=384, num_classes=1000)


def test_a_misspelt_model_is_answered_with_the_nearest_and_all_names():
    with pytest.raises(
        RecipeError, match="'convnext_tinny'; the nearest name is 'convnext_tiny'"
    ) as e:
        find_variant("convnext_tinny")

    assert e.value.hint is not None
    assert all(name in e.value.hint for name in VARIANTS)


def test_every_convnext_is_found_by_its_shape():
    for variant in CONVNEXT:
        found = find_architecture(
            list(variant.depths),
            list(variant.dims),
            has_grn=variant.grn,
            isotropic=variant.isotropic,
        )
        assert found is variant


def test_an_unknown_shape_is_no_variant():
    assert find_architecture((1, 1, 1, 1), (8, 16, 32, 64), has_grn=False, isotropic=False) is None
    assert (
        find_architecture((3, 4, 6, 3), (256, 512, 1024, 2048), has_grn=False, isotropic=False)
        is None
    )


def test_the_four_families_have_the_published_members():
    count = dict.fromkeys(("v1", "isotropic", "v2", "timm"), 0)
    for variant in VARIANTS.values():
        count[variant.family] += 1

    assert count == {"v1": 5, "isotropic": 3, "v2": 9, "timm": 9}


def test_top1_is_the_published_one():
    def top1(name, training, px):
        (found,) = [
            each.top1
            for each in find_variant(name).accuracies
            if (each.training, each.image_px) == (training, px)
        ]
        return found

    assert top1("convnext_tiny", "1k", 224) == 82.1
    assert top1("convnext_large", "1k", 384) == 85.5
    assert top1("convnext_xlarge", "22k_1k", 384) == 87.8
    assert top1("convnextv2_atto", "fcmae_1k", 224) == 76.7
    assert top1("convnextv2_huge", "fcmae_22k_1k", 512) == 88.9
    assert top1("swin_base", "1k", 224) == 83.5


def test_a_retested_accuracy_is_within_a_tenth_of_the_published_one():
    for variant in VARIANTS.values():
        for accuracy in variant.accuracies:
            if accuracy.retested is not None:
                assert accuracy.retested == pytest.approx(accuracy.top1, abs=0.1), variant.name
