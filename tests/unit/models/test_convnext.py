"""The network: names, first values, memory, checkpointing, compile and export."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from convnext_cli.catalog.models import VARIANTS, find_variant
from convnext_cli.models.convnext import Block, ConvNeXt, build_comparison, build_convnext
from convnext_cli.models.drop_path import add_kept, draw_paths

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 5}
KINDS = {
    "v1": {**SMALL, "layer_scale_init": 0.5},
    "v2": {**SMALL, "grn": True},
    "isotropic": {
        "depths": (7,),
        "dims": (16,),
        "num_classes": 5,
        "isotropic": True,
        "layer_scale_init": 0.5,
    },
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def images():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_v1_has_the_official_parameter_names():
    names = [name for name, _ in ConvNeXt(**KINDS["v1"]).named_parameters()]

    assert names[:4] == [
        "downsample_layers.0.0.weight",
        "downsample_layers.0.0.bias",
        "downsample_layers.0.1.weight",
        "downsample_layers.0.1.bias",
    ]
    block = [name.removeprefix("stages.2.1.") for name in names if name.startswith("stages.2.1.")]
    assert block == [
        "gamma",
        "dwconv.weight",
        "dwconv.bias",
        "norm.weight",
        "norm.bias",
        "pwconv1.weight",
        "pwconv1.bias",
        "pwconv2.weight",
        "pwconv2.bias",
    ]
    assert names[-4:] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]


def test_v1_has_the_official_shapes():
    shapes = {name: tuple(p.shape) for name, p in ConvNeXt(**KINDS["v1"]).named_parameters()}

    assert shapes["downsample_layers.0.0.weight"] == (8, 3, 4, 4)
    assert shapes["downsample_layers.1.0.weight"] == (8,)
    assert shapes["downsample_layers.1.1.weight"] == (16, 8, 2, 2)
    assert shapes["stages.3.0.gamma"] == (32,)
    assert shapes["stages.3.0.dwconv.weight"] == (32, 1, 7, 7)
    assert shapes["stages.3.0.pwconv1.weight"] == (128, 32)
    assert shapes["stages.3.0.pwconv2.weight"] == (32, 128)


def test_v2_has_grn_and_no_layer_scale():
    shapes = {name: tuple(p.shape) for name, p in ConvNeXt(**KINDS["v2"]).named_parameters()}

    assert shapes["stages.3.0.grn.gamma"] == shapes["stages.3.0.grn.beta"] == (1, 1, 1, 128)
    assert "stages.3.0.gamma" not in shapes


def test_isotropic_has_the_official_names():
    heads = {name.split(".")[0] for name in ConvNeXt(**KINDS["isotropic"]).state_dict()}

    assert heads == {"stem", "blocks", "norm", "head"}


def test_first_values_are_the_published_ones():
    torch.manual_seed(0)
    model = ConvNeXt(depths=(1, 1), dims=(64, 128), num_classes=1000, layer_scale_init=1e-6)

    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            assert torch.equal(parameter, torch.full_like(parameter, 1e-6)), name
        elif parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_head_init_scale_shrinks_the_head_alone():
    plain, scaled = (
        torch.manual_seed(0) and ConvNeXt(**SMALL, head_init_scale=scale).state_dict()
        for scale in (1.0, 0.001)
    )

    torch.testing.assert_close(scaled.pop("head.weight"), plain.pop("head.weight") * 0.001)
    assert all(torch.equal(scaled[name], plain[name]) for name in scaled)


def test_a_model_made_on_meta_gets_the_same_first_values(kind):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = ConvNeXt(**kind)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))

    torch.manual_seed(0)
    model.init_weights()

    reference = ConvNeXt(**kind)
    torch.manual_seed(0)
    reference.init_weights()
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("drop_path", [-0.1, 1.0])
def test_a_drop_path_that_keeps_nothing_is_refused(drop_path):
    with pytest.raises(ValueError, match="drop_path must be in"):
        ConvNeXt(**SMALL, drop_path=drop_path)


def test_every_block_is_given_its_own_draw_in_training_alone(images):
    model = ConvNeXt(**SMALL, drop_path=0.4)
    given = []
    for block in model.modules():
        if isinstance(block, Block):
            block.register_forward_pre_hook(lambda _block, inputs: given.append(inputs[1]))

    torch.manual_seed(3)
    model(images)
    torch.manual_seed(3)
    drawn = draw_paths(images, blocks=5, drop_path=0.4, kind="scale")
    model.eval()(images)

    assert given[0] is drawn[0] is None
    assert all(torch.equal(*pair) for pair in zip(given[1:5], drawn[1:], strict=True))
    assert given[5:] == [None] * 5


def test_pooling_comes_before_the_last_norm(images):
    model = ConvNeXt(**KINDS["v1"]).eval()
    seen = []
    model.stages[-1][-1].register_forward_hook(lambda *args: seen.append(args[2]))

    features_NC = model.forward_features(images)

    assert features_NC.shape == (4, 32)
    torch.testing.assert_close(features_NC, model.norm(seen[0].mean((2, 3))))
    torch.testing.assert_close(model(images), model.head(features_NC))


def test_a_block_is_the_written_out_formula():
    torch.manual_seed(0)
    block = Block(8, layer_scale_init=0.5, grn=False).double()
    x_NCHW = torch.randn(2, 8, 9, 9, dtype=torch.float64)

    y = nn.functional.conv2d(x_NCHW, block.dwconv.weight, block.dwconv.bias, padding=3, groups=8)
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    y = torch.einsum("nchw,dc->ndhw", y, block.pwconv1.weight) + block.pwconv1.bias[:, None, None]
    y = y * (1 + torch.erf(y / 2**0.5)) / 2
    y = torch.einsum("nchw,dc->ndhw", y, block.pwconv2.weight) + block.pwconv2.bias[:, None, None]

    torch.testing.assert_close(block(x_NCHW), x_NCHW + 0.5 * y)


@pytest.mark.parametrize("drop_path_kind", ["scale", "skip"])
@pytest.mark.parametrize("mode", ["selective", "stages", "blocks"])
def test_checkpointing_changes_no_gradient_even_with_drop_path(kind, images, mode, drop_path_kind):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = ConvNeXt(
            **kind,
            drop_path=0.5,
            gradient_checkpointing=checkpointing,
            drop_path_kind=drop_path_kind,
        )
        torch.manual_seed(1)
        model(images).square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, recomputed = gradients("none"), gradients(mode)

    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name


@pytest.mark.parametrize("mode", ["stages", "blocks"])
def test_checkpointing_keeps_fewer_bytes_for_the_backward_pass(kind, images, mode):
    def saved_bytes(checkpointing):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.nbytes
            return tensor

        model = ConvNeXt(**kind, gradient_checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(images)
        return total

    assert saved_bytes(mode) < 0.5 * saved_bytes("none")


def test_blocks_hand_on_channels_last_memory_whatever_comes_in(kind, images):
    model = ConvNeXt(**kind)
    formats = []
    for block in model.modules():
        if isinstance(block, Block):
            block.register_forward_hook(
                lambda _module, _inputs, out: formats.append(
                    out.is_contiguous(memory_format=torch.channels_last)
                )
            )

    model(images)

    assert len(formats) == sum(kind["depths"])
    assert all(formats)


def test_channels_last_images_and_weights_give_the_same_logits(kind, images):
    model = ConvNeXt(**kind).eval()
    expected = model(images)

    model.to(memory_format=torch.channels_last)

    torch.testing.assert_close(
        model(images.to(memory_format=torch.channels_last)), expected, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_stream_between_blocks_narrow(kind, images, dtype):
    model = ConvNeXt(**kind)
    seen = set()
    for block in model.modules():
        if isinstance(block, Block):
            block.register_forward_hook(lambda _module, _inputs, out: seen.add(out.dtype))

    with torch.autocast("cpu", dtype=dtype):
        logits_NK = model(images)
    logits_NK.float().sum().backward()

    assert seen == {dtype}
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_bfloat16_logits_are_near_the_float32_ones(kind, images):
    torch.manual_seed(0)
    model = ConvNeXt(**kind).eval()
    expected = model(images)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_NK = model(images)

    spread = expected.std().item()
    torch.testing.assert_close(logits_NK.float(), expected, atol=0.05 * spread, rtol=0.02)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", ["none", "selective", "stages", "blocks"])
def test_the_whole_model_compiles_as_one_graph(kind, images, mode):
    torch.manual_seed(0)
    model = ConvNeXt(**kind, gradient_checkpointing=mode)
    expected = model(images)
    expected.sum().backward()
    gradient = model.head.weight.grad.clone()
    model.zero_grad()

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits_NK = compiled(images)
    logits_NK.sum().backward()

    torch.testing.assert_close(logits_NK, expected)
    torch.testing.assert_close(model.head.weight.grad, gradient)


def skipping_gradients(kind, images, *, mode="none", compiled=None):
    torch.manual_seed(0)
    model = ConvNeXt(**kind, drop_path=0.5, drop_path_kind="skip", gradient_checkpointing=mode)
    network = model if compiled is None else compiled(model)
    torch.manual_seed(1)
    network(images).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_skipping_leaves_every_weight_a_gradient(kind, images):
    # DDP waits for all of them.
    assert all(gradient is not None for gradient in skipping_gradients(kind, images))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_skipping_changes_nothing_in_evaluation_or_without_drop_path(kind, images, p):
    torch.manual_seed(0)
    model = ConvNeXt(**kind, drop_path=p)
    skipping = ConvNeXt(**kind, drop_path=p, drop_path_kind="skip")
    skipping.load_state_dict(model.state_dict())

    if p:
        model.eval(), skipping.eval()

    assert torch.equal(skipping(images), model(images))


TWO_BLOCKS = {"depths": (2,), "dims": (8,), "num_classes": 3}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", ["none", "blocks"])
def test_skipping_compiles_as_one_graph_that_draws_the_same_images(images, mode):
    expected = skipping_gradients(TWO_BLOCKS, images, mode=mode)

    def compiled(model):
        return torch.compile(model, backend="aot_eager", fullgraph=True)

    gradients = skipping_gradients(TWO_BLOCKS, images, mode=mode, compiled=compiled)

    torch.testing.assert_close(gradients, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_skipping_compiles_once_whatever_is_drawn():
    counter = CompileCounter()
    block = Block(8, layer_scale_init=1.0, grn=False, drop_path_kind="skip")
    compiled = torch.compile(block, backend=counter, fullgraph=True)

    for _ in range(4):
        compiled(torch.randn(6, 8, 9, 9), torch.randperm(6)[:3])

    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_skipping_compiles_for_a_batch_whose_size_is_left_open():
    block = Block(8, layer_scale_init=1.0, grn=False, drop_path_kind="skip")
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=True)

    assert [
        len(compiled(torch.randn(n, 8, 9, 9), torch.randperm(n)[: n // 2])) for n in (4, 7, 10)
    ] == [4, 7, 10]


@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_s_code_for_skipping_gives_the_same_sum_and_gradient():
    x_NCHW = torch.randn(4, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    kept_k = torch.tensor([2, 0])

    def run(x_NCHW):
        return add_kept(x_NCHW, torch.sin, kept_k)

    both = []
    for function in (run, torch.compile(run, fullgraph=True)):
        leaf = x_NCHW.clone().requires_grad_()
        out = function(leaf)
        out.square().sum().backward()
        both.append((out, leaf.grad))

    torch.testing.assert_close(both[1], both[0])


@pytest.mark.usefixtures("fresh_compiler")
def test_autocast_compiles_as_one_graph(images):
    model = ConvNeXt(**KINDS["v2"], drop_path=0.2)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_NK = torch.compile(model, backend="eager", fullgraph=True)(images)

    assert logits_NK.dtype == torch.bfloat16


def test_the_exported_program_gives_the_same_logits_and_holds_no_autocast(kind, images):
    model = ConvNeXt(**kind, gradient_checkpointing="stages").eval()

    program = torch.export.export(model, (images,))

    torch.testing.assert_close(program.module()(images), model(images))
    assert not [node for node in program.graph.nodes if "autocast" in str(node.target)]


def test_depths_and_dims_must_fit_together():
    with pytest.raises(ValueError, match="do not fit together"):
        ConvNeXt(depths=(1, 1), dims=(8,), num_classes=2)
    with pytest.raises(ValueError, match="do not fit together"):
        ConvNeXt(depths=(1, 1), dims=(8, 16), num_classes=2, isotropic=True)


def test_a_variant_brings_its_own_layer_scale_unless_another_is_asked_for():
    def first_gamma(**options):
        model = build_convnext(find_variant("convnext_tiny"), num_classes=2, **options)
        return model.stages[0][0].gamma

    assert first_gamma()[0].item() == pytest.approx(1e-6)
    assert first_gamma(layer_scale_init=0.25)[0].item() == 0.25
    assert first_gamma(layer_scale_init=None) is None


def test_each_builder_refuses_the_other_family():
    with pytest.raises(ValueError, match="resnet50 is no ConvNeXt"):
        build_convnext(find_variant("resnet50"), num_classes=2)
    with pytest.raises(ValueError, match="convnext_tiny is no comparison model"):
        build_comparison(find_variant("convnext_tiny"), num_classes=2)


@pytest.mark.parametrize(
    "name", [name for name, variant in VARIANTS.items() if variant.family == "timm"]
)
def test_every_comparison_model_takes_drop_path_and_a_head(name):
    with torch.device("meta"):
        model = build_comparison(find_variant(name), num_classes=7, drop_path=0.25)

    rates = [getattr(module, "drop_prob", None) for module in model.modules()]
    assert max(rate for rate in rates if rate is not None) == pytest.approx(0.25)
    assert model.get_classifier().out_features == 7
