"""Which way of computing a block is fastest on this device, for each stage of a network.

```
each stage  -> one block of its shape, in each way it has: right? how long, forward and backward?
the fastest -> a file of this card and these versions, so that the next run need not measure
```

A way that does not run on the device, or whose results are further from float32's than those of
PyTorch's own operators in the same precision, is left out and named.
"""

import json
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import assert_never

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from convnext_cli import __version__
from convnext_cli.catalog.ways import WHOLE, Way
from convnext_cli.kernels.launch import count_shared_bytes
from convnext_cli.models.convnext import Block, ConvNeXt

Clock = Callable[[Callable[[], object]], float]
"""Milliseconds that a piece of work takes on the device."""

_CHECKED_IMAGES = 32
"""Float32 results, which take twice the memory, are made of so many."""

_TIMED, _WARM_UPS = 20, 5
_AHEAD_BYTES, _AHEAD_SECONDS = 2**28, 5e-5
"""What the device writes before each piece of work, more than its cache holds, and the least time
that it takes. Written often enough, it gives the host the time to launch all of the piece:
otherwise a short one would be timed by how fast it is launched."""
_MOST_WRITES = 512
"""Before a piece of work; a device takes in about a thousand launches before the host waits."""

_WORSE, _NOISE = 2.0, 1e-3
"""Error that a way may have against float32: so many times the plain one's, and that much."""


def time_on_gpu(work: Callable[[], object]) -> float:
    """Median milliseconds of a piece of work on the GPU, launching not counted."""
    for _ in range(_WARM_UPS):
        work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    launching = time.perf_counter() - started
    ahead = torch.empty(_AHEAD_BYTES, dtype=torch.uint8, device="cuda")
    writes = 1 + math.ceil(1.5 * launching / _AHEAD_SECONDS)
    marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    late = 0
    while len(marks) < _TIMED:
        for _ in range(writes):
            ahead.zero_()
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        begun: bool = start.query()  # type: ignore[no-untyped-call]
        if begun and late < _TIMED:  # before all was launched
            late += 1
            writes = max(writes, min(2 * writes, _MOST_WRITES))
        else:
            marks.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(float(start.elapsed_time(end)) for start, end in marks)


@dataclass(frozen=True)
class StageShape:
    """What decides how long a block takes."""

    images: int
    height: int
    width: int
    dim: int
    grn: bool
    layer_scale: bool
    drops: bool
    dtype: str

    @property
    def key(self) -> str:
        """One word for it."""
        marks = [name for name in ("grn", "layer_scale", "drops") if getattr(self, name)]
        size = f"{self.images}x{self.height}x{self.width}x{self.dim}"
        return "-".join((size, self.dtype, *marks))


@dataclass(frozen=True)
class Choice:
    """What was chosen for one stage."""

    way: Way
    milliseconds: dict[Way, float]
    """Of a forward and a backward pass of one block."""
    left_out: dict[Way, str]
    """Ways that cannot be used here, and why."""
    lasting: bool = True
    """Whether the reasons are the kernels' own, and not such as a full memory or disk."""


def list_shapes(
    model: ConvNeXt, *, images: int, image_px: int, dtype: torch.dtype
) -> list[StageShape]:
    """The shape of each stage's blocks, by the one that drops the most."""
    side = image_px // (16 if model.isotropic else 4)
    shapes = []
    for blocks in model.list_stages():
        last = blocks[-1]
        shapes.append(
            StageShape(
                images=images,
                height=side,
                width=side,
                dim=last.pwconv1.in_features,
                grn=last.grn is not None,
                layer_scale=last.gamma is not None,
                drops=model.drop_path > 0,
                dtype=str(dtype).removeprefix("torch."),
            )
        )
        side //= 2
    return shapes


def list_usable(block: Block, *, device: torch.device, dtype: torch.dtype) -> tuple[Way, ...]:
    """The ways of a block that a device has room for.

    A GPU has none for whole blocks in fp32: compiled for sm_90, they want up to 288 KiB of shared
    memory, and 34 KiB of local memory for each thread.
    """
    if device.type == "cuda" and dtype == torch.float32:
        return tuple(way for way in block.ways() if way not in WHOLE)
    room, dim = count_shared_bytes(device), block.pwconv1.in_features
    return tuple(way for way in block.ways() if _shared_bytes(way, dim) <= room)


def _shared_bytes(way: Way, dim: int) -> int:
    """Shared memory that a program of a way wants at most, compiled for sm_86 and bfloat16."""
    match way:
        case "plain":
            return 0
        case "positions":
            return 16_384
        case "kept":
            return 81_920
        case "recomputed":
            return 98_560 if dim <= 192 else 131_328
        case _:
            assert_never(way)


def choose_ways(
    model: ConvNeXt,
    *,
    images: int,
    image_px: int,
    device: torch.device,
    dtype: torch.dtype,
    cache: Path,
    clock: Clock = time_on_gpu,
    say: Callable[[str], None] = lambda _: None,
) -> list[Choice]:
    """The fastest way of each stage that gives right results; measured where no file has it.

    Args:
        model: Whose blocks; it is not changed.
        images: Of a pass.
        image_px: Side of an image.
        device: Where it will run.
        dtype: Of autocast; float32: without.
        cache: Folder of what was measured before.
        clock: How a piece of work is timed.
        say: Told in a sentence what is measured and what was left out.
    """
    file = cache / f"{_name_of(device)}.json"
    known = _read(file)
    choices = []
    for shape, blocks in zip(
        list_shapes(model, images=images, image_px=image_px, dtype=dtype),
        model.list_stages(),
        strict=True,
    ):
        ways = list_usable(blocks[-1], device=device, dtype=dtype)
        if len(ways) == 1:  # as in fp8; the key is that of the same blocks in bf16
            choices.append(Choice(ways[0], {}, {}))
            continue
        choice = known.get(shape.key)
        if choice is None or {*choice.milliseconds, *choice.left_out} != set(ways):
            say(f"measuring kernels for blocks of {shape.key}, once on this machine")
            choice = measure_stage(shape, ways, device=device, clock=clock)
            known[shape.key] = choice
            try:
                _write(file, known)
            except OSError as error:
                say(f"{file} cannot be written, so the next run measures again: {error}")
            if device.type == "cuda":  # what training takes is told without this
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
        for way, why in choice.left_out.items():
            again = "" if choice.lasting else "; the next run tries again"
            say(f"blocks of {shape.key} go without {way} kernels: {why}{again}")
        choices.append(choice)
    return choices


def measure_stage(
    shape: StageShape, ways: Sequence[Way], *, device: torch.device, clock: Clock
) -> Choice:
    """Measure a block of one shape in each way; `plain` has to work."""
    dtype: torch.dtype = getattr(torch, shape.dtype)
    block = _make_block(shape, device)
    x_NCHW, grad_NCHW = (
        torch.randn(shape.images, shape.dim, shape.height, shape.width, device=device).to(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    factor_N = None
    if shape.drops:  # every second image
        factor_N = torch.arange(shape.images, device=device) % 2 * 2.0
    check = partial(
        _run,
        block,
        x_NCHW[:_CHECKED_IMAGES],
        grad_NCHW[:_CHECKED_IMAGES],
        None if factor_N is None else factor_N[:_CHECKED_IMAGES],
    )
    exact = check(dtype=torch.float32)
    plain_errors = _errors(check(dtype=dtype), exact)
    milliseconds: dict[Way, float] = {}
    left_out: dict[Way, str] = {}
    lasting = True
    for way in ways:
        block.way = way
        torch.compiler.reset()
        try:
            errors = _errors(check(dtype=dtype), exact)
            bad = [
                f"{name} is off by {error:.1e}"
                for (name, error), plain in zip(errors.items(), plain_errors.values(), strict=True)
                if not error <= _WORSE * plain + _NOISE
            ]
            if bad and way != "plain":
                left_out[way] = bad[0]
                continue
            # A whole block is one operator: there is nothing for the compiler to join.
            compiles = device.type == "cuda" and way not in WHOLE
            fast = torch.compile(block) if compiles else block
            milliseconds[way] = clock(partial(_run, fast, x_NCHW, grad_NCHW, factor_N, dtype=dtype))
        except Exception as error:  # compilers raise anything; it is told, and the way is not used
            if way == "plain":
                raise
            left_out[way] = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
            lasting = lasting and isinstance(error, CompilationError | OutOfResources)
    fastest = min(milliseconds, key=lambda way: milliseconds[way])
    return Choice(fastest, milliseconds, left_out, lasting)


def _make_block(shape: StageShape, device: torch.device) -> Block:
    """A block whose every part changes its output."""
    with torch.random.fork_rng(devices=[]):  # drawn on the CPU
        torch.manual_seed(0)
        layer_scale_init = 1.0 if shape.layer_scale else None
        block = Block(shape.dim, layer_scale_init=layer_scale_init, grn=shape.grn)
        with torch.no_grad():
            for parameter in block.parameters():
                wide = parameter.ndim > 1 and parameter.shape[0] > 1
                parameter.normal_(std=parameter[0].numel() ** -0.5 if wide else 0.5)
    block.to(device).to(memory_format=torch.channels_last)
    return block.train()


def _run(
    block: Callable[[Tensor, Tensor | None], Tensor],
    x_NCHW: Tensor,
    grad_NCHW: Tensor,
    factor_N: Tensor | None,
    *,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Output and gradients of one pass."""
    x_NCHW = x_NCHW.to(dtype).requires_grad_()
    device = x_NCHW.device
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        out_NCHW = block(x_NCHW, factor_N)
    parameters = dict(block.named_parameters()) if isinstance(block, torch.nn.Module) else {}
    grads = torch.autograd.grad(
        out_NCHW, [x_NCHW, *parameters.values()], grad_NCHW.to(out_NCHW.dtype)
    )
    return {"output": out_NCHW.detach(), **dict(zip(("input", *parameters), grads, strict=True))}


def _errors(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each result, by norm; a gradient may be zero where all is dropped."""
    return {
        name: float((value.float() - exact[name]).norm() / exact[name].norm().clamp_min(1e-12))
        for name, value in got.items()
    }


def _name_of(device: torch.device) -> str:
    """The card and the versions that decide what is fast on it."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = (f"{name}{version(name)}" for name in ("torch", "triton"))
    parts = (card, f"convnext{__version__}", *versions)
    return "-".join(part.replace(" ", "_").replace("/", "_") for part in parts)


def _read(file: Path) -> dict[str, Choice]:
    """What was measured before; nothing where the file is not there or damaged."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return {key: Choice(**row) for key, row in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # it is measured anew


def _write(file: Path, choices: dict[str, Choice]) -> None:
    """Put the file in its place in one step: other processes may read it."""
    rows = {key: choice.__dict__ for key, choice in sorted(choices.items()) if choice.lasting}
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}.part")
    beside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)
