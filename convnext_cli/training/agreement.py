"""What all ranks have agreed on at a step boundary: to stop, to save, that one of them failed.

```
boundary k      each rank gives its wishes to a gather that goes on beside the next step
boundary k + 1  the wishes of boundary k are here: every rank acts on the same ones
```

So agreeing costs a gather of a few numbers over the hosts' network and no wait for the device, and
no rank waits in a collective for one that has left. A single process acts at once. A wish to save
stays agreed until a save is made, and is not raised again before: it is granted once.
"""

import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import Tensor, distributed

from convnext_cli.runs.interrupt import StopRequest
from convnext_cli.training.task import as_task


@dataclass(frozen=True)
class RankTime:
    """What one rank took of a step by itself, in seconds."""

    data_seconds: float
    """Waiting for its batches."""
    forward_seconds: float


@dataclass(frozen=True)
class Wishes:
    """What the ranks wished at one boundary."""

    stop: bool = False
    save: bool = False
    """Rank 0's interval is over; the clocks of the others are not asked."""
    failed: bool = False
    """A save did not come to its end."""
    times: tuple[RankTime, ...] = ()
    """By rank."""


class SaveClock(Protocol):
    """Who knows whether a checkpoint is due, what one costs, and whether the last one failed."""

    cost_seconds: float

    @property
    def failed(self) -> bool:
        """Whether the newest write has failed."""

    def is_due(self) -> bool:
        """Whether the interval is over."""


class RankTimes(Protocol):
    """Who times this rank."""

    own: RankTime


class Agreement(pl.Callback):
    """Gathers the wishes of all ranks; before the callbacks that act on them."""

    def __init__(self, request: StopRequest, clock: SaveClock, *, timer: RankTimes) -> None:
        self.request = request
        self.clock = clock
        self.timer = timer
        self.wishes = Wishes()
        self.reason: str | None = None
        """Why this rank wants to stop."""
        self._group: Any = None
        self._pending: tuple[Any, list[Tensor]] | None = None
        self._boundary = time.monotonic()
        self._step_seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the channel; a stop that was asked while the run was prepared is agreed here."""
        del pl_module
        if trainer.world_size > 1 and self._group is None:
            self._group = distributed.new_group(backend="gloo")
        self._exchange()
        self._settle()
        self._boundary = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Exchange at the end of a step."""
        del trainer
        task = as_task(pl_module)
        if task.at_step_end:
            now = time.monotonic()
            self._step_seconds = now - self._boundary
            self._exchange()
            self._boundary = now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have no gather under way, so that those of validation are the same on every rank."""
        del trainer, pl_module
        self._settle()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Exchange after each batch: every rank has as many."""
        del trainer, pl_module
        self._exchange()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The time of validation is not that of a step."""
        del trainer, pl_module
        self._settle()
        self._boundary = time.monotonic()

    def grant_save(self) -> None:
        """A save is made, on every rank: nobody wishes for one any more."""
        self.wishes = replace(self.wishes, save=False)

    def _own(self) -> list[float]:
        needed = 2 * (self._step_seconds + self.clock.cost_seconds)
        self.reason = self.request.reason(needed_seconds=needed)
        save = self.clock.is_due() and not self.wishes.save
        wishes = (self.reason is not None, save, self.clock.failed)
        own = self.timer.own
        return [*(float(wish) for wish in wishes), own.data_seconds, own.forward_seconds]

    def _exchange(self) -> None:
        """Act on the gather of the boundary before, and start one of this boundary."""
        self._settle()  # first, for what is agreed is not wished for again
        own = torch.tensor(self._own(), dtype=torch.float64)
        if self._group is None:
            self._agree([own])
            return
        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size(self._group))]
        work = distributed.all_gather(parts, own, group=self._group, async_op=True)
        self._pending = (work, parts)

    def _settle(self) -> None:
        if self._pending is not None:
            work, parts = self._pending
            work.wait()
            self._pending = None
            self._agree(parts)

    def _agree(self, parts: list[Tensor]) -> None:
        new = _read(parts)
        self.wishes = replace(new, save=new.save or self.wishes.save)


def _read(parts: list[Tensor]) -> Wishes:
    rows = [part.tolist() for part in parts]
    return Wishes(
        stop=any(row[0] for row in rows),
        save=bool(rows[0][1]),
        failed=any(row[2] for row in rows),
        times=tuple(RankTime(row[3], row[4]) for row in rows),
    )
