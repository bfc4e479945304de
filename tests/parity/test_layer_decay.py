"""Layer-wise learning rates of the real networks against the published tables.

Published: facebookresearch/ConvNeXt@048efce optim_factory.py (decay to the power 13 - id, ids 0 to
13); facebookresearch/ConvNeXt-V2@2553895 optim_factory.py; ConvNeXt Table 6; ConvNeXt V2 Tables 8
to 13.
"""

from functools import cache

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from convnext_cli.catalog.models import find_variant
from convnext_cli.models.convnext import build_convnext
from convnext_cli.optim.groups import make_parameter_groups


@cache
def network(name):
    with torch.device("meta"):
        return build_convnext(find_variant(name), num_classes=1000)


def make_groups(name, *, layer_decay, kind="grouped"):
    return make_parameter_groups(
        network(name), weight_decay=0.05, layer_decay=layer_decay, layer_decay_kind=kind
    )


def scales(name, *, layer_decay, kind="grouped"):
    groups = make_groups(name, layer_decay=layer_decay, kind=kind)
    return {member: group.lr_scale for group in groups for member in group.names}


@pytest.mark.parametrize(
    "name", ["convnext_small", "convnext_base", "convnext_large", "convnext_xlarge"]
)
def test_22k_to_1k_scales_of_v1(name):
    scale = scales(name, layer_decay=0.8)

    assert len(set(scale.values())) == 14
    assert scale["downsample_layers.0.0.weight"] == pytest.approx(0.0550, abs=5e-5)
    assert scale["stages.0.2.gamma"] == pytest.approx(0.0687, abs=5e-5)
    assert scale["downsample_layers.2.1.weight"] == pytest.approx(0.107, abs=5e-4)
    assert scale["stages.2.26.pwconv1.weight"] == pytest.approx(0.64)
    assert scale["stages.3.0.dwconv.weight"] == 0.8
    assert scale["norm.weight"] == scale["head.weight"] == 1.0


def test_scales_of_tiny_take_the_form_of_six_layers():
    scale = scales("convnext_tiny", layer_decay=0.8)

    assert sorted(set(scale.values())) == pytest.approx([0.8**power for power in range(7, -1, -1)])
    assert scale["downsample_layers.0.0.weight"] == pytest.approx(0.2097152)
    assert scale["stages.2.8.pwconv1.weight"] == pytest.approx(0.64)


@pytest.mark.parametrize(
    ("name", "layer_decay", "stem"),
    [
        ("convnext_base", 0.7, 0.0097),
        ("convnext_large", 0.7, 0.0097),
        ("convnextv2_base", 0.6, 0.0013),
        ("convnextv2_large", 0.6, 0.0013),
    ],
)
def test_the_stem_of_other_published_recipes(name, layer_decay, stem):
    scale = scales(name, layer_decay=layer_decay)

    assert scale["downsample_layers.0.0.weight"] == pytest.approx(stem, abs=5e-5)
    assert scale["head.weight"] == 1.0


@pytest.mark.parametrize(
    ("name", "layer_decay", "blocks"),
    [
        ("convnextv2_atto", 0.9, 12),
        ("convnextv2_nano", 0.9, 14),
        ("convnextv2_tiny", 0.9, 18),
        ("convnextv2_huge", 0.75, 36),
        ("convnext_isotropic_large", 0.8, 36),
    ],
)
def test_single_scales_have_a_power_a_block_and_the_stem_shares_the_first(
    name, layer_decay, blocks
):
    scale = scales(name, layer_decay=layer_decay, kind="single")

    powers = [layer_decay**power for power in range(blocks, -1, -1)]
    assert sorted(set(scale.values())) == pytest.approx(powers)
    stem = next(member for member in scale if member.startswith(("stem.", "downsample_layers.0")))
    assert scale[stem] == pytest.approx(layer_decay**blocks)
    assert scale["head.weight"] == 1.0


@pytest.mark.parametrize(
    ("name", "undecayed"),
    [("convnext_base", ".gamma"), ("convnextv2_base", ".grn.gamma"), ("convnextv2_base", ".beta")],
)
def test_layer_scale_and_grn_of_every_block_are_undecayed(name, undecayed):
    groups = make_groups(name, layer_decay=0.8)

    decays = {
        member: group.weight_decay
        for group in groups
        for member in group.names
        if member.endswith(undecayed)
    }

    assert len(decays) == 36
    assert set(decays.values()) == {0.0}


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_tiny", "convnext_isotropic_large"])
def test_weight_decay_splits_the_network_as_the_official_rule_does(name):
    # the rule of V2, by name: 1-D, .bias, .gamma, .beta; for V1 it is the same set
    official = {
        member
        for member, parameter in network(name).named_parameters()
        if parameter.ndim == 1 or member.endswith((".bias", ".gamma", ".beta"))
    }

    groups = make_groups(name, layer_decay=None)

    assert {m for group in groups if group.weight_decay == 0 for m in group.names} == official


@pytest.mark.parametrize(
    "name", ["resnet50", "vit_small_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_comparison_models_are_grouped_as_timm_groups_them(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    expected = {
        parameter: (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            model,
            weight_decay=0.05,
            no_weight_decay_list=tuple(getattr(model, "no_weight_decay", set)()),
            layer_decay=0.75,
        )
        for parameter in group["params"]
    }

    groups = make_parameter_groups(
        model, weight_decay=0.05, layer_decay=0.75, layer_decay_kind="single"
    )

    ours = {
        parameter: (group.lr_scale, group.weight_decay)
        for group in groups
        for parameter in group.parameters
    }
    assert ours == expected
