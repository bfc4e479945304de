"""LayerNorm and GRN against formulas written out in float64."""

import pytest
import torch
from torch import nn

from convnext_cli.models.layers import GRN, ChannelsFirstLayerNorm, LayerNorm, PatchConv


def layer_norm_float64(x_NHWC, weight, bias, eps=1e-6):
    x = x_NHWC.double()
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight.double() + bias.double()


def grn_float64(x_NHWC, gamma, beta):
    out = torch.empty_like(x_NHWC, dtype=torch.float64)
    for n, image in enumerate(x_NHWC.double()):
        energy = image.pow(2).sum(dim=(0, 1)).sqrt()
        share = energy / (energy.mean() + 1e-6)
        out[n] = gamma.double().flatten() * (image * share) + beta.double().flatten() + image
    return out


def random_layer_norm(kind, channels):
    norm = kind(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def random_grn(channels):
    grn = GRN(channels)
    nn.init.normal_(grn.gamma)
    nn.init.normal_(grn.beta)
    return grn


def test_layer_norm_is_the_formula_with_biased_variance():
    torch.manual_seed(0)
    norm = random_layer_norm(LayerNorm, 6)
    x_NHWC = torch.randn(2, 3, 4, 6) * 3 + 5

    expected = layer_norm_float64(x_NHWC, norm.weight, norm.bias)

    torch.testing.assert_close(norm(x_NHWC).double(), expected, atol=1e-5, rtol=0)


def test_channels_first_layer_norm_normalises_channels_of_each_position():
    torch.manual_seed(0)
    norm = random_layer_norm(ChannelsFirstLayerNorm, 6)
    x_NCHW = torch.randn(2, 6, 3, 4)

    expected = layer_norm_float64(x_NCHW.permute(0, 2, 3, 1), norm.weight, norm.bias)

    torch.testing.assert_close(
        norm(x_NCHW).permute(0, 2, 3, 1).double(), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channels_first_layer_norm_leaves_channels_last_memory(memory_format):
    x_NCHW = torch.randn(2, 6, 3, 4).to(memory_format=memory_format)

    out_NCHW = ChannelsFirstLayerNorm(6)(x_NCHW)

    assert out_NCHW.shape == x_NCHW.shape
    assert out_NCHW.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("channels", "side", "height", "width"), [(3, 4, 8, 20), (5, 2, 6, 2)])
def test_multiplied_patches_are_the_convolution(channels, side, height, width):
    conv = PatchConv(channels, 7, side=side).double().to(memory_format=torch.channels_last)
    x_NCHW = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)

    product, convolved = conv.multiply_patches(x_NCHW), conv(x_NCHW)

    torch.testing.assert_close(product, convolved, check_stride=False)
    grad = torch.randn_like(product)
    given = [x_NCHW, *conv.parameters()]
    grads = torch.autograd.grad(product, given, grad)
    torch.testing.assert_close(grads, torch.autograd.grad(convolved, given, grad))
    assert product.is_contiguous(memory_format=torch.channels_last)


def test_layer_norm_of_float16_near_its_largest_value_is_right():
    # Squares of these overflow float16 (65504) by four orders of magnitude.
    x_NHWC = torch.tensor([60000.0, -60000.0, 30000.0, 0.0]).half().reshape(1, 1, 1, 4)
    norm = LayerNorm(4).half()

    expected = layer_norm_float64(x_NHWC, norm.weight, norm.bias)

    torch.testing.assert_close(norm(x_NHWC).double(), expected, atol=2e-3, rtol=0)


def test_layer_norm_of_float16_keeps_small_differences_on_a_large_mean():
    x_NHWC = (2048 + 2 * torch.arange(8.0)).half().reshape(1, 1, 1, 8)
    norm = LayerNorm(8).half()

    expected = layer_norm_float64(x_NHWC, norm.weight, norm.bias)

    torch.testing.assert_close(norm(x_NHWC).double(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LayerNorm, GRN])
def test_under_autocast_a_layer_keeps_the_dtype_it_is_given(kind, dtype):
    layer = kind(4)

    with torch.autocast("cpu", dtype=dtype):
        out = layer(torch.randn(2, 3, 3, 4).to(dtype))

    assert out.dtype == dtype
    out.sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


def test_grn_is_the_formula_for_each_image_alone():
    torch.manual_seed(0)
    grn = random_grn(5)
    x_NHWC = torch.randn(3, 4, 2, 5)

    out_NHWC = grn(x_NHWC)

    torch.testing.assert_close(
        out_NHWC.double(), grn_float64(x_NHWC, grn.gamma, grn.beta), atol=2e-6, rtol=1e-6
    )
    torch.testing.assert_close(out_NHWC[1:2], grn(x_NHWC[1:2]), atol=0, rtol=0)


def test_grn_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    grn = random_grn(5)
    x_NHWC = torch.randn(2, 3, 3, 5, requires_grad=True)
    wanted = torch.randn(2, 3, 3, 5)

    inputs = (x_NHWC, grn.gamma, grn.beta)
    ours = torch.autograd.grad((grn(x_NHWC) * wanted).sum(), inputs)
    x_64 = x_NHWC.double()
    share = x_64.pow(2).sum(dim=(1, 2), keepdim=True).sqrt()
    share = share / (share.mean(-1, keepdim=True) + 1e-6)
    formula = grn.gamma.double() * (x_64 * share) + grn.beta.double() + x_64
    theirs = torch.autograd.grad((formula * wanted).sum(), inputs)

    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_a_new_grn_is_the_identity():
    x_NHWC = torch.randn(2, 3, 3, 5)

    assert torch.equal(GRN(5)(x_NHWC), x_NHWC)


def test_grn_of_float16_neither_overflows_nor_underflows():
    torch.manual_seed(0)
    grn = random_grn(4)
    # Sums of squares far above 65504, and single squares far below the smallest float16.
    for size in (3000.0, 1e-4):
        x_NHWC = (torch.randn(1, 8, 8, 4) * size).half()
        out_NHWC = grn(x_NHWC)
        expected = grn_float64(x_NHWC, grn.gamma, grn.beta)
        torch.testing.assert_close(out_NHWC.double(), expected, atol=size * 0.01, rtol=2e-3)


def test_grn_parameters_have_the_published_shape():
    assert {name: tuple(p.shape) for name, p in GRN(8).named_parameters()} == {
        "gamma": (1, 1, 1, 8),
        "beta": (1, 1, 1, 8),
    }
