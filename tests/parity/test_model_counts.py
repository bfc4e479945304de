"""Parameters and multiply-adds of the modules themselves against the catalogue."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convnext_cli.catalog.models import VARIANTS, count_parameters, estimate_macs, find_variant
from convnext_cli.models.convnext import build_comparison, build_convnext


def build_on_meta(variant, num_classes):
    build = build_comparison if variant.family == "timm" else build_convnext
    with torch.device("meta"):
        return build(variant, num_classes=num_classes)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("num_classes", [1000, 21_841])
def test_the_module_has_as_many_parameters_as_the_catalogue_says(variant, num_classes):
    model = build_on_meta(variant, num_classes)

    counted = sum(parameter.numel() for parameter in model.parameters())

    assert counted == count_parameters(variant, num_classes=num_classes)


@pytest.mark.parametrize(
    ("name", "image_px"),
    [
        ("convnext_tiny", 224),
        ("convnext_tiny", 250),  # no multiple of 32: every stage rounds down
        ("convnext_isotropic_small", 224),
        ("convnextv2_atto", 384),
        ("resnet50", 224),
        ("resnet50", 320),
        ("resnet200", 224),
        ("deit_small", 224),
        ("vit_base", 224),
        ("swin_tiny", 224),
        ("swin_base", 224),
    ],
)
def test_the_module_multiplies_as_often_as_the_catalogue_says(name, image_px, monkeypatch):
    # The counter sees attention only as the matrix products that it is made of.
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 0)
    variant = find_variant(name)
    model = build_on_meta(variant, 1000).eval()
    counter = FlopCounterMode(display=False)

    with counter, torch.no_grad():
        model(torch.empty(1, 3, image_px, image_px, device="meta"))

    macs = counter.get_total_flops() // 2
    assert macs == estimate_macs(variant, image_px=image_px, num_classes=1000)
