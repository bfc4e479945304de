"""Which files `predict_images` can open, and what it says of the others."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

from convnext_cli.errors import Diverged
from convnext_cli.training.loading import LoadedModel, Preprocessing
from convnext_cli.training.prediction import predict_images
from convnext_cli.training.report import Prediction, Unread

RED = Image.new("RGB", (16, 16), "red")
BLUE = Image.new("RGB", (16, 16), "blue")


@pytest.fixture
def model() -> LoadedModel:
    """Names the strongest colour of an image."""
    preprocessing = Preprocessing(
        image_px=16, crop="center", crop_frac=1.0, interpolation="bicubic",
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), reason="a test",
    )  # fmt: skip
    return LoadedModel(
        name="mean", path="none", network=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        num_classes=3, classes=("red", "green", "blue"), source="raw", preprocessing=preprocessing,
    )  # fmt: skip


def see(model: LoadedModel, path: Path) -> Prediction | Unread:
    return next(predict_images(model, [path], device="cpu", top=1))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tiff"])
def test_each_format_that_can_be_packed_is_seen(model, tmp_path, name):
    RED.save(tmp_path / name)

    seen = see(model, tmp_path / name)

    assert isinstance(seen, Prediction), seen
    assert seen.guesses[0].name == "red"


@pytest.mark.parametrize("name", ["a.webp", "a.gif"])
def test_of_an_animation_the_first_frame_counts(model, tmp_path, name):
    BLUE.save(tmp_path / name, save_all=True, append_images=[RED], duration=100)

    seen = see(model, tmp_path / name)

    assert isinstance(seen, Prediction), seen
    assert seen.guesses[0].name == "blue"


def test_a_cut_bitmap_says_why_it_is_left_out(model, tmp_path):
    path = tmp_path / "a.bmp"
    RED.save(path)
    path.write_bytes(path.read_bytes()[:100])

    seen = see(model, path)

    assert isinstance(seen, Unread)
    assert seen.reason.startswith("damaged: ")


def test_outputs_that_are_not_finite_are_no_guesses(model, tmp_path):
    RED.save(tmp_path / "a.png")
    broken = replace(model, network=nn.Sequential(model.network, nn.Threshold(2.0, float("nan"))))

    with pytest.raises(Diverged, match="none gave non-finite outputs"):
        see(broken, tmp_path / "a.png")
