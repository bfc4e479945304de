"""Pointwise layers in fp8, by torchao's emulation, against plain ones."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from convnext_cli.catalog.models import VARIANTS, count_fp8_layers, takes_fp8
from convnext_cli.models.convnext import Block, ConvNeXt, build_convnext
from convnext_cli.models.fp8 import use_fp8

pytestmark = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed: pip install '.[fp8]'"
)

NARROW_AND_WIDE = {"depths": (1, 2), "dims": (64, 512), "num_classes": 5, "layer_scale_init": 0.5}


def both(**shape) -> tuple[ConvNeXt, ConvNeXt]:
    """A plain model, and the same one in fp8."""
    torch.manual_seed(0)
    plain = ConvNeXt(**shape)
    fp8 = copy.deepcopy(plain)
    use_fp8(fp8, emulated=True)
    return plain, fp8


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours - exact).norm() / exact.norm()).item()


def run_layer(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of input, weight and bias."""
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    out.backward(gradient)
    return [out.detach(), leaf.grad, layer.weight.grad, layer.bias.grad]


@pytest.mark.parametrize("rows", [98, 196, 49])  # not all multiples of 16
@pytest.mark.parametrize("name", ["pwconv1", "pwconv2"])
def test_one_layer_is_off_by_the_error_that_the_recipe_tells(name, rows):
    blocks = [
        block
        for model in both(**NARROW_AND_WIDE)
        for block in model.modules()
        if isinstance(block, Block) and block.pwconv1.in_features == 512
    ]
    plain, fp8 = getattr(blocks[0], name), getattr(blocks[2], name)
    x, gradient = torch.randn(rows, plain.in_features), torch.randn(rows, plain.out_features)

    exact = run_layer(plain, x, gradient)
    ours = run_layer(fp8, x, gradient)

    errors = [error(mine, other) for mine, other in zip(ours, exact, strict=True)]
    assert errors[:3] == pytest.approx([0.037, 0.059, 0.059], abs=0.002)
    assert errors[3] < 1e-6


def test_the_operator_that_a_gpu_runs_gives_what_the_emulation_gives():
    both_ways = []
    for emulated in (True, False):
        torch.manual_seed(0)
        block = Block(512, layer_scale_init=None, grn=False)
        use_fp8(block, emulated=emulated)
        layer = block.pwconv1.bfloat16()
        # 49 rows: the product for the weight's gradient is padded to a multiple of 16.
        x, gradient = torch.randn(49, 512).bfloat16(), torch.randn(49, 2048).bfloat16()
        both_ways.append(run_layer(layer, x, gradient))

    torch.testing.assert_close(both_ways[1], both_ways[0], rtol=0.01, atol=0.01)


def test_only_pointwise_layers_of_wide_blocks_are_in_fp8():
    plain, fp8 = both(**NARROW_AND_WIDE)

    changed = [
        name
        for (name, before), after in zip(plain.named_modules(), fp8.modules(), strict=True)
        if type(before) is not type(after)
    ]

    assert changed == [f"stages.1.{n}.pwconv{layer}" for n in (0, 1) for layer in (1, 2)]


def test_names_order_and_values_of_the_weights_stay():
    plain, fp8 = both(**NARROW_AND_WIDE)

    assert list(fp8.state_dict()) == list(plain.state_dict())
    for (name, before), (other, after) in zip(
        plain.named_parameters(), fp8.named_parameters(), strict=True
    ):
        assert name == other
        assert type(after) is nn.Parameter
        assert torch.equal(before, after), name


def test_checkpoints_go_both_ways():
    plain, fp8 = both(**NARROW_AND_WIDE)
    other = ConvNeXt(**NARROW_AND_WIDE)

    fp8.load_state_dict(other.state_dict())
    plain.load_state_dict(fp8.state_dict())

    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(plain(images), other(images))


def test_a_network_in_fp8_learns_nearly_the_same():
    images = torch.randn(3, 3, 40, 40)
    logits, gradients = [], []

    for model in both(**NARROW_AND_WIDE):
        out_NK = model(images)
        out_NK.square().sum().backward()
        logits.append(out_NK.detach())
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))

    assert 0 < error(logits[1], logits[0]) < 0.05
    assert 0 < error(gradients[1], gradients[0]) < 0.1


def test_a_block_in_fp8_compiles_as_one_graph():
    _, fp8 = both(**NARROW_AND_WIDE, drop_path=0.5, drop_path_kind="skip")
    images = torch.randn(4, 3, 16, 16)
    outs = []

    for network in (fp8, torch.compile(fp8, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        outs.append(network(images))
        outs[-1].sum().backward()
    torch.compiler.reset()

    torch.testing.assert_close(outs[1], outs[0])


@pytest.mark.parametrize(
    "name", [name for name, variant in VARIANTS.items() if variant.family != "timm"]
)
def test_a_plan_counts_the_layers_that_are_in_fp8(name):
    with torch.device("meta"):
        model = build_convnext(VARIANTS[name], num_classes=2)

    assert use_fp8(model, emulated=True) == count_fp8_layers(VARIANTS[name])


@pytest.mark.parametrize(("dim", "takes"), [(384, False), (512, True), (520, False), (768, True)])
def test_narrow_blocks_and_odd_widths_stay(dim, takes):
    assert takes_fp8(dim) == takes
