"""Logits of the same weights in every library that has the layout, and bit-exact round trips."""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from transformers import (
    AutoImageProcessor,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
)

from convnext_cli.catalog.models import VARIANTS, find_variant
from convnext_cli.data.augment import EvalView
from convnext_cli.models.convnext import ConvNeXt, build_convnext
from convnext_cli.models.layouts import from_official, recognise_layout, to_official
from convnext_cli.models.weights import (
    ModelCard,
    Weights,
    load_into,
    read_weights,
    write_weights,
)

CONVNEXTS = [name for name, variant in VARIANTS.items() if variant.family != "timm"]


def random_model(name: str, *, num_classes: int = 1000) -> ConvNeXt:
    """Weights in which every parameter matters: LayerScale and GRN far from their start."""
    torch.manual_seed(0)
    model = build_convnext(find_variant(name), num_classes=num_classes).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("gamma") and "grn" not in key:
                value.uniform_(0.05, 0.2)
            elif "grn" in key or value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.05)
    return model


def weights_of(model: ConvNeXt, name: str) -> Weights:
    return Weights(
        path=Path("memory"),
        state=model.state_dict(),
        layout="official",
        container="",
        source="raw",
        has_ema=False,
        variant=find_variant(name),
        num_classes=model.head.out_features,
        card=None,
    )


def largest_difference(ours, theirs) -> float:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((ours(images) - theirs(images)).abs().max())


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto", "convnextv2_tiny"])
@pytest.mark.parametrize("ending", ["model.safetensors", "model.pth"])
def test_timm_reads_what_we_write_and_gives_the_same_logits(name, ending, tmp_path):
    model = random_model(name)
    card = ModelCard(
        variant=name,
        num_classes=1000,
        image_px=64,
        classes=(),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        crop="center",
        crop_frac=0.875,
    )
    weights = dataclasses.replace(weights_of(model, name), card=card)
    write_weights(weights, tmp_path / ending, layout="timm")

    theirs = timm.create_model(name, checkpoint_path=str(tmp_path / ending)).eval()

    assert largest_difference(model, theirs) < 1e-5


def test_torchvision_reads_what_we_write_and_gives_the_same_logits(tmp_path):
    model = random_model("convnext_tiny")
    path = tmp_path / "model.pth"
    write_weights(weights_of(model, "convnext_tiny"), path, layout="torchvision")

    theirs = torchvision.models.convnext_tiny().eval()
    theirs.load_state_dict(torch.load(path, weights_only=True))

    assert largest_difference(model, theirs) < 1e-5


@pytest.mark.parametrize("layout", ["timm", "torchvision"])
def test_a_network_without_layer_scale_has_one_of_ones_where_there_must_be_one(layout):
    torch.manual_seed(0)
    model = build_convnext(find_variant("convnext_tiny"), num_classes=7, layer_scale_init=None)
    build = timm.create_model if layout == "timm" else torchvision.models.get_model
    theirs = build("convnext_tiny", num_classes=7).eval()

    theirs.load_state_dict(from_official(model.state_dict(), layout))

    assert largest_difference(model.eval(), theirs) < 1e-5


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("convnext_tiny", ConvNextForImageClassification),
        ("convnextv2_atto", ConvNextV2ForImageClassification),
    ],
)
def test_transformers_reads_what_we_write_and_gives_the_same_logits(name, library, tmp_path):
    model = random_model(name, num_classes=10)
    write_weights(weights_of(model, name), tmp_path / "folder", layout="huggingface")

    theirs, report = library.from_pretrained(tmp_path / "folder", output_loading_info=True)

    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert largest_difference(model, lambda images: theirs.eval()(images).logits) < 1e-5


@pytest.mark.parametrize(
    ("image_px", "crop", "crop_frac"),
    [(224, "center", 0.875), (64, "center", 0.8), (384, "warp", 1)],
)
def test_transformers_prepares_images_as_evaluation_does(image_px, crop, crop_frac, tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    card = ModelCard(
        variant="convnextv2_atto", num_classes=10, image_px=image_px, classes=(), mean=mean,
        std=std, interpolation="bicubic", crop=crop, crop_frac=crop_frac,
    )  # fmt: skip
    weights = weights_of(random_model("convnextv2_atto", num_classes=10), "convnextv2_atto")
    weights = dataclasses.replace(weights, card=card)
    photo = torch.randint(256, (3, 300, 420), dtype=torch.uint8)

    write_weights(weights, tmp_path / "folder", layout="huggingface")

    (theirs,) = AutoImageProcessor.from_pretrained(tmp_path / "folder")(photo)["pixel_values"]
    view = EvalView(image_px=image_px, crop=crop, crop_frac=crop_frac)(photo) / 255
    ours = (view - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert (ours - theirs).abs().max() < 1e-5


def test_what_transformers_cannot_prepare_is_not_told_to_it(tmp_path):
    card = ModelCard(
        variant="convnextv2_atto", num_classes=10, image_px=224, classes=(), mean=(0.5,) * 3,
        std=(0.5,) * 3, interpolation="bicubic", crop="warp", crop_frac=1.0,
    )  # fmt: skip
    weights = weights_of(random_model("convnextv2_atto", num_classes=10), "convnextv2_atto")

    write_weights(dataclasses.replace(weights, card=card), tmp_path, layout="huggingface")

    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["convnext_tiny", "convnextv2_atto"])
@pytest.mark.parametrize("layout", ["timm", "torchvision", "huggingface", "official"])
def test_files_of_other_libraries_are_recognised_and_read_bit_for_bit(name, layout, tmp_path):
    if layout == "torchvision" and name == "convnextv2_atto":
        pytest.skip("torchvision has no V2")
    model = random_model(name)
    path = tmp_path / ("folder" if layout == "huggingface" else "model.pth")
    write_weights(weights_of(model, name), path, layout=layout)

    found = read_weights(path)

    assert (found.layout, found.variant.name, found.num_classes) == (layout, name, 1000)
    state = model.state_dict()
    assert found.state.keys() == state.keys()
    assert all(torch.equal(found.state[key], state[key]) for key in state)


@pytest.mark.parametrize("name", CONVNEXTS)
@pytest.mark.parametrize("layout", ["official", "timm", "torchvision", "huggingface"])
def test_every_variant_survives_the_round_trip_bit_for_bit(name, layout):
    variant = find_variant(name)
    if variant.isotropic and layout != "official":
        pytest.skip("no other library has isotropic ConvNeXts")
    if variant.grn and layout == "torchvision":
        pytest.skip("torchvision has no V2")
    with torch.device("meta"):
        names = build_convnext(variant, num_classes=3).state_dict()
    # one value a tensor, expanded: the large ones would not fit beside each other
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn((), generator=generator).expand(value.shape)
        for key, value in names.items()
    }

    other = from_official(state, layout)
    back = to_official(other, layout)

    assert recognise_layout(other) == layout
    assert back.keys() == state.keys()
    assert all(back[key].shape == value.shape for key, value in state.items())
    assert all(back[key].flatten()[0] == value.flatten()[0] for key, value in state.items())


def test_a_checkpoint_of_timm_itself_gives_timms_logits(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("convnextv2_atto", num_classes=7).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(torch.randn_like(value) * 0.02)
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "timm.pth.tar")

    found = read_weights(tmp_path / "timm.pth.tar")
    model = build_convnext(found.variant, num_classes=7).eval()
    load_into(model, found)

    assert largest_difference(model, theirs) < 1e-5


def test_transformers_own_files_give_its_logits(tmp_path):
    torch.manual_seed(0)
    config = ConvNextV2Config(
        hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2], num_labels=7, layer_norm_eps=1e-6
    )
    theirs = ConvNextV2ForImageClassification(config).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(torch.randn_like(value) * 0.02)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="4MB")

    found = read_weights(tmp_path / "sharded")
    model = build_convnext(found.variant, num_classes=7).eval()
    load_into(model, found)

    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert largest_difference(model, lambda images: theirs(images).logits) < 1e-5


def test_torchvisions_own_file_gives_its_logits(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.convnext_tiny(num_classes=7).eval()
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            value.add_(torch.rand_like(value) * (0.2 if "layer_scale" in key else 0.02))
    torch.save(theirs.state_dict(), tmp_path / "convnext_tiny.pth")

    found = read_weights(tmp_path / "convnext_tiny.pth")
    model = build_convnext(found.variant, num_classes=7).eval()
    load_into(model, found)

    assert found.layout == "torchvision"
    assert largest_difference(model, theirs) < 1e-5
