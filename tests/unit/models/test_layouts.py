import pytest
import torch

from convnext_cli.catalog.models import find_variant
from convnext_cli.models.convnext import build_convnext
from convnext_cli.models.layouts import (
    from_official,
    recognise_layout,
    strip_prefixes,
    to_official,
)


def meta_state(name: str) -> dict[str, torch.Tensor]:
    """Names and shapes of a variant, without values."""
    with torch.device("meta"):
        return build_convnext(find_variant(name), num_classes=3).state_dict()


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


TINY = {
    "downsample_layers.0.0.weight": {
        "timm": ("stem.0.weight", (96, 3, 4, 4)),
        "torchvision": ("features.0.0.weight", (96, 3, 4, 4)),
        "huggingface": ("convnext.embeddings.patch_embeddings.weight", (96, 3, 4, 4)),
    },
    "downsample_layers.3.1.bias": {
        "timm": ("stages.3.downsample.1.bias", (768,)),
        "torchvision": ("features.6.1.bias", (768,)),
        "huggingface": ("convnext.encoder.stages.3.downsampling_layer.1.bias", (768,)),
    },
    "stages.2.8.dwconv.weight": {
        "timm": ("stages.2.blocks.8.conv_dw.weight", (384, 1, 7, 7)),
        "torchvision": ("features.5.8.block.0.weight", (384, 1, 7, 7)),
        "huggingface": ("convnext.encoder.stages.2.layers.8.dwconv.weight", (384, 1, 7, 7)),
    },
    "stages.0.1.pwconv2.weight": {
        "timm": ("stages.0.blocks.1.mlp.fc2.weight", (96, 384)),
        "torchvision": ("features.1.1.block.5.weight", (96, 384)),
        "huggingface": ("convnext.encoder.stages.0.layers.1.pwconv2.weight", (96, 384)),
    },
    "stages.1.0.gamma": {
        "timm": ("stages.1.blocks.0.gamma", (192,)),
        "torchvision": ("features.3.0.layer_scale", (192, 1, 1)),
        "huggingface": ("convnext.encoder.stages.1.layers.0.layer_scale_parameter", (192,)),
    },
    "norm.weight": {
        "timm": ("head.norm.weight", (768,)),
        "torchvision": ("classifier.0.weight", (768,)),
        "huggingface": ("convnext.layernorm.weight", (768,)),
    },
    "head.bias": {
        "timm": ("head.fc.bias", (3,)),
        "torchvision": ("classifier.2.bias", (3,)),
        "huggingface": ("classifier.bias", (3,)),
    },
}


@pytest.mark.parametrize("layout", ["timm", "torchvision", "huggingface"])
def test_each_part_of_v1_has_its_name_and_shape_in_each_layout(layout):
    official = meta_state("convnext_tiny")

    other = shapes(from_official(official, layout))

    assert len(other) == len(official)
    for key, names in TINY.items():
        name, shape = names[layout]
        assert other[name] == shape, key


def test_grn_is_a_vector_in_timm_and_keeps_its_four_axes_elsewhere():
    official = meta_state("convnextv2_tiny")

    timm = shapes(from_official(official, "timm"))
    huggingface = shapes(from_official(official, "huggingface"))

    assert timm["stages.0.blocks.0.mlp.grn.weight"] == (384,)
    assert timm["stages.0.blocks.0.mlp.fc1.weight"] == (384, 96)
    assert huggingface["convnextv2.encoder.stages.0.layers.0.grn.bias"] == (1, 1, 1, 384)
    assert shapes(to_official(from_official(official, "timm"), "timm")) == shapes(official)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("convnextv2_atto", (160, 40, 1, 1)),
        ("convnextv2_femto", (192, 48, 1, 1)),
        ("convnextv2_pico", (256, 64, 1, 1)),
        ("convnextv2_nano", (320, 80, 1, 1)),
        ("convnextv2_tiny", (384, 96)),
    ],
)
def test_the_small_variants_of_timm_have_convolutions_for_linear_layers(name, shape):
    other = shapes(from_official(meta_state(name), "timm"))

    assert other["stages.0.blocks.0.mlp.fc1.weight"] == shape


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model."])
def test_prefixes_are_stripped_only_where_every_key_has_them(prefix):
    state = {"head.weight": torch.zeros(1), "norm.bias": torch.zeros(1)}
    wrapped = {prefix + key: value for key, value in state.items()}

    assert strip_prefixes(wrapped).keys() == state.keys()
    assert strip_prefixes(wrapped | {"other": torch.zeros(1)}).keys() == {*wrapped, "other"}


def test_no_keys_and_other_networks_have_no_layout():
    assert recognise_layout([]) is None
    assert recognise_layout(["conv1.weight", "layer1.0.conv1.weight", "fc.bias"]) is None
    assert recognise_layout(["blocks.0.attn.qkv.weight", "head.weight"]) is None


def test_a_backbone_of_transformers_without_its_prefix_is_recognised():
    whole = from_official(meta_state("convnext_tiny"), "huggingface")
    bare = {
        key.removeprefix("convnext."): value
        for key, value in whole.items()
        if not key.startswith("classifier")
    }

    assert recognise_layout(bare) == "huggingface"
    official = to_official(bare, "huggingface")
    assert official.keys() == {
        key for key in meta_state("convnext_tiny") if not key.startswith("head.")
    }


def test_the_older_names_of_grn_in_transformers_are_read():
    state = from_official(meta_state("convnextv2_atto"), "huggingface")
    older = {
        key.replace("grn.weight", "grn.gamma").replace("grn.bias", "grn.beta"): value
        for key, value in state.items()
    }

    assert shapes(to_official(older, "huggingface")) == shapes(meta_state("convnextv2_atto"))


@pytest.mark.parametrize("layout", ["official", "timm", "torchvision", "huggingface"])
def test_a_key_that_a_layout_does_not_have_is_named_and_never_dropped(layout):
    state = from_official(meta_state("convnext_tiny"), layout)
    state["decode_head.conv.weight"] = torch.zeros(1)

    with pytest.raises(KeyError, match=r"decode_head\.conv\.weight"):
        to_official(state, layout)


@pytest.mark.parametrize(
    ("name", "layout", "key"),
    [
        ("convnext_isotropic_small", "timm", "stem.weight"),
        ("convnext_isotropic_large", "huggingface", "stem.weight"),
        ("convnextv2_atto", "torchvision", r"stages\.0\.0\.grn\.gamma"),
    ],
)
def test_what_a_library_does_not_have_cannot_be_written_for_it(name, layout, key):
    with pytest.raises(KeyError, match=key):
        from_official(meta_state(name), layout)
