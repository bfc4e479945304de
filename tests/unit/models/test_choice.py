"""The fastest way that is right is taken, and measured once."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from convnext_cli.models import choice
from convnext_cli.models.choice import StageShape, choose_ways, list_usable, measure_stage
from convnext_cli.models.convnext import Block, ConvNeXt

SHAPE = StageShape(
    images=2, height=4, width=4, dim=32, grn=False, layer_scale=True, drops=True, dtype="bfloat16"
)
WAYS = ("plain", "positions", "kept", "recomputed")


def count_down():
    """A clock by which each way is faster than the one before."""
    ticks = itertools.count(100, -1)

    def clock(work):
        work()
        return float(next(ticks))

    return clock


def make_model():
    return ConvNeXt(depths=(1, 1), dims=(32, 40), num_classes=3, layer_scale_init=1.0)


def choose(folder, *, clock, say=lambda _: None, model=None):
    return choose_ways(
        model or make_model(),
        images=2,
        image_px=32,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        cache=folder,
        clock=clock,
        say=say,
    )


def test_the_fastest_way_of_each_stage_is_taken_and_not_measured_again(tmp_path):
    said: list[str] = []

    first = choose(tmp_path / "kernels", clock=count_down(), say=said.append)
    second = choose(tmp_path / "kernels", clock=None)

    assert [one.way for one in first] == ["recomputed", "positions"]
    assert first == second
    assert len(said) == 2
    assert "2x8x8x32-bfloat16-layer_scale" in said[0]


@pytest.mark.parametrize("late", [0, 3, 1000])
def test_work_that_begins_before_it_is_launched_is_timed_again(late, monkeypatch):
    """With a device whose first `late` pieces of work begin early and take a second then."""
    writes: list[int] = []

    class Device:
        marks = 0

        def zero_(self):
            writes[-1] += 1

    class Mark:
        def __init__(self, **_):
            Device.marks += 1
            self.early = Device.marks <= 2 * late

        def record(self):
            pass

        def query(self):
            return self.early

        def elapsed_time(self, _):
            return 1000.0 if self.early else 2.0

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Device())

    taken = choice.time_on_gpu(lambda: writes.append(0))

    assert taken == (1000.0 if late == 1000 else 2.0)  # it ends, whatever the device does
    times = writes[choice._WARM_UPS : -1]
    assert len(times) == choice._TIMED + min(late, choice._TIMED)
    assert (len(set(times)) > 1) == (late > 0)


def test_blocks_with_a_single_way_are_neither_measured_nor_kept(tmp_path):
    class InFp8(torch.nn.Linear):
        pass

    first = choose(tmp_path, clock=count_down())
    model = make_model()
    model.stages[0][0].pwconv1 = InFp8(32, 128)

    single = choose(tmp_path, clock=None, model=model)

    assert [one.way for one in single] == ["plain", "positions"]
    assert choose(tmp_path, clock=None) == first


def test_a_damaged_file_is_measured_anew(tmp_path):
    choose(tmp_path, clock=count_down())
    (file,) = tmp_path.glob("*.json")
    file.write_text('{"2x8x8x32-bfloat16-layer_scale": 3}')

    again = choose(tmp_path, clock=count_down())

    assert [one.way for one in again] == ["recomputed", "positions"]


def test_a_way_that_is_wrong_is_left_out_however_fast_it_is(monkeypatch):
    broken = choice.Block.forward_fused

    def forward_fused(self, x_NCHW, drawn, *, recomputed):
        out = broken(self, x_NCHW, drawn, recomputed=recomputed)
        return out * 1.1 if recomputed else out

    monkeypatch.setattr(choice.Block, "forward_fused", forward_fused)

    chosen = measure_stage(SHAPE, WAYS, device=torch.device("cpu"), clock=count_down())

    assert chosen.way == "kept"
    assert "output is off by" in chosen.left_out["recomputed"]


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_a_way_that_does_not_run_is_left_out_and_said(monkeypatch, tmp_path, kind):
    def forward_fused(self, x_NCHW, drawn, *, recomputed):
        raise kind("out of shared memory\nand more")

    monkeypatch.setattr(choice.Block, "forward_fused", forward_fused)
    said: list[str] = []

    chosen = choose(tmp_path, clock=count_down(), say=said.append)

    assert chosen[0].way == "positions"
    assert any(
        f"go without kept kernels: {kind.__name__}: out of shared memory" in told for told in said
    )


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (OSError(28, "No space left on device"), False),
        (OutOfResources(131_072, 101_376, "shared memory"), True),
    ],
)
def test_a_way_that_failed_for_want_of_memory_or_disk_is_tried_by_the_next_run(
    error, lasting, monkeypatch, tmp_path
):
    def forward_fused(self, x_NCHW, drawn, *, recomputed):
        raise error

    said: list[str] = []
    with monkeypatch.context() as failing:
        failing.setattr(choice.Block, "forward_fused", forward_fused)
        choose(tmp_path, clock=count_down(), say=said.append)

    again = choose(tmp_path, clock=count_down())

    assert any(told.endswith("; the next run tries again") for told in said) is not lasting
    assert again[0].way == ("positions" if lasting else "recomputed")


def test_a_folder_that_cannot_be_written_costs_the_next_run_a_measurement(tmp_path):
    (tmp_path / "kernels").write_text("a file")
    said: list[str] = []

    chosen = choose(tmp_path / "kernels", clock=count_down(), say=said.append)

    assert [one.way for one in chosen] == ["recomputed", "positions"]
    assert "cannot be written, so the next run measures again" in said[1]


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "shared_bytes", "last"),
    [
        ("cuda", torch.float32, 96, 232_448, "positions"),
        ("cuda", torch.bfloat16, 96, 232_448, "recomputed"),
        ("cuda", torch.bfloat16, 256, 232_448, "recomputed"),
        ("cuda", torch.bfloat16, 192, 101_376, "recomputed"),  # sm_86, 89 and 120
        ("cuda", torch.bfloat16, 256, 101_376, "kept"),
        ("cuda", torch.float16, 96, 65_536, "positions"),  # sm_75
        ("cpu", torch.float32, 96, 0, "recomputed"),
    ],
)
def test_whole_blocks_are_left_out_where_a_card_has_no_room(
    device, dtype, dim, shared_bytes, last, monkeypatch
):
    card = SimpleNamespace(shared_memory_per_block_optin=shared_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    block = Block(dim, layer_scale_init=1.0, grn=False)

    assert list_usable(block, device=torch.device(device), dtype=dtype)[-1] == last


@pytest.mark.parametrize("grn", [False, True])
def test_no_way_loses_the_gradients_of_a_young_layer_scale_in_fp16(grn):
    torch.manual_seed(0)
    block = Block(32, layer_scale_init=3e-7, grn=grn).train()
    x_NCHW, grad_NCHW = torch.randn(2, 2, 32, 8, 8)

    def run(dtype):
        leaf = x_NCHW.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float16):
            out = block(leaf)
        # the residual's gradient would hide that of the branch, a weight has it alone
        scaled = 2**12 * grad_NCHW  # as a loss scale does
        (got,) = torch.autograd.grad(out, [block.pwconv1.weight], scaled.to(out.dtype))
        return got.flatten().float()

    exact = run(torch.float32)
    for way in list_usable(block, device=torch.device("cpu"), dtype=torch.float16):
        block.way = way
        got = run(torch.float16)
        assert torch.cosine_similarity(got, exact, dim=0) > 0.99, way


def test_plain_operators_have_to_work(monkeypatch):
    def mix_positions(self, x_NCHW):
        raise RuntimeError("broken")

    monkeypatch.setattr(choice.Block, "mix_positions", mix_positions)

    with pytest.raises(RuntimeError, match="broken"):
        measure_stage(SHAPE, WAYS, device=torch.device("cpu"), clock=count_down())
