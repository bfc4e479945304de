"""How fast a run is, without making the host wait for the device."""

import time
from dataclasses import dataclass, field

import psutil
import torch
from lightning.pytorch.profilers import Profiler

from convnext_cli.plan.cluster import DeviceKind


class DataClock(Profiler):
    """Counts the time that training spends waiting for its next batch.

    Lightning tells its profiler before and after each `next` of the training loader, which no
    callback hook separates from saving and validation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waited_seconds = 0.0
        self._started = 0.0

    def start(self, action_name: str) -> None:
        """Lightning begins something."""
        if action_name.endswith("train_dataloader_next"):
            self._started = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Lightning has done it."""
        if action_name.endswith("train_dataloader_next"):
            self.waited_seconds += time.perf_counter() - self._started

    def summary(self) -> str:
        """Nothing to print at the end."""
        return ""


@dataclass
class Meter:
    """Times between rows: images per second over all devices, and the share spent without data.

    The host runs ahead of the device between rows; a row waits for it once, so a row's mean rate is
    the true one.
    """

    images_per_pass: int
    """Images of one pass over all devices."""
    clock: DataClock
    passes: int = 0
    _waited: float = field(init=False)
    """The clock's time at the last reading; the clock itself has other readers."""
    _started: float = field(default_factory=time.perf_counter)
    _batch_ended: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self._waited = self.clock.waited_seconds

    def end_batch(self) -> None:
        """The pass was handed to the device."""
        self.passes += 1
        self._batch_ended = time.perf_counter()

    def pause(self) -> None:
        """Leave out what came since the last pass, such as validation or saving."""
        now = time.perf_counter()
        self._started += now - self._batch_ended
        self._batch_ended = now

    def read(self) -> dict[str, float]:
        """The rates since the last reading; starts afresh."""
        now = time.perf_counter()
        seconds = max(now - self._started, 1e-9)
        row = {
            "speed/images_per_second": self.passes * self.images_per_pass / seconds,
            "speed/data_wait_frac": min(1.0, (self.clock.waited_seconds - self._waited) / seconds),
        }
        self.passes, self._waited = 0, self.clock.waited_seconds
        self._started = self._batch_ended = now
        return row


def read_memory_gib(device: DeviceKind) -> float:
    """Peak memory of the device (GPU), or memory of this process (CPU), in GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    used: int = psutil.Process().memory_info().rss
    return used / 2**30
