"""Where the time of a training step goes: device time by operator class, from torch's profiler.

```
GPU   kernels and copies of the device; each belongs to what was open on the host at its launch
CPU   operators, each without the time of those that it called
```

What Inductor compiles for a CPU is no operator: there its time is in the step and in no class.

The trace is read as torch exports it for Chrome, which is the same in every version and can be
written by hand in a test.
"""

import json
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import torch
from torch.profiler import ProfilerActivity

from convnext_cli.bench.operators import Launcher, OperatorClass, classify
from convnext_cli.bench.report import KernelTime

_HOST = {"cpu_op", "user_annotation"}
_LAUNCH = {"cuda_runtime", "cuda_driver"}
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


class Event(TypedDict):
    """An event of a trace; times in microseconds."""

    cat: str
    name: str
    pid: int | str
    tid: int | str
    ts: float
    dur: float
    args: Mapping[str, object]


def trace_step(step: Callable[[], object], *, steps: int, device: str) -> list[KernelTime]:
    """Run a system's step under the profiler; its kernels, the costliest first.

    Raises:
        RuntimeError: The profiler saw none.
    """

    def run() -> None:
        for _ in range(steps):
            step()

    kernels = sum_kernels(record_events(run, device=device), steps=steps, device=device)
    if not kernels:
        raise RuntimeError("torch's profiler saw no work of the device")
    return kernels


def record_events(
    work: Callable[[], object], *, device: str = "cpu", memory: bool = False
) -> list[Event]:
    """All events of a piece of work that have a time.

    Args:
        work: What is run once, and waited for.
        device: Where it runs: `cuda` or `cpu`.
        memory: Allocations instead of the shapes of operators.
    """
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with warnings.catch_warnings():
        # Keeping events for the profiler's own tables takes 20 times as long as writing the trace.
        warnings.filterwarnings("ignore", message=".*Profiler clears events", category=UserWarning)
        profiler = torch.profiler.profile(
            activities=activities, record_shapes=not memory, profile_memory=memory
        )
        profiler.start()
    try:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    finally:
        profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("ph") in {"X", "i"} and "cat" in event]


def sum_kernels(events: Iterable[Event], *, steps: int, device: str) -> list[KernelTime]:
    """What the events of a trace came to, the costliest first.

    Args:
        events: Complete events (`"ph": "X"`).
        steps: Steps that were traced, over which times are divided.
        device: `cuda`: kernels count; `cpu`: operators.
    """
    times: defaultdict[tuple[str, OperatorClass], float] = defaultdict(float)
    launches: Counter[tuple[str, OperatorClass]] = Counter()
    timed = _iter_kernels(events) if device == "cuda" else _iter_operators(events)
    for name, launchers, microseconds in timed:
        key = (name, classify(name, launchers))
        times[key] += microseconds
        launches[key] += 1
    return [
        KernelTime(name, kind, microseconds / 1e3 / steps, launches[name, kind] / steps)
        for (name, kind), microseconds in sorted(times.items(), key=lambda each: -each[1])
    ]


def sum_classes(kernels: Iterable[KernelTime]) -> dict[OperatorClass, float]:
    """Milliseconds a step of each operator class that there is."""
    times: defaultdict[OperatorClass, float] = defaultdict(float)
    for kernel in kernels:
        times[kernel.operators] += kernel.milliseconds
    return dict(times)


def _iter_kernels(events: Iterable[Event]) -> Iterator[tuple[str, list[Launcher], float]]:
    """Kernels of the device with what was open at their launch, and microseconds.

    A kernel names its operator, or else its launch, which may be of a thread of another number.
    """
    kept = [event for event in events if event["cat"] in _HOST | _LAUNCH | _DEVICE]
    opened: dict[tuple[str, object], list[Event]] = {}
    for event, open_events in _iter_nested(each for each in kept if each["cat"] not in _DEVICE):
        key = "correlation" if event["cat"] in _LAUNCH else "External id"
        if (number := event.get("args", {}).get(key)) is not None:
            inner = [] if event["cat"] in _LAUNCH else [event]
            opened[key, number] = [*inner, *reversed(open_events)]
    for event in kept:
        if event["cat"] in _DEVICE:
            keys = [(key, event["args"].get(key)) for key in ("External id", "correlation")]
            found = next((opened[key] for key in keys if key in opened), [])
            yield event["name"], [_make_launcher(each) for each in found], event["dur"]


def _iter_operators(events: Iterable[Event]) -> Iterator[tuple[str, list[Launcher], float]]:
    """Operators with themselves and what was open around them, and microseconds of their own."""
    inner: defaultdict[int, float] = defaultdict(float)
    nested = list(_iter_nested(event for event in events if event["cat"] in _HOST))
    for event, open_events in nested:
        if open_events:
            inner[id(open_events[-1])] += event["dur"]
    for event, open_events in nested:
        if event["cat"] == "cpu_op":
            launchers = [_make_launcher(each) for each in (event, *reversed(open_events))]
            yield event["name"], launchers, max(0.0, event["dur"] - inner[id(event)])


def _iter_nested(events: Iterable[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Events of the host, each with those of its thread within which it began, outermost first."""
    threads: defaultdict[tuple[object, object], list[Event]] = defaultdict(list)
    for event in events:
        threads[event["pid"], event["tid"]].append(event)
    for thread in threads.values():
        open_events: list[Event] = []
        for event in sorted(thread, key=lambda each: (each["ts"], -each["dur"])):
            while open_events and event["ts"] >= open_events[-1]["ts"] + open_events[-1]["dur"]:
                open_events.pop()
            yield event, list(open_events)
            open_events.append(event)


def _make_launcher(event: Event) -> Launcher:
    shapes = event.get("args", {}).get("Input Dims")
    if not isinstance(shapes, list):
        return Launcher(event["name"])
    return Launcher(event["name"], tuple(_read_shape(shape) for shape in shapes))


def _read_shape(shape: object) -> tuple[int, ...]:
    """A tensor's shape; empty for a list of tensors, whose shapes are nested."""
    if isinstance(shape, list) and all(isinstance(size, int) for size in shape):
        return tuple(shape)
    return ()
