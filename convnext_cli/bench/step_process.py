"""One of the systems that are compared, in a process of its own.

```
step.py                    Start, Take, Trace                      serve, in the system's process
StepProcess.send       ------------ pipe ------------>             build_step, the first steps
StepProcess.receive    <----------- pipe -------------             take steps, trace them
                       Started, Taken, kernels; Failure
```

All systems start at once, because compilers take minutes on one core each. Kernels that were timed
while other systems used the device may be chosen wrongly: such a choice is not kept, and the system
asks to be started again, alone. So does one that recorded its kernels then, or ran out of memory.

While one system takes steps the others wait for a request. Memory that they could do without is
given back to the device, so a system takes one step before its time counts.
"""

import gc
import math
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from filecmp import cmp
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

from convnext_cli.bench.machine import wait
from convnext_cli.bench.report import KernelTime
from convnext_cli.bench.step_systems import OwnStep, StepSystem, TrainingStep, build_step
from convnext_cli.bench.trace import trace_step
from convnext_cli.data.fetch import default_cache_home
from convnext_cli.data.pool import follow_parent
from convnext_cli.errors import PlanError, UserError
from convnext_cli.plan.resolve import Plan

_WARM_UP_STEPS = 3
_END_SECONDS = 10
"""A process that does not end within them is killed."""


@dataclass(frozen=True)
class Start:
    """Build the system, and take its first steps."""

    alone: bool
    """No other system uses the device meanwhile."""


@dataclass(frozen=True)
class Take:
    """Take steps."""

    steps: int


@dataclass(frozen=True)
class Trace:
    """Take steps under the profiler."""

    steps: int


@dataclass(frozen=True)
class Started:
    """The system is ready."""

    seconds: float
    """Of the first step."""
    ways: tuple[str, ...]
    """Of this project's stages."""
    again: bool
    """It had to time kernels while it was not alone."""


@dataclass(frozen=True)
class Taken:
    """What the steps came to."""

    seconds: float
    peak_bytes: int
    """Of the device, allocated by this process; 0 on a CPU."""
    loss: float


@dataclass(frozen=True)
class Failure:
    """A request that was not done."""

    reason: str
    """In a line."""
    cause: UserError | RuntimeError
    """The user's mistake, such as a batch for which there is no room; of anything else its
    traceback."""
    again: bool
    """It found no memory while it was not alone."""


Request = Start | Take | Trace
Answer = Started | Taken | list[KernelTime] | Failure
A = TypeVar("A", bound=Answer)


class StepError(Exception):
    """A system failed: why, in a line, and whether it may be started again."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.cause = failure.cause
        self.again = failure.again


class StepProcess:
    """The process of a system, as the one that measures sees it."""

    def __init__(self, name: StepSystem, plan: Plan) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, plan, theirs), daemon=True)
        with _ignoring_interrupts():
            self._process.start()
        theirs.close()  # or the end of the process would not be noticed

    def send(self, request: Request) -> None:
        """Ask for something; `receive` gives the answer."""
        try:
            self.pipe.send(request)
        except OSError as error:
            raise self._make_error() from error

    def receive(self) -> Answer:
        """The next answer.

        Raises:
            StepError: The system failed, or its process has ended.
        """
        try:
            answer: Answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise self._make_error() from error
        if isinstance(answer, Failure):
            raise StepError(answer)
        return answer

    def start(self, *, alone: bool) -> Started:
        """Build the system, and wait for it."""
        return self._ask(Start(alone), Started)

    def take(self, steps: int) -> Taken:
        """Have it take steps."""
        return self._ask(Take(steps), Taken)

    def trace(self, steps: int) -> list[KernelTime]:
        """Have it take steps under the profiler; its kernels, the costliest first."""
        return self._ask(Trace(steps), list)

    def close(self) -> None:
        """End it, whatever it does; its memory is free then."""
        self.pipe.close()
        self._process.terminate()
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, request: Request, kind: type[A]) -> A:
        self.send(request)
        answer = self.receive()
        assert isinstance(answer, kind)
        return answer

    def _make_error(self) -> StepError:
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        reason = f"its process ended with exit code {code}"
        if code == -signal.SIGKILL:
            reason += ", perhaps for want of memory"
        return StepError(Failure(reason, _want_less(reason), again=False))


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Ctrl-C is for the one that measures, which ends the others: they inherit that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def serve(name: StepSystem, plan: Plan, pipe: "Connection[Answer, Request]") -> None:
    """Answer requests until nobody can ask any more."""
    follow_parent()
    os.dup2(2, 1)  # stdout is the report's
    system = _System(name, plan)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            answer = system.answer(request)
        except Exception as error:  # noqa: BLE001  # compilers raise anything; it is told
            again = request == Start(alone=False) and _lacks_memory(error)
            answer = _describe(error, again=again)
        _free(plan.cluster.device)
        pipe.send(answer)


def _describe(error: Exception, *, again: bool) -> Failure:
    line = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, UserError):
        return Failure(line, error, again)
    if _lacks_memory(error):
        return Failure(line, _want_less(line), again)
    if not isinstance(error, RuntimeError):
        line = f"{type(error).__name__}: {line}"
    return Failure(line, RuntimeError("".join(traceback.format_exception(error))), again)


def _want_less(reason: str) -> PlanError:
    """What is told where this project's own step finds no room."""
    hint = "give a smaller --batch, or fewer peers with --against"
    return PlanError(f"the step of this project: {reason}", hint=hint)


def _lacks_memory(error: Exception) -> bool:
    """Whether a device was full: torch's own error, a compiler's around it, or the driver's."""
    return re.search("out of memory|ALLOC_FAILED", str(error), re.IGNORECASE) is not None


def _free(device: str) -> None:
    """Give back what is not needed between requests."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class _System:
    def __init__(self, name: StepSystem, plan: Plan) -> None:
        self._name = name
        self._plan = plan
        self._device = plan.cluster.device
        self._step: TrainingStep | None = None
        self._recorded_bytes = 0
        """Peak of the start of a network that was recorded, whose steps take no memory any more."""

    def answer(self, request: Request) -> Answer:
        match request:
            case Start(alone=True):
                return self._start(alone=True)
            case Start():
                return self._start_among_others()
            case Take(steps):
                return self._take(steps)
            case Trace(steps):
                assert self._step is not None
                return trace_step(self._step, steps=steps, device=self._device)

    def _start_among_others(self) -> Started:
        """Kernels that are measured meanwhile are not kept for runs to come."""
        known = default_cache_home() / "kernels"
        before = os.environ.get("XDG_CACHE_HOME")
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            measured = default_cache_home() / "kernels"
            if known.is_dir():
                shutil.copytree(known, measured)
            try:
                started = self._start(alone=False)
            finally:
                if before is None:
                    del os.environ["XDG_CACHE_HOME"]
                else:
                    os.environ["XDG_CACHE_HOME"] = before
            again = any(_differ(file, known / file.name) for file in measured.glob("*.json"))
        return Started(started.seconds, started.ways, again or self._is_recorded())

    def _start(self, *, alone: bool) -> Started:
        if self._step is not None:
            self._step = None
            torch.compiler.reset()  # which held the network
            _free(self._device)
        torch.backends.cudnn.benchmark = alone
        step = build_step(self._name, self._plan)
        began = time.perf_counter()
        loss = step()
        wait(self._device)
        seconds = time.perf_counter() - began
        for _ in range(_WARM_UP_STEPS):
            loss = step()
        if not math.isfinite(loss.item()):
            raise PlanError(f"{self._name}: the loss is not finite", hint="use --precision fp32")
        self._step = step
        if self._is_recorded():
            self._recorded_bytes = torch.cuda.max_memory_allocated()
        ways = step.ways if isinstance(step, OwnStep) else []
        return Started(seconds, tuple(ways), again=False)

    def _is_recorded(self) -> bool:
        """Whether steps replay what was recorded when they began, libraries' algorithms as well."""
        return isinstance(self._step, OwnStep) and self._plan.cuda_graphs

    def _take(self, steps: int) -> Taken:
        assert self._step is not None
        # Shapes are fixed; timm and torchvision set it, too. Algorithms are timed now, alone.
        torch.backends.cudnn.benchmark = True
        self._step()  # memory and caches are its own again
        wait(self._device)
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        loss = self._step()
        for _ in range(steps - 1):
            loss = self._step()
        wait(self._device)
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() if self._device == "cuda" else 0
        return Taken(seconds, max(peak, self._recorded_bytes), loss.item())


def _differ(file: Path, known: Path) -> bool:
    return not known.exists() or not cmp(file, known, shallow=False)
