"""Images per second of whole training steps: this project against others, interleaved in one run.

```
plans             the numbers that all systems share, one plan for each report
                  every system of every plan, step_systems.py, each alone in a step_process.py
all are ready     then plan after plan is measured
round r           each system in turn, random order, takes the same number of steps
ratio             of a round: seconds of the peer over ours; the median of all rounds
floor             what the rates of this very device allow; roofline.py
then, if asked    a trace of some steps of each system, so that none disturbs a round
at the end        memory, if asked, when all processes have ended
```
"""

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import wait as wait_for_any

import torch

from convnext_cli.bench.machine import measure_rates, name_device, read_versions
from convnext_cli.bench.memory import measure_memory
from convnext_cli.bench.operators import OPERATOR_CLASSES, OperatorClass
from convnext_cli.bench.report import (
    ClassTime,
    KernelTime,
    Ratio,
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
from convnext_cli.bench.step_process import Start, Started, StepError, StepProcess
from convnext_cli.bench.step_systems import StepSystem, find_op_list
from convnext_cli.bench.trace import sum_classes
from convnext_cli.catalog.models import find_variant
from convnext_cli.plan.resolve import Plan

_TRACED_STEPS = 3
_TOP_KERNELS = 25


@dataclass
class _Measured:
    process: StepProcess
    start_seconds: float = math.nan
    ways: tuple[str, ...] = ()
    seconds: list[float] = field(default_factory=list)
    """Of each round."""
    peak_bytes: int = 0
    loss: float = math.nan


def compare_steps(
    plans: Sequence[Plan],
    *,
    peers: Sequence[StepSystem],
    steps: int,
    rounds: int,
    profiled: bool = False,
    memory_plans: Sequence[Sequence[tuple[Plan, Plan]]] = (),
    on_progress: Callable[[str], None] = lambda _: None,
) -> Iterator[StepReport]:
    """Measure this project's training step against others on one device.

    Args:
        plans: Of one device, one pass a step; each gets a report, as soon as it is whole.
        peers: Systems to compare with; one that cannot run is reported, not raised.
        steps: Optimizer steps of each system in a round.
        rounds: How often.
        profiled: Whether the time of a step is traced to its kernels, after the rounds.
        memory_plans: For each plan, pairs of plans for `measure_memory`, after everything else.
        on_progress: Called with what happens now.

    Raises:
        UserError: This project's own step does not run; after the reports of the other plans.
    """
    device = plans[0].cluster.device
    on_progress("measuring the device")
    rates = {
        precision: measure_rates(device, precision=precision)
        for precision in dict.fromkeys(plan.precision for plan in plans)
    }
    if device == "cuda":
        torch.cuda.empty_cache()  # the systems need it
    names: tuple[StepSystem, ...] = tuple(dict.fromkeys(("convnext", *peers)))
    unmeasured: list[tuple[StepReport, Sequence[tuple[Plan, Plan]]]] = []
    with ExitStack() as ending:
        comparisons = []
        for plan in plans:
            comparison = _Comparison(plan, rates[plan.precision])
            ending.callback(comparison.close)
            comparison.open(names)
            comparisons.append(comparison)
        _start_all(comparisons, on_progress)
        for number, comparison in enumerate(comparisons):
            report = comparison.measure(steps, rounds, profiled=profiled, on_progress=on_progress)
            comparison.close()
            if report is None:
                continue
            if memory_plans:
                unmeasured.append((report, memory_plans[number]))
            else:
                yield report
    for report, pairs in unmeasured:
        on_progress(f"measuring memory of {report.model}")
        yield _add_memory(report, pairs)
    for comparison in comparisons:
        if comparison.error is not None:
            raise comparison.error


def _start_all(comparisons: Sequence["_Comparison"], on_progress: Callable[[str], None]) -> None:
    """Wait until every system is ready or has failed; without any of this project's, no longer."""
    waiting = {
        measured.process.pipe: (comparison, name)
        for comparison in comparisons
        for name, measured in comparison.running.items()
    }
    total, ready = len(waiting), 0
    again: list[tuple[_Comparison, StepSystem]] = []
    while any(comparison.error is None for comparison in comparisons) and waiting:
        on_progress(f"compiling: {ready} of {total} systems are ready")
        answered = wait_for_any(list(waiting))
        for pipe in [pipe for pipe in waiting if pipe in answered]:
            comparison, name = waiting.pop(pipe)
            if name not in comparison.running:  # this project's step has failed meanwhile
                continue
            try:
                if comparison.receive_start(name):
                    again.append((comparison, name))
                ready += 1
            except StepError as error:
                comparison.leave_out(name, error)
        waiting = {pipe: each for pipe, each in waiting.items() if not pipe.closed}
    for comparison, name in again:
        if name in comparison.running:
            on_progress(f"starting {name} again, alone: {comparison.plan.recipe.model.name}")
            try:
                comparison.start_alone(name)
            except StepError as error:
                comparison.leave_out(name, error)


class _Comparison:
    """One plan, and the systems that take its steps."""

    def __init__(self, plan: Plan, rates: Rates) -> None:
        self.plan = plan
        self.rates = rates
        self.running: dict[StepSystem, _Measured] = {}
        self.failed: dict[str, str] = {}
        self.error: Exception | None = None
        """Of this project's own step: nothing is left to compare then."""

    def open(self, names: Sequence[StepSystem]) -> None:
        """Start a process for each system, and do not wait for it."""
        for name in names:
            self.running[name] = _Measured(StepProcess(name, self.plan))
            with suppress(StepError):  # which is told when its answer is waited for
                self.running[name].process.send(Start(alone=False))

    def receive_start(self, name: StepSystem) -> bool:
        """Take in that a system is ready; whether it has to be started again, alone."""
        measured = self.running[name]
        try:
            started = measured.process.receive()
        except StepError as error:
            if error.again:
                return True
            raise
        assert isinstance(started, Started)
        measured.start_seconds, measured.ways = started.seconds, started.ways
        return started.again

    def start_alone(self, name: StepSystem) -> None:
        """Start a system again; the seconds are of the first time, which found no caches."""
        measured = self.running[name]
        started = measured.process.start(alone=True)
        measured.ways = started.ways
        if math.isnan(measured.start_seconds):
            measured.start_seconds = started.seconds

    def leave_out(self, name: StepSystem, error: StepError) -> None:
        """A peer fails in its own ways: out of memory, or in its compiler."""
        if name == "convnext":
            self.error = error.cause
            self.close()
            return
        self.running.pop(name).process.close()
        self.failed[name] = str(error)

    def close(self) -> None:
        """End all processes."""
        while self.running:
            self.running.popitem()[1].process.close()

    def measure(
        self, steps: int, rounds: int, *, profiled: bool, on_progress: Callable[[str], None]
    ) -> StepReport | None:
        """Rounds, then traces; None where this project's own step does not run."""
        model = self.plan.recipe.model.name
        shuffle = random.Random(0)  # the order of rounds
        for number in range(rounds):
            for name in shuffle.sample(list(self.running), len(self.running)):
                if (measured := self.running.get(name)) is None:
                    continue  # this project's step has failed meanwhile
                on_progress(f"{model}, round {number + 1} of {rounds}: {name}")
                try:
                    taken = measured.process.take(steps)
                except StepError as error:
                    self.leave_out(name, error)
                    continue
                measured.seconds.append(taken.seconds)
                measured.peak_bytes = max(measured.peak_bytes, taken.peak_bytes)
                measured.loss = taken.loss
        if self.error is not None:
            return None
        profiles: list[StepProfile] = []
        for name, measured in self.running.items() if profiled else ():
            on_progress(f"{model}, tracing {name}")
            try:
                kernels = measured.process.trace(_TRACED_STEPS)
            except StepError as error:  # the rates are known and worth more than their trace
                self.failed[f"the trace of {name}"] = str(error)
            else:
                profiles.append(_profile(name, measured, kernels, self.plan, steps, self.rates))
        return self._report(steps, rounds, profiles)

    def _report(self, steps: int, rounds: int, profiles: Sequence[StepProfile]) -> StepReport:
        plan, rates, running = self.plan, self.rates, self.running
        measured = {name: _rate(name, each, plan, steps, rates) for name, each in running.items()}
        ratios = tuple(
            _ratio(running["convnext"], name, each)
            for name, each in running.items()
            if name != "convnext"
        )
        return StepReport(
            date=datetime.now(UTC).date().isoformat(),
            model=plan.recipe.model.name,
            device=name_device(plan.cluster.device),
            versions=read_versions(plan.cluster.device),
            images=plan.per_device_images,
            image_px=plan.recipe.data.image_px,
            precision=plan.precision,
            compiled=plan.compile,
            kernels=_describe_kernels(plan, running["convnext"].ways),
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
            memory=(),
            failed=self.failed,
        )


def _add_memory(report: StepReport, pairs: Sequence[tuple[Plan, Plan]]) -> StepReport:
    torch.backends.cudnn.benchmark = True  # as the systems do; its choices take memory
    try:
        return dataclasses.replace(report, memory=measure_memory(pairs))
    except RuntimeError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return dataclasses.replace(report, failed={**report.failed, "memory": reason})


def _describe_kernels(plan: Plan, ways: Sequence[str]) -> str:
    return f"{plan.kernels}: {', '.join(ways)}" if ways else plan.kernels


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
    name: StepSystem,
    measured: _Measured,
    kernels: Sequence[KernelTime],
    plan: Plan,
    steps: int,
    rates: Rates,
) -> StepProfile:
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
