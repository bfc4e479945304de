"""Logits and gradients of the same weights in timm's ConvNeXt."""

import re

import pytest
import torch
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from torch import nn

from convnext_cli.models.convnext import ConvNeXt

SHAPE = {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64), "num_classes": 11}

TO_TIMM = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv1\.", ".mlp.fc1."),
    (r"\.pwconv2\.", ".mlp.fc2."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def timm_name(name):
    for pattern, replacement in TO_TIMM:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture(params=["v1", "v2"])
def pair(request):
    torch.manual_seed(0)
    if request.param == "v1":
        ours = ConvNeXt(**SHAPE, layer_scale_init=1e-6)
        theirs = TimmConvNeXt(**SHAPE, ls_init_value=1e-6)
    else:
        ours = ConvNeXt(**SHAPE, grn=True)
        theirs = TimmConvNeXt(**SHAPE, ls_init_value=None, use_grn=True)
    # Values far from the first ones: LayerScale and GRN would hide most of a block otherwise.
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(
        {
            timm_name(name): tensor.reshape(shapes[timm_name(name)])
            for name, tensor in ours.state_dict().items()
        }
    )
    return ours.eval(), theirs.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def test_logits_equal_those_of_timm(pair, images):
    ours, theirs = pair

    with torch.no_grad():
        logits_NK, expected_NK = ours(images), theirs(images)

    assert expected_NK.std() > 0.1
    torch.testing.assert_close(logits_NK, expected_NK, atol=1e-5, rtol=0)


def test_gradients_equal_those_of_timm(pair, images):
    ours, theirs = (model.double() for model in pair)

    for model in (ours, theirs):
        model(images.double()).square().mean().backward()

    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(timm_name(name)).grad.reshape(parameter.shape)
        torch.testing.assert_close(parameter.grad, expected, atol=1e-9, rtol=1e-7)
