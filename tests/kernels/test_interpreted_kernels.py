"""Every kernel against its twin in float64, on fresh random numbers.

A kernel may be off by what its twin is off by in the same dtype, twice, and a little. Products of
bfloat16 are left to a GPU: the interpreter multiplies their bit patterns.
"""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from convnext_cli.kernels import depthwise, gelu, grn, mlp, norm
from convnext_cli.kernels.mlp import Mlp, MlpGrads

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOOR = {torch.float32: 3e-7, torch.float16: 2e-4, torch.bfloat16: 5e-3}
"""The interpreter cuts bfloat16 off, where a GPU rounds: twice the error."""


def assert_as_exact(kernel: Sequence, twin: Sequence, exact: Sequence, dtype: torch.dtype) -> None:
    assert len(kernel) == len(twin) == len(exact)
    for number, (got, plain, right) in enumerate(zip(kernel, twin, exact, strict=True)):
        assert got.shape == plain.shape == right.shape
        assert got.dtype == plain.dtype
        norm_of = right.norm().clamp_min(1e-9)
        error = float((got.double() - right).norm() / norm_of)
        allowed = 2 * float((plain.double() - right).norm() / norm_of) + FLOOR[dtype]
        assert error <= allowed, f"result {number}: {error:.1e}, allowed {allowed:.1e}"


def exactly(values: Sequence) -> list:
    return [None if value is None else value.double() for value in values]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 7, 7, 64),
        (2, 5, 12, 32),
        (3, 1, 1, 40),  # fewer positions than the kernel is wide, channels that fill no program
        (1, 3, 11, 96),
        (2, 5, 14, 32),
        (1, 2, 3, 16),
    ],
)
def test_depthwise_convolution_and_its_gradients(shape, dtype):
    x, grad, add = (torch.randn(shape).to(dtype) for _ in range(3))
    weight = torch.randn(shape[-1], 1, 7, 7).to(dtype).float()
    bias = torch.randn(shape[-1]).to(dtype).float()

    forward = depthwise.depthwise(x, weight, bias)
    dx = depthwise.depthwise_input_grad(grad, weight, add_NHWC=add)
    alone = depthwise.depthwise_input_grad(grad, weight)
    dweight, dbias = depthwise.depthwise_weight_grad(x, grad)

    def twins(x, grad, add, weight, bias):
        return (
            depthwise.depthwise_twin(x, weight, bias),
            depthwise.depthwise_input_grad_twin(grad, weight, add_NHWC=add),
            depthwise.depthwise_input_grad_twin(grad, weight),
            *depthwise.depthwise_weight_grad_twin(x, grad),
        )

    assert_as_exact(
        (forward, dx, alone, dweight, dbias),
        twins(x, grad, add, weight, bias),
        twins(*exactly((x, grad, add, weight, bias))),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [32, 96, 256])  # in one kernel, or normalised by a second
def test_depthwise_convolution_with_layer_norm(channels, dtype):
    x = torch.randn(1, 3, 7, channels).to(dtype)
    weight = torch.randn(channels, 1, 7, 7).to(dtype).float()
    bias = 10 * torch.randn(channels).to(dtype).float()  # a mean that is large beside the spread

    kernel = depthwise.depthwise_norm(x, weight, bias, eps=1e-6)

    twin = depthwise.depthwise_norm_twin(x, weight, bias, eps=1e-6)
    exact = depthwise.depthwise_norm_twin(*exactly((x, weight, bias)), eps=1e-6)
    assert_as_exact(kernel, twin, exact, dtype)


def test_the_weight_gradient_is_the_same_to_the_bit_every_time():
    x, grad = torch.randn(2, 3, 9, 14, 32).unbind()

    first, second = (depthwise.depthwise_weight_grad(x, grad) for _ in range(2))

    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 96), (33, 40), (5, 1536)])
def test_layer_norm_and_its_gradient(shape, dtype):
    x, grad = torch.randn(2, *shape).to(dtype).unbind()
    xhat, rstd = norm.normalise_twin(x, eps=1e-6)

    kernel = (*norm.normalise(x, eps=1e-6), norm.normalise_backward(grad, xhat, rstd))

    twin = (xhat, rstd, norm.normalise_backward_twin(grad, xhat, rstd))
    exact = (
        *norm.normalise_twin(x.double(), eps=1e-6),
        norm.normalise_backward_twin(*exactly((grad, xhat, rstd))),
    )
    assert_as_exact(kernel, twin, exact, dtype)


def make_mlp(dim: int, *, gamma: bool, keep: Sequence[float] | None, dtype: torch.dtype) -> Mlp:
    return Mlp(
        w1=(torch.randn(4 * dim, dim) / dim**0.5).to(dtype),
        b1=torch.randn(4 * dim),
        w2=(torch.randn(dim, 4 * dim) / dim**0.5).to(dtype),
        b2=torch.randn(dim),
        gamma=torch.randn(dim) if gamma else None,
        keep=None if keep is None else torch.tensor(keep),
    )


def as_list(grads: MlpGrads) -> list:
    return [value for value in dataclasses.astuple(grads) if value is not None]


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("images", "positions", "dim", "gamma", "keep"),
    [
        (1, 33, 32, True, None),
        (3, 11, 96, True, (0.0, 1.25, 1.25)),
        (2, 70, 64, False, (2.0, 0.0)),
        (1, 130, 160, True, (1.0,)),  # the gradients of the matrices by plain products
    ],
)
@pytest.mark.parametrize("recomputed", [True, False])
def test_network_over_channels(images, positions, dim, gamma, keep, recomputed, dtype, monkeypatch):
    weights = make_mlp(dim, gamma=gamma, keep=keep, dtype=dtype)
    xhat, x, grad = torch.randn(3, images * positions, dim).to(dtype).unbind()
    rstd = 0.5 + torch.rand(images * positions)

    def run(xhat, x, grad, rstd, weights):
        if recomputed:
            out = mlp.forward_recomputed(xhat, x, weights)
            return [out, *as_list(mlp.backward_recomputed(grad, xhat, rstd, weights))]
        out, h = mlp.forward_kept(xhat, x, weights)
        return [out, h, *as_list(mlp.backward_kept(grad, xhat, rstd, h, weights))]

    kernel = run(xhat, x, grad, rstd, weights)

    for module in (mlp, norm):
        monkeypatch.setattr(module, "uses_triton", lambda _: False)
    twin = run(xhat, x, grad, rstd, weights)
    exact = run(*exactly((xhat, x, grad, rstd)), Mlp(*exactly(dataclasses.astuple(weights))))
    assert_as_exact(kernel, twin, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("images", "positions", "units", "keep"),
    [(1, 33, 128, None), (3, 11, 160, (0.0, 1.25, 1.25)), (2, 70, 256, (2.0, 0.0))],
)
def test_gelu_between_two_products(images, positions, units, keep, dtype):
    h, grad = torch.randn(2, images * positions, units).to(dtype).unbind()
    bias = torch.randn(units)
    factor = None if keep is None else torch.tensor(keep)

    kernel = (gelu.gelu(h, bias, factor), *gelu.gelu_backward(grad, h, bias, factor))

    def twins(h, grad, bias, factor):
        return (
            gelu.gelu_twin(h, bias, factor),
            *gelu.gelu_backward_twin(grad, h, bias, factor),
        )

    exact = twins(*exactly((h, grad, bias, factor)))
    assert_as_exact(kernel, twins(h, grad, bias, factor), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    "cut",
    [
        mlp.GradCut(rows=32, units=32, warps=4, stages=2),
        mlp.GradCut(rows=16, units=64, warps=4, stages=1, programs=4),
        mlp.GradCut(rows=64, units=128, warps=8, stages=3),
        mlp.GradCut(rows=32, units=64, warps=4, stages=2, both=False),
    ],
)
@pytest.mark.parametrize(
    ("images", "positions", "dim", "gamma", "keep"),
    [
        (1, 33, 32, True, None),
        (3, 27, 96, True, (0.0, 1.25, 1.25)),
        (3, 43, 64, False, (2.0, 0.0, 2.0)),
        (1, 7, 64, False, None),
    ],
)
def test_kept_gradients_however_they_are_cut(images, positions, dim, gamma, keep, cut, dtype):
    weights = make_mlp(dim, gamma=gamma, keep=keep, dtype=dtype)
    xhat, grad = torch.randn(2, images * positions, dim).to(dtype).unbind()
    h = torch.randn(images * positions, 4 * dim).to(dtype)

    kernel = mlp.kept_grads(grad, xhat, h, weights, cut=cut)
    again = mlp.kept_grads(grad, xhat, h, weights, cut=cut)

    twin = mlp.kept_grads_twin(grad, xhat, h, weights)
    weights_exact = Mlp(*exactly(dataclasses.astuple(weights)))
    exact = mlp.kept_grads_twin(*exactly((grad, xhat, h)), weights_exact)
    kernel_as_twin = [got.to(plain.dtype) for got, plain in zip(kernel, twin, strict=True)]
    assert_as_exact(kernel_as_twin, twin, exact, dtype)
    assert all(torch.equal(left, right) for left, right in zip(kernel, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_hidden_gradient(dtype):
    weights = make_mlp(96, gamma=True, keep=(0.0, 1.25), dtype=dtype)
    grad = torch.randn(2 * 27, 96).to(dtype)
    h = torch.randn(2 * 27, 4 * 96).to(dtype)

    kernel = mlp.hidden_grad(grad, h, weights)

    twin = mlp.hidden_grad_twin(grad, h, weights)
    weights_exact = Mlp(*exactly(dataclasses.astuple(weights)))
    assert_as_exact(kernel, twin, mlp.hidden_grad_twin(*exactly((grad, h)), weights_exact), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("cut", [mlp.ForwardCut(32, 32, 4, 3), mlp.ForwardCut(64, 128, 8, 2)])
def test_kept_forward_however_it_is_cut(cut, dtype):
    weights = make_mlp(96, gamma=True, keep=(0.0, 1.25), dtype=dtype)
    xhat, x = torch.randn(2, 2 * 27, 96).to(dtype).unbind()

    kernel = mlp.forward_kept(xhat, x, weights, cut=cut)

    twin = mlp.forward_kept_twin(xhat, x, weights)
    weights_exact = Mlp(*exactly(dataclasses.astuple(weights)))
    assert_as_exact(kernel, twin, mlp.forward_kept_twin(*exactly((xhat, x)), weights_exact), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 4, 10_000])
@pytest.mark.parametrize(
    ("images", "positions", "channels", "keep"),
    [(1, 300, 96, None), (3, 49, 160, (0.0, 1.25, 1.25)), (1, 1, 40, (2.0,))],
)
def test_a_sum_over_kept_rows(images, positions, channels, keep, programs, dtype, monkeypatch):
    monkeypatch.setattr(mlp, "count_programs", lambda *_, **__: programs)
    grad = torch.randn(images * positions, channels).to(dtype)
    factor = None if keep is None else torch.tensor(keep)

    kernel = mlp.sum_kept(grad, factor)

    twin, exact = (mlp.sum_kept_twin(*each) for each in ((grad, factor), exactly((grad, factor))))
    assert_as_exact([kernel], [twin], [exact], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("images", "positions", "units", "keep"),
    [
        (1, 49, 128, None),
        (3, 20, 160, (0.0, 1.25, 1.25)),
        (2, 130, 1184, (2.0, 0.0)),  # more units than a program of one image takes at a time
        (2, 1, 40, None),
    ],
)
def test_gelu_and_grn(images, positions, units, keep, dtype):
    h, grad = torch.randn(2, images * positions, units).to(dtype).unbind()
    bias, gamma, beta = torch.randn(3, units).unbind()
    h[:, 7], bias[7] = 0, 0  # a unit that is silent has no energy to divide by
    factor = None if keep is None else torch.tensor(keep)

    def run(forward, backward, h, grad, bias, gamma, beta, factor):
        out, squares = forward(h, bias, gamma, beta, factor, images=images)
        return [out, squares, *backward(grad, h, squares, bias, gamma, factor)]

    given = (h, grad, bias, gamma, beta, factor)
    kernel = run(grn.gelu_grn, grn.gelu_grn_backward, *given)

    twins = (grn.gelu_grn_twin, grn.gelu_grn_backward_twin)
    assert_as_exact(kernel, run(*twins, *given), run(*twins, *exactly(given)), dtype)


@pytest.mark.parametrize(("programs", "parts"), [(1, 1), (24, 2), (10_000, 5)])
def test_grn_sums_alike_however_its_positions_are_cut(programs, parts, monkeypatch):
    monkeypatch.setattr(grn, "count_programs", lambda *_, **__: programs)
    h, grad = torch.randn(2, 4 * 130, 256).unbind()
    bias, gamma, beta = torch.randn(3, 256).unbind()

    out, squares = grn.gelu_grn(h, bias, gamma, beta, None, images=4)
    grads = grn.gelu_grn_backward(grad, h, squares, bias, gamma, None)

    assert grn._cut_positions(h, 4)[1] == parts
    right, squares_twin = grn.gelu_grn_twin(h, bias, gamma, beta, None, images=4)
    torch.testing.assert_close((out, squares), (right, squares_twin), rtol=1e-4, atol=1e-4)
    grads_twin = grn.gelu_grn_backward_twin(grad, h, squares_twin, bias, gamma, None)
    torch.testing.assert_close(grads, grads_twin, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recomputed", [True, False])
def test_a_young_layer_scale_leaves_gradients_in_fp16(recomputed, monkeypatch):
    weights = make_mlp(32, gamma=True, keep=(2.0,), dtype=torch.float16)
    weights = dataclasses.replace(weights, gamma=1e-6 * weights.gamma)
    xhat, grad = torch.randn(2, 33, 32).to(torch.float16).unbind()
    rstd = 0.5 + torch.rand(33)

    def run(xhat, grad, rstd, weights):
        if recomputed:
            return mlp.backward_recomputed(grad, xhat, rstd, weights)
        return mlp.backward_kept(grad, xhat, rstd, mlp.hidden(xhat, weights), weights)

    got = run(xhat, grad, rstd, weights)

    for module in (mlp, norm):
        monkeypatch.setattr(module, "uses_triton", lambda _: False)
    exact = run(*exactly((xhat, grad, rstd)), Mlp(*exactly(dataclasses.astuple(weights))))
    assert (got.b1.double() - exact.b1).norm() / exact.b1.norm() < 2e-3


@pytest.mark.parametrize(
    ("way", "grn"),
    [
        *(("recomputed", False), ("kept", False)),
        *(("positions", False), ("positions", True)),
    ],
)
def test_results_lie_in_memory_as_the_compiler_is_told(way, grn):
    # What is compiled around an operator asserts the strides that its fake promises.
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            del types
            done = op(*args, **(kwargs or {}))
            if op.namespace == "convnext":
                seen.append((op, args, done))
            return done

    from convnext_cli.models.convnext import Block

    block = Block(32, layer_scale_init=None if grn else 1.0, grn=grn).train()
    block.way = way
    x = torch.randn(2, 32, 4, 6, requires_grad=True)
    with Watch():
        block(x, torch.tensor([0.0, 2.0])).sum().backward()

    assert len(seen) == (4 if way == "positions" else 2)  # each forward and backward
    for op, args, done in seen:
        mode = FakeTensorMode()
        told = [
            mode.from_tensor(given.detach()) if isinstance(given, torch.Tensor) else given
            for given in args
        ]
        with mode:
            promised = op(*told)
        pairs = [(done, promised)]
        if not isinstance(done, torch.Tensor):
            pairs = list(zip(done, promised, strict=True))
        for number, (got, fake) in enumerate(pairs):
            assert got.dtype == fake.dtype, (op, number)
            assert (got.shape, got.stride()) == (fake.shape, fake.stride()), (op, number)


@pytest.mark.parametrize(("shared_bytes", "units"), [(101_376, 64), (232_448, 128)])
def test_a_card_with_little_shared_memory_gets_smaller_programs(shared_bytes, units, monkeypatch):
    told = []
    monkeypatch.setattr(mlp, "count_shared_bytes", lambda _: shared_bytes)
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **named: told.append(named))
    with torch.device("meta"):
        weights = make_mlp(192, gamma=True, keep=None, dtype=torch.bfloat16)
        grad, h = torch.empty(64, 192), torch.empty(64, 4 * 192)

    mlp.kept_grads(grad, grad, h, weights)

    assert [one["UNITS"] for one in told] == [units]


@pytest.mark.parametrize("dim", [64, 128, 320])
def test_a_large_batch_has_room_on_every_axis_of_a_grid(dim, monkeypatch):
    grids = []

    def run(self, *args, grid, **kwargs):
        del args, kwargs
        grids.append((self.fn.__name__, grid))

    monkeypatch.setattr(InterpretedFunction, "run", run)
    images, side = 2048, 384 // 4
    with torch.device("meta"):
        x_NHWC = torch.empty(images, side, side, dim, dtype=torch.bfloat16)
        h = torch.empty(x_NHWC[..., 0].numel(), 4 * dim, dtype=torch.bfloat16)
        weight, bias = torch.empty(dim, 1, 7, 7), torch.empty(dim)
        sums = torch.empty(images, 4 * dim)
        weights = make_mlp(dim, gamma=True, keep=[1.0] * images, dtype=torch.bfloat16)
    x = x_NHWC.view(-1, dim)
    rstd = x.new_empty(len(x))

    depthwise.depthwise_norm(x_NHWC, weight, bias, eps=1e-6)
    depthwise.depthwise_input_grad(x_NHWC, weight)
    depthwise.depthwise_weight_grad(x_NHWC, x_NHWC)
    gelu.gelu(h, weights.b1, weights.keep)
    gelu.gelu_backward(h, h, weights.b1, weights.keep)
    grn.gelu_grn(h, weights.b1, weights.b1, weights.b1, weights.keep, images=images)
    grn.gelu_grn_backward(h, h, sums, weights.b1, weights.b1, weights.keep)
    mlp.forward_kept(x, x, weights)
    mlp.backward_kept(x, x, rstd, h, weights)
    mlp.forward_recomputed(x, x, weights)
    mlp.backward_recomputed(x, x, rstd, weights)
    mlp.project(h, x, weights)
    mlp.hidden_grad(x, h, weights)

    assert len(grids) >= 16
    for name, (_, *others) in grids:
        assert all(programs <= 65_535 for programs in others), name


@pytest.mark.parametrize(
    ("channels", "most", "cut"),
    [(96, 256, (32, 3)), (384, 256, (64, 3)), (768, 256, (128, 2)), (768, 128, (128, 1))],
)
def test_a_program_has_as_many_columns_as_it_has_registers_for(channels, most, cut):
    assert mlp.cut_columns(channels, most=most) == cut


@pytest.mark.parametrize(
    ("channels", "tile"), [(32, 32), (96, 64), (128, 128), (160, 128), (192, 128), (224, 64)]
)
def test_products_are_as_wide_as_powers_of_two_allow(channels, tile):
    assert mlp.widest_tile(channels, most=128) == tile


@pytest.mark.parametrize("grn", [False, True])
def test_a_whole_block_takes_any_strides(grn):
    from convnext_cli.models.convnext import Block

    block = Block(32, layer_scale_init=None if grn else 1.0, grn=grn).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 32, 4, 6)  # contiguous, so that a block's NHWC view of it is not
    results = []
    for way in block.ways()[:3]:
        block.way = way
        leaf = x.clone().requires_grad_()
        out = block(leaf)
        out.backward(torch.ones_like(out).cumsum(2))  # and so is this gradient
        results.append([out.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())])
        block.zero_grad()

    for other in results[1:]:
        for got, plain in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, plain, rtol=2e-4, atol=2e-4)


def test_gelu_between_two_products_takes_any_strides():
    from convnext_cli.kernels.block import activate

    wide, bias = torch.randn(2, 3, 4, 96), torch.randn(64)
    results = []
    for h in (wide[..., :64], wide[..., :64].contiguous()):  # a slice, with space between its rows
        leaf = h.detach().requires_grad_()
        out = activate(leaf, bias, None)
        out.sum().backward()  # one value, expanded
        results.append((out, leaf.grad))

    assert all(map(torch.equal, *results))
    torch.testing.assert_close(results[0][0], torch.nn.functional.gelu(wide[..., :64] + bias))
