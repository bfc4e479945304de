"""A block as one operator against the block of PyTorch's operators, through the twins on a CPU."""

import copy
from functools import partial

import pytest
import torch

from convnext_cli.kernels import block as operators
from convnext_cli.models.convnext import Block, ConvNeXt
from convnext_cli.models.drop_path import DropPathKind

CASES = [
    (way, dim, grn)
    for dim, grn in ((32, False), (32, True), (40, True), (40, False))
    for way in Block(dim, layer_scale_init=1.0, grn=grn).ways()
    if way != "plain"
]


def make_block(dim: int, *, grn: bool, kind: DropPathKind = "scale") -> Block:
    """Weights at which every part of the block changes the output."""
    block = Block(
        dim,
        drop_path_kind=kind,
        layer_scale_init=None if grn else 1.0,
        grn=grn,
    )
    with torch.no_grad():
        for parameter in block.parameters():
            wide = parameter.ndim > 1 and parameter.shape[0] > 1
            parameter.normal_(std=parameter[0].numel() ** -0.5 if wide else 0.4)
    return block.train()


def run(block, x_NCHW, grad_NCHW, *, autocast=False, **named):
    """Output and all gradients; every second image is dropped."""
    leaf = x_NCHW.clone().requires_grad_()
    drawn = torch.tensor([0.0, 2.0, 0.0, 2.0], dtype=torch.promote_types(leaf.dtype, torch.float32))
    if block.drop_path_kind == "skip":
        drawn = drawn.nonzero().flatten()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = block(leaf, drawn, **named)
    grads = torch.autograd.grad(out, [leaf, *block.parameters()], grad_NCHW.to(out.dtype))
    return [out.detach(), *grads]


def make_input(dim: int, dtype=torch.float32):
    shape = (4, dim, 6, 5)
    return (torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(2))


def error(got, exact) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp_min(1e-9))


@pytest.mark.parametrize("kind", ["scale", "skip"])
@pytest.mark.parametrize(("way", "dim", "grn"), CASES)
def test_every_way_is_the_same_function_with_the_same_gradients(way, dim, grn, kind):
    block = make_block(dim, grn=grn, kind=kind).double()
    x, grad = make_input(dim, torch.float64)
    plain = run(block, x, grad)

    block.way = way
    fused = run(block, x, grad)

    for got, exact in zip(fused, plain, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("way", "dim", "grn"), CASES)
def test_no_way_is_further_from_float64_than_the_plain_one(way, dim, grn, autocast):
    block = make_block(dim, grn=grn)
    x, grad = make_input(dim, torch.bfloat16 if autocast else torch.float32)
    exact = run(copy.deepcopy(block).double(), x.double(), grad.double())
    plain = run(block, x, grad, autocast=autocast)

    block.way = way
    fused = run(block, x, grad, autocast=autocast)

    for got, usual, right in zip(fused, plain, exact, strict=True):
        assert got.dtype == usual.dtype
        # A short vector's own error may be small by luck: half of a bfloat16's step is allowed for.
        assert error(got, right) <= 2 * error(usual, right) + (2e-3 if autocast else 1e-7)


@pytest.mark.parametrize("recomputed", [True, False])
def test_the_operators_keep_the_contract_of_their_registration(recomputed):
    leaf = partial(torch.randn, requires_grad=True)
    x, weight, bias = leaf(2, 5, 4, 32), leaf(32, 1, 7, 7), leaf(32)
    matrices = (leaf(128, 32), leaf(128), leaf(32, 128), leaf(32))

    torch.library.opcheck(operators.positions, (x, weight, bias, 1e-6))
    for keep, gamma in ((None, None), (torch.tensor([0.0, 2.0]), leaf(32))):
        h, vectors = leaf(2, 5, 4, 128), (leaf(128), leaf(128), leaf(128))
        torch.library.opcheck(operators.activate, (h, vectors[0], keep))
        torch.library.opcheck(operators.activate_grn, (h, *vectors, keep))
        given = (x, weight, bias, *matrices, gamma, keep, 1e-6, recomputed)
        torch.library.opcheck(operators.block, given)


def make_model(*, grn: bool = False) -> ConvNeXt:
    torch.manual_seed(0)
    layer_scale_init = None if grn else 1.0
    model = ConvNeXt(
        depths=(1, 2), dims=(32, 64), num_classes=3, layer_scale_init=layer_scale_init, grn=grn
    )
    model.use_ways(("positions", "positions") if grn else ("recomputed", "kept"))
    return model


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("grn", [False, True])
@pytest.mark.parametrize("mode", ["none", "selective", "stages", "blocks"])
def test_a_fused_network_compiles_as_one_graph_under_checkpointing(mode, grn):
    model = make_model(grn=grn)
    model.gradient_checkpointing = mode
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    plain = torch.autograd.grad(expected.sum(), list(model.parameters()))

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(images)
    grads = torch.autograd.grad(logits.sum(), list(model.parameters()))

    torch.testing.assert_close(logits, expected)
    for got, want in zip(grads, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["selective", "blocks"])
@pytest.mark.parametrize("way", ["plain", "positions", "kept"])
def test_checkpointing_drops_the_same_images_again(way, mode):
    block = make_block(32, grn=False)
    block.way = way
    x, grad = make_input(32)
    plain = run(block, x, grad)

    again = run(block, x, grad, checkpointing=mode)

    for got, want in zip(again, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_fused_network_is_exported_with_its_operators_and_the_same_state_dict():
    model = make_model().eval()
    keys = list(model.state_dict())
    images = torch.randn(1, 3, 32, 32)

    program = torch.export.export(model, (images,))

    called = {str(node.target) for node in program.graph.nodes}
    assert "convnext.block.default" in called
    torch.testing.assert_close(program.module()(images), model(images))
    model.use_ways(("plain", "plain"))
    assert list(model.state_dict()) == keys


def test_a_way_that_a_width_does_not_have_is_refused():
    model = ConvNeXt(depths=(1, 1), dims=(40, 80), num_classes=3)

    with pytest.raises(ValueError, match="blocks of 40 channels have no way kept"):
        model.use_ways(("kept", "plain"))
