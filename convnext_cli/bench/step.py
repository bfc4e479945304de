"""Images per second of whole training steps: this project against others, interleaved in one run.

```
a plan            the numbers that all systems share
                  every system in this process, warmed up; steps.py
round r           each system in turn, random order, takes the same number of steps
ratio             of a round: seconds of the peer over ours; the median of all rounds
floor             what the rates of this very device allow; roofline.py
then, if asked    a trace of some steps of each system, and memory; so that neither disturbs a round
```
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch

from convnext_cli.bench.machine import measure_rates, name_device, read_versions, wait
from convnext_cli.bench.memory import measure_memory
from convnext_cli.bench.operators import OPERATOR_CLASSES, OperatorClass
from convnext_cli.bench.report import (
    ClassTime,
    Ratio,
    StepMemory,
    StepProfile,
    StepRate,
    StepReport,
)
from convnext_cli.bench.roofline import (
    AUTOCAST,
    DATA_SHEETS,
    FP32,
    NARROW,
    OP_LISTS,
    Floor,
    OpList,
    Rates,
    Widths,
    estimate_floor,
)
from convnext_cli.bench.steps import OwnStep, StepSystem, TrainingStep, build_step, find_op_list
from convnext_cli.bench.trace import sum_classes, trace_step
from convnext_cli.catalog.models import find_variant
from convnext_cli.errors import PlanError, UserError
from convnext_cli.plan.resolve import Plan

_WARM_UP_STEPS = 3
_TRACED_STEPS = 3
_TOP_KERNELS = 25


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
    profiled: bool = False,
    memory_plans: Sequence[tuple[Plan, Plan]] = (),
    on_progress: Callable[[str], None] = lambda _: None,
) -> StepReport:
    """Measure this project's training step against others on one device.

    Args:
        plan: Of one device, one pass a step.
        peers: Systems to compare with; one that cannot run is reported, not raised.
        steps: Optimizer steps of each system in a round.
        rounds: How often.
        profiled: Whether the time of a step is traced to its kernels, after the rounds.
        memory_plans: Pairs of plans for `measure_memory`, after everything else.
        on_progress: Called with what happens now.

    Raises:
        UserError: This project's own step does not run.
    """
    device = plan.cluster.device
    torch.backends.cudnn.benchmark = True  # shapes are fixed; timm and torchvision set it, too
    on_progress("measuring the device")
    name_of_device = name_device(device)
    rates = measure_rates(device, precision=plan.precision)
    running: dict[StepSystem, _Measured] = {}
    failed: dict[str, str] = {}

    def leave_out(name: StepSystem, error: Exception) -> None:
        """A peer fails in its own ways: out of memory, or in its compiler."""
        if name == "convnext":
            raise error
        running.pop(name, None)
        failed[name] = _first_line(error)
        gc.collect()

    for name in dict.fromkeys(("convnext", *peers)):
        on_progress(f"warming up {name}")
        try:
            running[name] = _start(name, plan)
        except (UserError, RuntimeError) as error:
            leave_out(name, error)
    shuffle = random.Random(0)  # the order of rounds
    for number in range(rounds):
        for name in shuffle.sample(list(running), len(running)):
            on_progress(f"round {number + 1} of {rounds}: {name}")
            others = sum(each.held_bytes for each in running.values())
            try:
                _take_steps(running[name], steps, device=device, others=others)
            except RuntimeError as error:
                leave_out(name, error)
    # Everything that is said of a system is of its rounds, so profiles and memory come last.
    kernels = _describe_kernels(plan, running["convnext"].step)  # memory is measured alone
    measured = {name: _rate(name, each, plan, steps, rates) for name, each in running.items()}
    ratios = tuple(
        _ratio(running["convnext"], name, each)
        for name, each in running.items()
        if name != "convnext"
    )
    profiles: list[StepProfile] = []
    for name in [*running] if profiled else []:
        on_progress(f"tracing {name}")
        try:
            profiles.append(_profile(name, running[name], plan, steps, rates))
        except RuntimeError as error:  # the rates are known and worth more than their trace
            failed[f"the trace of {name}"] = _first_line(error)
    memory: tuple[StepMemory, ...] = ()
    if memory_plans:
        on_progress("measuring memory")
        running.clear()
        try:
            memory = measure_memory(memory_plans)
        except RuntimeError as error:
            failed["memory"] = _first_line(error)
    return StepReport(
        date=datetime.now(UTC).date().isoformat(),
        model=plan.recipe.model.name,
        device=name_of_device,
        versions=read_versions(device),
        images=plan.per_device_images,
        image_px=plan.recipe.data.image_px,
        precision=plan.precision,
        compiled=plan.compile,
        kernels=kernels,
        steps=steps,
        rounds=rounds,
        flops_per_image=_model_flops(plan),
        matmul_flops_per_second=rates.matmul_flops,
        copy_bytes_per_second=rates.copy_bytes,
        floors=_make_floors(plan, rates),
        rates=tuple(measured.values()),
        ratios=ratios,
        best_peer=_find_best(ratios, measured),
        profiles=tuple(profiles),
        memory=memory,
        failed=failed,
    )


def _describe_kernels(plan: Plan, step: TrainingStep) -> str:
    ways = step.ways if isinstance(step, OwnStep) else []
    return f"{plan.kernels}: {', '.join(ways)}" if ways else plan.kernels


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _model_flops(plan: Plan) -> float:
    """Of an image: two for each multiply-add, and the backward pass twice the forward."""
    return 6e9 * plan.gmacs


def _floor(plan: Plan, ops: OpList, widths: Widths, rates: Rates) -> Floor | None:
    return estimate_floor(
        find_variant(plan.recipe.model.name),
        ops=ops,
        image_px=plan.recipe.data.image_px,
        images=plan.per_device_images,
        num_classes=plan.num_classes,
        widths=widths,
        rates=rates,
    )


def _make_floors(plan: Plan, rates: Rates) -> tuple[Floor, ...]:
    floors = []
    for ops in OP_LISTS:
        widths = AUTOCAST if ops in {"eager", "compiler"} else NARROW
        floors.append(_floor(plan, ops, FP32 if plan.precision == "fp32" else widths, rates))
    return tuple(floor for floor in floors if floor is not None)


def _find_best(ratios: Sequence[Ratio], measured: Mapping[StepSystem, StepRate]) -> Ratio | None:
    speeds = {rate.system: rate.images_per_second for rate in measured.values()}
    theirs = [ratio for ratio in ratios if not ratio.peer.startswith("convnext")]
    return max(theirs, key=lambda ratio: speeds[ratio.peer], default=None)


def _start(name: StepSystem, plan: Plan) -> _Measured:
    device = plan.cluster.device
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    step = build_step(name, plan)
    started = time.perf_counter()
    loss = step()
    wait(device)
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
    wait(device)
    started = time.perf_counter()
    loss = measured.step()
    for _ in range(steps - 1):
        loss = measured.step()
    wait(device)
    measured.seconds.append(time.perf_counter() - started)
    measured.loss = loss.item()
    if device == "cuda":
        alone = torch.cuda.max_memory_allocated() - others + measured.held_bytes
        measured.peak_bytes = max(measured.peak_bytes, alone)


def _rate(name: StepSystem, measured: _Measured, plan: Plan, steps: int, rates: Rates) -> StepRate:
    speeds = [steps * plan.per_device_images / seconds for seconds in measured.seconds]
    median = statistics.median(speeds)
    flops = median * _model_flops(plan)
    sheet = DATA_SHEETS.get(name_device(plan.cluster.device))
    ops, widths = find_op_list(name, plan)
    floor = _floor(plan, ops, widths, rates)
    best = _floor(plan, "best per stage", FP32 if plan.precision == "fp32" else NARROW, rates)
    return StepRate(
        system=name,
        images_per_second=median,
        low=min(speeds),
        high=max(speeds),
        matmul_frac=flops / rates.matmul_flops,
        sheet_frac=flops / sheet.bf16_flops_per_second
        if sheet is not None and plan.precision == "bf16"
        else None,
        floor_ops=ops,
        floor_images_per_second=None if floor is None else floor.images_per_second,
        floor_frac=None if floor is None else median / floor.images_per_second,
        best_floor_frac=None if best is None else median / best.images_per_second,
        peak_bytes=measured.peak_bytes or None,
        start_seconds=measured.start_seconds,
        loss=measured.loss,
    )


def _profile(
    name: StepSystem, measured: _Measured, plan: Plan, steps: int, rates: Rates
) -> StepProfile:
    kernels = trace_step(measured.step, steps=_TRACED_STEPS, device=plan.cluster.device)
    times = sum_classes(kernels)
    total = sum(times.values())
    ops, widths = find_op_list(name, plan)
    floor = _floor(plan, ops, widths, rates)
    floors = {} if floor is None else dict(floor.microseconds)
    if "depthwise gradients" in times:  # one operator makes both
        gradients: tuple[OperatorClass, ...] = (
            "depthwise input gradient",
            "depthwise weight gradient",
        )
        floors["depthwise gradients"] = sum(floors.pop(kind, 0.0) for kind in gradients)
    return StepProfile(
        system=name,
        step_milliseconds=1e3 * statistics.median(measured.seconds) / steps,
        device_milliseconds=total,
        classes=tuple(
            ClassTime(
                operators=kind,
                milliseconds=times.get(kind, 0.0),
                share=times.get(kind, 0.0) / total if total else 0.0,
                floor_milliseconds=floors[kind] * plan.per_device_images / 1e3
                if kind in floors
                else None,
            )
            for kind in OPERATOR_CLASSES
            if kind in times or kind in floors
        ),
        kernels=tuple(kernels[:_TOP_KERNELS]),
    )


def _ratio(ours: _Measured, peer: str, theirs: _Measured) -> Ratio:
    ratios = [their / our for our, their in zip(ours.seconds, theirs.seconds, strict=True)]
    return Ratio("convnext", peer, statistics.median(ratios), min(ratios), max(ratios))
