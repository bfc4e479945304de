"""7x7 depthwise convolution alone: forward and its two gradients, at the shapes of the models.

Each pass is timed with a cold cache: a large buffer is written before it, and the device runs
behind the host, so that no launch is waited for. A perfect pass reads two tensors, or reads one and
writes one, and takes as long as a copy; weights are small.

Shapes: N images, C channels, H height, W width; the weight is (C, 1, 7, 7).
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor

from convnext_cli.bench.machine import measure_copy, name_device, read_versions, wait
from convnext_cli.bench.report import DepthwiseReport, DepthwiseTime, PassTime
from convnext_cli.catalog.models import Variant
from convnext_cli.kernels.depthwise import (
    depthwise,
    depthwise_input_grad,
    depthwise_weight_grad,
)

_KERNEL_PX: Final = 7
_TRIES: Final = 20
_CACHE_BYTES: Final = {"cuda": 1 << 28, "cpu": 1 << 26}
"""More than the last cache of a GPU, and than a CPU core's share of one."""


@dataclass(frozen=True)
class Operators:
    """One system's three passes over tensors that it has put in place; each returns its result."""

    forward: Callable[[], Tensor]
    input_gradient: Callable[[], Tensor]
    weight_gradient: Callable[[], Tensor]


BuildOperators = Callable[[Tensor, Tensor, Tensor], Operators]
"""From input (N, C, H, W), weight and the gradient of the output, all in NCHW memory."""


def build_torch(memory_format: torch.memory_format) -> BuildOperators:
    """Torch's own operator: its own kernels for bf16 in NCHW, cuDNN for channels_last."""

    def build(x_NCHW: Tensor, weight_C1KK: Tensor, grad_NCHW: Tensor) -> Operators:
        x_NCHW, weight_C1KK, grad_NCHW = (
            each.contiguous(memory_format=memory_format)
            for each in (x_NCHW, weight_C1KK, grad_NCHW)
        )
        shape = ([1, 1], [_KERNEL_PX // 2] * 2, [1, 1], False, [0, 0], len(weight_C1KK))

        def backward(*, of_input: bool) -> Tensor:
            gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
                *(grad_NCHW, x_NCHW, weight_C1KK, None),
                *(*shape, [of_input, not of_input, False]),
            )
            return gradients[0 if of_input else 1]

        def forward() -> Tensor:
            y_NCHW: Tensor = torch.ops.aten.convolution(x_NCHW, weight_C1KK, None, *shape)
            return y_NCHW

        return Operators(
            forward,
            lambda: backward(of_input=True),
            lambda: backward(of_input=False),
        )

    return build


def build_own(x_NCHW: Tensor, weight_C1KK: Tensor, grad_NCHW: Tensor) -> Operators:
    """This project's kernels, which take NHWC tensors."""
    x_NHWC, grad_NHWC = (each.permute(0, 2, 3, 1).contiguous() for each in (x_NCHW, grad_NCHW))
    bias_C = torch.zeros(len(weight_C1KK), device=x_NCHW.device)
    return Operators(
        lambda: depthwise(x_NHWC, weight_C1KK, bias_C).permute(0, 3, 1, 2),
        lambda: depthwise_input_grad(grad_NHWC, weight_C1KK).permute(0, 3, 1, 2),
        lambda: depthwise_weight_grad(x_NHWC, grad_NHWC)[0],
    )


SYSTEMS: Final[Mapping[str, BuildOperators]] = MappingProxyType(
    {
        "torch NHWC": build_torch(torch.channels_last),
        "torch NCHW": build_torch(torch.contiguous_format),
        "convnext NHWC": build_own,
    }
)
"""What is measured, by name; results are held against those of the first one."""


def measure_depthwise(
    variants: Sequence[Variant],
    *,
    device: Literal["cpu", "cuda"],
    precision: Literal["fp32", "bf16"],
    images: int,
    image_px: int,
    on_progress: Callable[[str], None] = lambda _: None,
) -> DepthwiseReport:
    """Time every system at every stage of some models, each shape once.

    Args:
        variants: ConvNeXt of any kind.
        device: Where.
        precision: Of all tensors; sums are fp32 in torch's operator.
        images: N.
        image_px: Side of the images; stages have a quarter of it, an eighth and so on.
        on_progress: Called with what happens now.
    """
    torch.backends.cudnn.benchmark = True
    on_progress("measuring the device")
    copied = measure_copy(device)
    flush = torch.empty(_CACHE_BYTES[device], dtype=torch.uint8, device=device)
    times = []
    for channels, side in _find_shapes(variants, image_px=image_px):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        x_NCHW, weight_C1KK, grad_NCHW = (
            torch.randn(shape, device=device, generator=generator).to(dtype)
            for shape in (
                (images, channels, side, side),
                (channels, 1, _KERNEL_PX, _KERNEL_PX),
                (images, channels, side, side),
            )
        )
        moved = 2 * x_NCHW.numel() * x_NCHW.element_size()
        expected: list[Tensor] = []
        for system, build in SYSTEMS.items():
            on_progress(f"{channels} channels at {side} px: {system}")
            operators = build(x_NCHW, weight_C1KK, grad_NCHW)
            works = (operators.forward, operators.input_gradient, operators.weight_gradient)
            expected = expected or [work() for work in works]
            passes = [
                _time_pass(work, result, moved=moved, copied=copied, flush=flush)
                for work, result in zip(works, expected, strict=True)
            ]
            times.append(DepthwiseTime(system, channels, side, *passes))
    return DepthwiseReport(
        date=datetime.now(UTC).date().isoformat(),
        device=name_device(device),
        versions=read_versions(device),
        images=images,
        precision=precision,
        copy_bytes_per_second=copied,
        times=tuple(times),
    )


def _find_shapes(variants: Sequence[Variant], *, image_px: int) -> list[tuple[int, int]]:
    """Channels and side of each stage, without repetition."""
    shapes: dict[tuple[int, int], None] = {}
    for variant in variants:
        first = image_px // (16 if variant.isotropic else 4)
        for stage, dim in enumerate(variant.dims):
            shapes[dim, first >> stage] = None
    return [shape for shape in shapes if shape[1] > 0]


def _time_pass(
    work: Callable[[], Tensor], expected: Tensor, *, moved: int, copied: float, flush: Tensor
) -> PassTime:
    result = work()
    error = (result.float() - expected.float()).norm() / expected.float().norm()
    seconds = statistics.median(_take_seconds(work, flush=flush))
    return PassTime(
        milliseconds=seconds * 1e3,
        copy_frac=moved / seconds / copied,
        error_frac=error.item(),
    )


def _take_seconds(work: Callable[[], Tensor], *, flush: Tensor) -> list[float]:
    if flush.device.type == "cpu":
        seconds = []
        for _ in range(_TRIES):
            flush.zero_()
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return seconds
    marks = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2 * _TRIES)
    ]
    for start, end in zip(marks[::2], marks[1::2], strict=True):
        flush.zero_()
        start.record()
        work()
        end.record()
    wait("cuda")
    return [
        start.elapsed_time(end) / 1e3 for start, end in zip(marks[::2], marks[1::2], strict=True)
    ]
