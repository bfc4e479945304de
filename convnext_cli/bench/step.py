"""Images per second of whole training steps: this project against others, interleaved in one run.

```
a plan            the numbers that all systems share
                  every system in this process, warmed up; steps.py
round r           each system in turn, random order, takes the same number of steps
ratio             of a round: seconds of the peer over ours; the median of all rounds
```
"""

import gc
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import torch

from convnext_cli.bench.report import Ratio, StepRate, StepReport
from convnext_cli.bench.steps import StepSystem, TrainingStep, build_step
from convnext_cli.errors import PlanError, UserError
from convnext_cli.plan.resolve import Plan

_WARM_UP_STEPS = 3
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
_MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
_TRIES = 10


@dataclass
class _Measured:
    step: TrainingStep
    held_bytes: int
    """Of the device, between steps."""
    start_seconds: float
    seconds: list[float] = field(default_factory=list)
    """Of each round."""
    peak_bytes: int = 0
    loss: float = math.nan


def compare_steps(
    plan: Plan,
    *,
    peers: Sequence[StepSystem],
    steps: int,
    rounds: int,
    on_progress: Callable[[str], None] = lambda _: None,
) -> StepReport:
    """Measure this project's training step against others on one device.

    Args:
        plan: Of one device, one pass a step.
        peers: Systems to compare with; one that cannot run is reported, not raised.
        steps: Optimizer steps of each system in a round.
        rounds: How often.
        on_progress: Called with what happens now.

    Raises:
        UserError: This project's own step does not run.
    """
    device = plan.cluster.device
    torch.backends.cudnn.benchmark = True  # shapes are fixed; timm and torchvision set it, too
    on_progress("measuring the device")
    matmul, copied = measure_matmul(plan), measure_copy(device)
    running: dict[StepSystem, _Measured] = {}
    failed: dict[str, str] = {}
    for name in dict.fromkeys(("convnext", *peers)):
        on_progress(f"warming up {name}")
        try:
            running[name] = _start(name, plan)
        except (UserError, torch.OutOfMemoryError) as error:
            if name == "convnext":
                raise
            failed[name] = str(error).splitlines()[0]
            gc.collect()
    shuffle = random.Random(0)  # the order of rounds
    held_bytes = sum(measured.held_bytes for measured in running.values())
    for number in range(rounds):
        for name in shuffle.sample(list(running), len(running)):
            on_progress(f"round {number + 1} of {rounds}: {name}")
            _take_steps(running[name], steps, device=device, others=held_bytes)
    images = steps * plan.per_device_images
    flops = 6e9 * plan.gmacs
    return StepReport(
        model=plan.recipe.model.name,
        device=torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
        versions={name: version(name) for name in ("torch", "timm", "torchvision")},
        images=plan.per_device_images,
        image_px=plan.recipe.data.image_px,
        precision=plan.precision,
        compiled=plan.compile,
        steps=steps,
        rounds=rounds,
        flops_per_image=flops,
        matmul_flops_per_second=matmul,
        copy_bytes_per_second=copied,
        rates=tuple(
            _rate(name, measured, images=images, flops=flops, matmul=matmul)
            for name, measured in running.items()
        ),
        ratios=tuple(
            _ratio(running["convnext"], name, measured)
            for name, measured in running.items()
            if name != "convnext"
        ),
        failed=failed,
    )


def _start(name: StepSystem, plan: Plan) -> _Measured:
    device = plan.cluster.device
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    step = build_step(name, plan)
    started = time.perf_counter()
    loss = step()
    _wait(device)
    seconds = time.perf_counter() - started
    for _ in range(_WARM_UP_STEPS):
        loss = step()
    if not math.isfinite(loss.item()):
        raise PlanError(f"{name}: the loss is not finite", hint="use --precision fp32")
    held = torch.cuda.memory_allocated() - before if device == "cuda" else 0
    return _Measured(step, held, seconds)


def _take_steps(measured: _Measured, steps: int, *, device: str, others: int) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _wait(device)
    started = time.perf_counter()
    loss = measured.step()
    for _ in range(steps - 1):
        loss = measured.step()
    _wait(device)
    measured.seconds.append(time.perf_counter() - started)
    measured.loss = loss.item()
    if device == "cuda":
        alone = torch.cuda.max_memory_allocated() - others + measured.held_bytes
        measured.peak_bytes = max(measured.peak_bytes, alone)


def _rate(name: str, measured: _Measured, *, images: int, flops: float, matmul: float) -> StepRate:
    rates = [images / seconds for seconds in measured.seconds]
    median = statistics.median(rates)
    return StepRate(
        system=name,
        images_per_second=median,
        low=min(rates),
        high=max(rates),
        matmul_frac=median * flops / matmul,
        peak_bytes=measured.peak_bytes or None,
        start_seconds=measured.start_seconds,
        loss=measured.loss,
    )


def _ratio(ours: _Measured, peer: str, theirs: _Measured) -> Ratio:
    ratios = [their / our for our, their in zip(ours.seconds, theirs.seconds, strict=True)]
    return Ratio("convnext", peer, statistics.median(ratios), min(ratios), max(ratios))


def measure_matmul(plan: Plan) -> float:
    """FLOP/s of the best of several large matrix products, in the precision of the plan."""
    device = plan.cluster.device
    side = _MATRIX_SIDE[device]
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _best_seconds(lambda: left @ right, device=device)


def measure_copy(device: str) -> float:
    """Bytes a second that the best of several copies of one large tensor reads and writes."""
    source = torch.zeros(_COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device=device)
    return 2 * source.numel() / seconds


def _best_seconds(work: Callable[[], object], *, device: str) -> float:
    times = []
    for _ in range(_TRIES):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
