"""Which parameters decay, and how much more slowly early layers learn.

The optim room must not know the models room, so networks here are skeletons: the official
parameter names and shapes of a ConvNeXt, with few channels.
"""

import pytest
import torch
from torch import nn

from convnext_cli.optim.groups import (
    count_blocks,
    count_layer_ids,
    is_decayed,
    layer_id,
    make_parameter_groups,
)

TINY, BASE, ATTO, NANO = (3, 3, 9, 3), (3, 3, 27, 3), (2, 2, 6, 2), (2, 2, 8, 2)
C = 4


class SkeletonGRN(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, 4 * C))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, 4 * C))


class SkeletonBlock(nn.Module):
    def __init__(self, *, grn):
        super().__init__()
        self.dwconv = nn.Conv2d(C, C, kernel_size=7, groups=C)
        self.norm = nn.LayerNorm(C)
        self.pwconv1 = nn.Linear(C, 4 * C)
        self.pwconv2 = nn.Linear(4 * C, C)
        if grn:
            self.grn = SkeletonGRN()
        else:
            self.gamma = nn.Parameter(torch.ones(C))


class Skeleton(nn.Module):
    def __init__(self, depths, *, grn=False, num_classes=10):
        super().__init__()
        if len(depths) == 1:
            self.stem = nn.Conv2d(3, C, kernel_size=16)
            self.blocks = nn.ModuleList(SkeletonBlock(grn=grn) for _ in range(depths[0]))
        else:
            stem = nn.Sequential(nn.Conv2d(3, C, kernel_size=4), nn.LayerNorm(C))
            downs = [nn.Sequential(nn.LayerNorm(C), nn.Conv2d(C, C, kernel_size=2)) for _ in "123"]
            self.downsample_layers = nn.ModuleList([stem, *downs])
            self.stages = nn.ModuleList(
                nn.ModuleList(SkeletonBlock(grn=grn) for _ in range(depth)) for depth in depths
            )
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, num_classes)


def make_groups(model, *, layer_decay=None, kind="grouped", weight_decay=0.05):
    return make_parameter_groups(
        model, weight_decay=weight_decay, layer_decay=layer_decay, layer_decay_kind=kind
    )


def scale_by_name(groups):
    return {name: group.lr_scale for group in groups for name in group.names}


@pytest.mark.parametrize("layer_decay", [None, 0.8])
@pytest.mark.parametrize(
    ("depths", "grn", "kind"),
    [
        (TINY, False, "grouped"),
        (BASE, False, "grouped"),
        (BASE, True, "grouped"),
        (ATTO, True, "single"),
        ((18,), False, "single"),
    ],
)
def test_every_parameter_is_in_exactly_one_group(depths, grn, kind, layer_decay):
    model = Skeleton(depths, grn=grn)

    groups = make_groups(model, layer_decay=layer_decay, kind=kind)

    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for group in groups:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            assert parameter is model.get_parameter(name)


def test_without_layer_decay_there_is_one_group_that_decays_and_one_that_does_not():
    groups = make_groups(Skeleton(TINY))

    assert [(group.weight_decay, group.lr_scale) for group in groups] == [(0.0, 1.0), (0.05, 1.0)]


@pytest.mark.parametrize("grn", [False, True])
def test_only_kernels_and_matrices_decay(grn):
    decayed = {
        ".".join(name.split(".")[-2:])
        for group in make_groups(Skeleton(TINY, grn=grn))
        if group.weight_decay
        for name in group.names
    }

    # the official names of the stem's and the downsampling convolutions end in a number
    assert decayed == {
        "0.weight",
        "1.weight",
        "dwconv.weight",
        "pwconv1.weight",
        "pwconv2.weight",
        "head.weight",
    }


def test_layer_scale_grn_norms_and_biases_never_decay():
    v1, v2 = make_groups(Skeleton(TINY)), make_groups(Skeleton(TINY, grn=True))

    kept = {name for group in v1 + v2 if group.weight_decay == 0 for name in group.names}

    for name in (
        "stages.0.0.gamma",
        "stages.2.8.grn.gamma",
        "stages.2.8.grn.beta",
        "stages.0.0.norm.weight",
        "downsample_layers.0.1.weight",
        "downsample_layers.2.0.weight",
        "norm.weight",
        "head.bias",
        "stages.3.2.dwconv.bias",
    ):
        assert name in kept


@pytest.mark.parametrize(
    ("shape", "decays"),
    [
        ((16,), False),
        ((), False),
        ((1, 1, 1, 16), False),
        ((1, 16), True),
        ((16, 1, 7, 7), True),
        ((16, 3, 4, 4), True),
    ],
)
def test_a_shape_decides_whether_a_parameter_decays(shape, decays):
    assert is_decayed(nn.Parameter(torch.zeros(shape))) is decays


def test_what_a_model_of_timm_names_is_not_decayed():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 4))
            self.weight = nn.Parameter(torch.zeros(3, 4))

        def no_weight_decay(self):
            return {"table"}

    kept, decayed = make_groups(Tokens())

    assert kept.names == ("table",)
    assert kept.weight_decay == 0
    assert decayed.names == ("weight",)


def test_a_frozen_parameter_is_in_no_group_and_moves_no_other_to_another_scale():
    model = Skeleton(TINY)
    expected = scale_by_name(make_groups(model, layer_decay=0.8))
    model.head.requires_grad_(requires_grad=False)
    model.stages[3].requires_grad_(requires_grad=False)

    scales = scale_by_name(make_groups(model, layer_decay=0.8))

    assert "head.weight" not in scales
    assert not any(name.startswith("stages.3.") for name in scales)
    assert scales == {name: expected[name] for name in scales}


@pytest.mark.parametrize(("depths", "count"), [(BASE, 14), (TINY, 8)])
def test_grouped_ids_are_fourteen_for_27_blocks_and_eight_for_nine(depths, count):
    names = [name for name, _ in Skeleton(depths).named_parameters()]

    ids = {layer_id(name, depths=depths, kind="grouped") for name in names}

    assert ids == set(range(count))
    assert count_layer_ids(depths, kind="grouped") == count


@pytest.mark.parametrize(
    ("name", "base", "tiny"),
    [
        ("downsample_layers.0.0.weight", 0, 0),
        ("downsample_layers.0.1.bias", 0, 0),
        ("stages.0.0.dwconv.weight", 1, 1),
        ("stages.0.2.gamma", 1, 1),
        ("downsample_layers.1.1.weight", 2, 2),
        ("stages.1.2.pwconv2.bias", 2, 2),
        ("downsample_layers.2.0.weight", 3, 3),
        ("stages.2.0.norm.weight", 3, 3),
        ("stages.2.2.pwconv1.weight", 3, 3),
        ("stages.2.3.pwconv1.weight", 4, 4),
        ("stages.2.8.gamma", 5, 5),
        ("downsample_layers.3.1.weight", 12, 6),
        ("stages.3.0.dwconv.bias", 12, 6),
        ("norm.weight", 13, 7),
        ("head.bias", 13, 7),
    ],
)
def test_the_grouped_id_of_a_name(name, base, tiny):
    assert layer_id(name, depths=BASE, kind="grouped") == base
    assert layer_id(name, depths=TINY, kind="grouped") == tiny


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("downsample_layers.0.0.weight", 1),
        ("stages.0.0.grn.gamma", 1),
        ("stages.0.1.norm.bias", 2),
        ("downsample_layers.1.0.weight", 3),
        ("stages.1.0.dwconv.weight", 3),
        ("downsample_layers.2.1.weight", 5),
        ("stages.2.5.pwconv1.weight", 10),
        ("downsample_layers.3.0.bias", 11),
        ("stages.3.1.pwconv2.weight", 12),
        ("norm.weight", 13),
        ("head.weight", 13),
    ],
)
def test_the_single_id_of_a_name(name, number):
    assert layer_id(name, depths=ATTO, kind="single") == number


@pytest.mark.parametrize(
    ("name", "number"),
    [("stem.weight", 1), ("blocks.0.gamma", 1), ("blocks.17.norm.bias", 18), ("head.bias", 19)],
)
def test_the_single_id_of_an_isotropic_name(name, number):
    assert layer_id(name, depths=(18,), kind="single") == number


@pytest.mark.parametrize("depths", [ATTO, NANO, (18,), (3, 3, 12, 3)])
def test_grouped_is_refused_where_no_grouped_form_is_published(depths):
    with pytest.raises(ValueError, match="the kind 'single' works"):
        make_groups(Skeleton(depths), layer_decay=0.9)


def test_layer_decay_is_refused_for_a_network_without_official_names():
    with pytest.raises(ValueError, match="Linear has no blocks"):
        make_groups(nn.Linear(2, 2), layer_decay=0.9, kind="single")


@pytest.mark.parametrize("depths", [TINY, BASE, NANO, (18,)])
def test_depths_are_counted_from_names_in_any_order(depths):
    names = [name for name, _ in Skeleton(depths).named_parameters()]

    assert count_blocks(names) == depths
    assert count_blocks(reversed(names)) == depths
