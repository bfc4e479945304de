"""LayerNorm, GRN and DropPath against formulas written out in float64."""

import pytest
import torch
from torch import nn

from convnext_cli.models.layers import GRN, ChannelsFirstLayerNorm, DropPath, LayerNorm


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


def test_drop_path_drops_whole_images_at_its_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.3)

    out = drop(torch.ones(20_000, 2, 3))

    per_image = out.flatten(1)
    assert torch.equal(per_image.amin(1), per_image.amax(1))
    torch.testing.assert_close(per_image.unique(), torch.tensor([0.0, 1 / 0.7]))
    # Four standard errors of 20,000 draws.
    assert (per_image[:, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.013)
    assert out.mean().item() == pytest.approx(1.0, abs=0.019)


def test_drop_path_is_the_identity_in_evaluation_and_at_zero():
    x = torch.randn(4, 3)

    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_drop_path_scales_bfloat16_by_the_exact_factor():
    # 3 * (1 / 0.9) rounds to 3.328125 in bfloat16; 3 * bfloat16(1 / 0.9) would give 3.34375.
    torch.manual_seed(0)

    out = DropPath(0.1)(torch.full((64, 1), 3.0, dtype=torch.bfloat16))

    assert set(out.flatten().tolist()) == {0.0, torch.tensor(3 / 0.9).bfloat16().item()}


def add_branch_of_ones(drop_frac, *, images=8, dtype=torch.float32):
    drop = DropPath(drop_frac, kind="skip")
    zeros = torch.zeros(images, 1, 1, 1, dtype=dtype)
    return drop.add_kept(zeros, torch.ones_like).flatten()


def test_skipping_computes_a_fixed_number_of_images_and_no_others():
    torch.manual_seed(0)
    seen = []
    x_NCHW = torch.randn(10, 3, 2, 2).contiguous(memory_format=torch.channels_last)

    def branch(kept_kCHW):
        assert kept_kCHW.is_contiguous(memory_format=torch.channels_last)
        seen.append(len(kept_kCHW))
        return kept_kCHW.double().sin().float()

    out_NCHW = DropPath(0.34, kind="skip").add_kept(x_NCHW, branch)

    assert seen == [7]  # of 6.6
    assert out_NCHW.is_contiguous(memory_format=torch.channels_last)
    past = [torch.equal(image, out) for image, out in zip(x_NCHW, out_NCHW, strict=True)]
    assert sum(past) == 3
    for image, out, went_past in zip(x_NCHW, out_NCHW, past, strict=True):
        if not went_past:
            torch.testing.assert_close(out, image + image.sin() * 10 / 7)


def test_skipping_keeps_the_mean_exactly_and_every_image_equally_often():
    torch.manual_seed(0)

    draws = torch.stack([add_branch_of_ones(0.4) for _ in range(4000)])

    assert draws.sum(1).unique().tolist() == [8.0]  # 5 images x 8 / 5, in every single draw
    kept_frac = (draws > 0).float().mean(0)
    # Four standard errors of 4,000 draws around 5 / 8, which is not 1 - 0.4.
    assert kept_frac.tolist() == pytest.approx([5 / 8] * 8, abs=0.031)
    assert draws.mean(0).tolist() == pytest.approx([1.0] * 8, abs=0.05)


@pytest.mark.parametrize(
    ("images", "drop_frac", "kept"), [(1, 0.9, 1), (2, 0.95, 1), (128, 0.5, 64), (128, 0.03, 124)]
)
def test_at_least_one_image_goes_through_a_branch(images, drop_frac, kept):
    assert (add_branch_of_ones(drop_frac, images=images) > 0).sum().item() == kept


def test_skipping_gives_both_ways_their_gradients_in_the_same_memory():
    torch.manual_seed(0)
    x_NCHW = torch.randn(6, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    x_NCHW.requires_grad_()

    out_NCHW = DropPath(0.5, kind="skip").add_kept(x_NCHW, lambda kept: 3 * kept)
    out_NCHW.sum().backward()

    gradients = x_NCHW.grad.flatten(1)
    assert gradients.amax(1).tolist() == gradients.amin(1).tolist()
    assert sorted(gradients[:, 0].tolist()) == [1, 1, 1, 7, 7, 7]  # 1, and 3 x 6 / 3 on top
    assert x_NCHW.grad.is_contiguous(memory_format=torch.channels_last)


def test_skipping_scales_bfloat16_by_the_exact_factor():
    drop = DropPath(0.1, kind="skip")
    x_NCHW = torch.zeros(10, 1, 1, 1, dtype=torch.bfloat16)

    out_NCHW = drop.add_kept(x_NCHW, lambda kept: torch.full_like(kept, 3.0))

    assert set(out_NCHW.flatten().tolist()) == {0.0, torch.tensor(3 * 10 / 9).bfloat16().item()}


def test_skipping_is_for_training_and_blocks_that_drop():
    assert DropPath(0.2, kind="skip").skips
    assert not DropPath(0.2, kind="skip").eval().skips
    assert not DropPath(0.0, kind="skip").skips
    assert not DropPath(0.2).skips
    assert "skip" in repr(DropPath(0.2, kind="skip"))


@pytest.mark.parametrize("drop_frac", [-0.1, 1.0])
def test_drop_path_refuses_a_probability_that_keeps_nothing(drop_frac):
    with pytest.raises(ValueError, match="drop_frac must be in"):
        DropPath(drop_frac)
