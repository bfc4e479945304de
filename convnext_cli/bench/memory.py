"""What a training step of this project takes of a device's memory, against what the plan says.

Two batch sizes give a line: what a step holds in any case, and what an image adds. On a GPU the
caching allocator counts; on a CPU, torch's profiler sees every allocation.
"""

import gc
from collections.abc import Iterable, Sequence

import torch

from convnext_cli.bench.report import StepMemory
from convnext_cli.bench.step_systems import build_step
from convnext_cli.bench.trace import Event, record_events
from convnext_cli.plan.resolve import Plan

_STEPS = 3
"""The first makes the optimizer's state, the last finds everything in place."""


def measure_memory(plans: Sequence[tuple[Plan, Plan]]) -> tuple[StepMemory, ...]:
    """Peaks of whole steps, a fresh network for each.

    Args:
        plans: Pairs that differ in the batch alone, the smaller one first.
    """
    reports = []
    if plans:
        _measure_peak(plans[0][0])  # what a process allocates but once is no step's
    for small, large in plans:
        images = (small.per_device_images, large.per_device_images)
        peaks = (_measure_peak(small), _measure_peak(large))
        reports.append(
            make_memory(
                large,
                images=images,
                peaks=peaks,
                predicted=(_predict(small), _predict(large)),
                device_bytes=_device_bytes(large.cluster.device),
            )
        )
    return tuple(reports)


def make_memory(
    plan: Plan,
    *,
    images: tuple[int, int],
    peaks: tuple[int, int],
    predicted: tuple[int, int],
    device_bytes: int | None,
) -> StepMemory:
    """The line through two peaks; the largest batch is even, as mixing wants it."""
    slope = (peaks[1] - peaks[0]) / (images[1] - images[0])
    fixed = peaks[0] - slope * images[0]
    most = None
    if device_bytes is not None and slope > 0:
        most = max(0, int((device_bytes - fixed) / slope)) // 2 * 2
    return StepMemory(
        checkpointing=plan.recipe.compute.gradient_checkpointing,
        images=images,
        peak_bytes=peaks,
        bytes_per_image=slope,
        fixed_bytes=fixed,
        predicted_bytes=predicted,
        most_images=most,
    )


def find_peak(events: Iterable[Event]) -> int:
    """The most bytes of the host's memory that were allocated at once since a trace began."""
    held = most = 0
    memory = [event for event in events if event["name"] == "[memory]"]
    for event in sorted(memory, key=lambda each: each["ts"]):
        size = event["args"].get("Bytes")
        if event["args"].get("Device Type") == 0 and isinstance(size, int):
            held += size
            most = max(most, held)
    return most


def _predict(plan: Plan) -> int:
    chosen = next(each for each in plan.memory if each.strategy == plan.recipe.compute.strategy)
    return chosen.total


def _device_bytes(device: str) -> int | None:
    return torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None


def _measure_peak(plan: Plan) -> int:
    gc.collect()
    # A graph that was compiled for another batch would make this one's sizes dynamic.
    torch.compiler.reset()
    if plan.cluster.device != "cuda":

        def run() -> None:
            step = build_step("convnext", plan)
            for _ in range(_STEPS):
                step()

        return find_peak(record_events(run, memory=True))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = build_step("convnext", plan)
    for _ in range(_STEPS - 1):
        step()
    torch.cuda.reset_peak_memory_stats()  # what compiling and choosing algorithms took is no step's
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
