"""A model that a person names becomes a network."""

import pytest
import timm
import torch

from convnext_cli.errors import CheckpointError
from convnext_cli.models.weights import CARD_KEY, ModelCard
from convnext_cli.training.loading import load_model

CARD = ModelCard(
    variant="resnet50",
    num_classes=1000,
    image_px=160,
    classes=(),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop="center",
    crop_frac=0.95,
)


@pytest.fixture(scope="module")
def states() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Raw and averaged weights of a model that this project does not have."""
    raw, averaged = (timm.create_model("test_convnext").state_dict() for _ in range(2))
    return raw, averaged


@pytest.mark.parametrize("prefer", ["raw", "ema"])
@pytest.mark.parametrize("writer", ["timm", "this project"])
def test_weights_of_a_model_of_timm_are_found_in_a_checkpoint(states, tmp_path, writer, prefer):
    raw, averaged = states
    content = {"state_dict": raw, "state_dict_ema": averaged}
    if writer == "this project":
        both = {f"model.{key}": value for key, value in raw.items()}
        both |= {f"ema_model.{key}": value for key, value in averaged.items()}
        content = {CARD_KEY: CARD.to_dict(), "state_dict": both}
    path = tmp_path / "x.pth"
    torch.save(content, path)

    model = load_model(f"timm:test_convnext:{path}", prefer=prefer)

    assert model.source == prefer
    wanted = averaged if prefer == "ema" else raw
    assert all(torch.equal(value, wanted[key]) for key, value in model.network.state_dict().items())


def test_averaged_weights_that_are_not_there_are_not_replaced_by_raw_ones(states, tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": states[0]}, path)

    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        load_model(f"timm:test_convnext:{path}", prefer="ema")
