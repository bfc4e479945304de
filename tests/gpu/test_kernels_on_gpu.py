"""Fused blocks on a real GPU: right in every precision, the same every time, and small."""

import copy

import pytest
import torch
from kernel_curves import assert_within_noise

from convnext_cli.catalog.models import find_variant
from convnext_cli.models.choice import choose_ways, list_usable
from convnext_cli.models.convnext import Block, build_convnext
from convnext_cli.models.layers import PatchConv
from convnext_cli.plan.cost import estimate_activations

SHAPES = [  # images, side, channels: stages of T, B and V2-atto, odd sides, a single image
    *((4, 56, 96), (4, 28, 192), (4, 14, 384), (8, 7, 768)),
    *((4, 56, 128), (4, 28, 256), (4, 14, 512), (8, 7, 1024)),
    *((2, 56, 40), (1, 13, 160), (1, 1, 320), (3, 12, 64), (16, 8, 32)),
]


def run(block, x_NCHW, grad_NCHW, dtype):
    leaf = x_NCHW.to(dtype).requires_grad_()
    kept_N = torch.arange(len(leaf), device=leaf.device) % 3 != 1  # a single image, too
    factor_N = kept_N.to(torch.promote_types(dtype, torch.float32)) / 0.7
    narrow = dtype not in {torch.float32, torch.float64}
    with torch.autocast("cuda", dtype=dtype if narrow else torch.bfloat16, enabled=narrow):
        out = block(leaf, factor_N)
    grads = torch.autograd.grad(out, [leaf, *block.parameters()], grad_NCHW.to(out.dtype))
    return [out.detach(), *grads]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grn", [False, True])
@pytest.mark.parametrize(("images", "side", "dim"), SHAPES)
def test_every_way_is_as_near_float64_as_plain_operators(images, side, dim, grn, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    block = Block(dim, layer_scale_init=None if grn else 1.0, grn=grn).train()
    with torch.no_grad():
        for parameter in block.parameters():
            wide = parameter.ndim > 1 and parameter.shape[0] > 1
            parameter.normal_(std=parameter[0].numel() ** -0.5 if wide else 0.4)
    block.cuda().to(memory_format=torch.channels_last)
    x, grad = (
        torch.randn(images, dim, side, side, device="cuda").to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    exact = run(copy.deepcopy(block).double(), x.double(), grad.double(), torch.float64)
    plain = run(block, x, grad, dtype)
    for way in list_usable(block, device=x.device, dtype=dtype)[1:]:
        block.way = way
        fused = run(block, x, grad, dtype)
        again = run(block, x, grad, dtype)
        for got, same, usual, right in zip(fused, again, plain, exact, strict=True):
            assert torch.equal(got, same), way  # no atomics
            scale = right.norm().clamp_min(1e-9)
            allowed = 2 * (usual.double() - right).norm() / scale + 1e-6
            assert (got.double() - right).norm() / scale <= allowed, way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("channels", "side", "px"), [(3, 4, 64), (96, 2, 14), (96, 2, 7), (3, 16, 48)]
)
def test_patches_are_convolved_as_nearly_as_cudnn_does(channels, side, px, dtype):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    conv = PatchConv(channels, 64, side=side).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(4, channels, px, px, device="cuda").to(memory_format=torch.channels_last)
    grad = torch.randn(4, 64, px // side, px // side, device="cuda")

    def run(conv, forward, dtype):
        leaf = x.to(dtype).requires_grad_()
        narrow = dtype not in {torch.float32, torch.float64}
        with torch.autocast("cuda", dtype=dtype if narrow else torch.bfloat16, enabled=narrow):
            out = forward(conv, leaf)
        grads = torch.autograd.grad(out, [leaf, *conv.parameters()], grad.to(out.dtype))
        return [out.detach(), *grads]

    exact = run(copy.deepcopy(conv).double(), torch.nn.Conv2d.forward, torch.float64)
    plain = run(conv, torch.nn.Conv2d.forward, dtype)
    product = run(conv, PatchConv.forward, dtype)

    assert product[0].is_contiguous(memory_format=torch.channels_last)
    for got, usual, right in zip(product, plain, exact, strict=True):
        allowed = 2 * (usual.double() - right).norm() / right.norm() + 1e-6
        assert (got.double() - right).norm() / right.norm() <= allowed


@pytest.mark.parametrize(
    ("ways", "grn"), [(("recomputed", "kept"), False), (("positions", "positions"), True)]
)
def test_a_fused_training_stays_within_the_noise_of_the_plain_one(ways, grn):
    assert_within_noise(device="cuda", ways=ways, grn=grn)


def test_the_fastest_way_is_found_and_none_is_wrong(tmp_path):
    model = build_convnext(find_variant("convnext_tiny"), num_classes=10, drop_path=0.1)
    said: list[str] = []

    choices = choose_ways(
        model,
        images=16,
        image_px=224,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        cache=tmp_path,
        say=said.append,
    )

    assert [choice.left_out for choice in choices] == [{}] * 4, said
    assert all(min(choice.milliseconds.values()) > 0 for choice in choices)


@pytest.mark.parametrize("fused", [False, True])
def test_activations_take_what_the_plan_says(fused):
    variant = find_variant("convnext_tiny")
    model = build_convnext(variant, num_classes=1000).cuda().to(memory_format=torch.channels_last)
    if fused:
        model.use_ways([blocks[-1].ways()[-1] for blocks in model.list_stages()])
    images = torch.rand(32, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        model(images)  # libraries take memory at their first use, and keep it
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()

    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(images)

    assert logits.requires_grad
    assert torch.cuda.memory_allocated() - before == pytest.approx(
        estimate_activations(
            variant,
            image_px=224,
            images=32,
            parameters=sum(weight.numel() for weight in model.parameters()),
            precision="bf16",
            checkpointing="none",
            fused=fused,
        ),
        rel=0.1,
    )
