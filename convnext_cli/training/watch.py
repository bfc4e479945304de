"""Ends a run that stands still, after every rank has written where it stands.

Each rank watches itself: without an optimizer step or a validation batch for
`guard.hang_minutes` (`guard.start_minutes` for the first ones), it writes the Python stacks of
all its threads to `stacks/rank=00000.txt` and to stderr, with what it was doing, and ends with
exit code 76. The stacks show which collective a rank waited in for another. Its loader processes
write theirs to stderr and end with it: one that hangs would not see that it is gone. When the
interpreter itself is held, a timer of the C library writes the stacks a minute later; the exit code
is 1 then.

A rank that is asked to stop while it still looks for the others is ended with 75: torch waits for
them in C++, where no signal handler of Python runs.
"""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from contextlib import suppress
from typing import TextIO, cast

import lightning.pytorch as pl
from torch import distributed

from convnext_cli.data.reader import TELL_AND_END
from convnext_cli.errors import Hung, LostRank, Stopped
from convnext_cli.plan.resolve import Plan
from convnext_cli.runs.exit_code import leave_exit_code
from convnext_cli.runs.interrupt import StopRequest
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import utc_now
from convnext_cli.training.task import as_task

_LOOKS = 20
"""Within the time that is allowed."""
_HELD_SECONDS = 60.0

_OTHERS_SECONDS = 3.0
"""For the other ranks to write theirs too, at least: a rank that ends takes them with it."""

_MEETING_SECONDS = 3.0
"""For the ranks to find each other after a stop was asked: then they agree on it."""

_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "NCCL error",
    "NCCL communicator was aborted",
    "Watchdog caught collective operation timeout",
    "Socket closed",
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether the ranks did not meet, or a collective failed because one of them is gone."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER)


def make_lost_peer_error(error: BaseException, *, when: str, hint: str) -> Hung:
    """What is told of it."""
    why = str(error).splitlines()[0][:200]
    if not distributed.is_initialized():
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return Hung(
            f"the ranks did not meet at {place} ({why})",
            hint="every node has to reach it, and nothing else may use the port (MASTER_PORT, or"
            " PORT of slurm/multinode.sh); nothing was lost: run the same command again",
        )
    hint = f"its own messages say why; {hint}"
    return LostRank(f"another rank was lost {when} ({why})", hint=hint)


class HangWatch(pl.Callback):
    """The watch of one rank."""

    def __init__(self, run: RunDir, plan: Plan, *, request: StopRequest) -> None:
        self.run = run
        self.plan = plan
        self.request = request
        self.doing = "start"
        """What the rank does now, for the message."""
        self._allowed = plan.recipe.guard.start_minutes * 60
        self._alive_at = time.monotonic()
        self._done = threading.Event()
        self._validated = False

    def start(self) -> None:
        """Begin to watch, before the ranks look for each other: one may never come."""
        threading.Thread(target=self._watch, name="hang-watch", daemon=True).start()
        if self.plan.world_size > 1 and not distributed.is_initialized():
            threading.Thread(target=self._watch_meeting, name="meeting", daemon=True).start()
        self._alive("start")

    def stop(self) -> None:
        """Watch no more."""
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        """A batch is there."""
        del trainer
        self.doing = f"step {as_task(pl_module).step + 1}: forward and backward"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """A step is done."""
        del trainer
        task = as_task(pl_module)
        if task.at_step_end:
            guard = self.plan.recipe.guard
            compiles = any(task.step == size.first_step for size in self.plan.train_sizes)
            self._allowed = (guard.start_minutes if compiles else guard.hang_minutes) * 60
            self._alive(f"after step {task.step}: next batch, saving or agreement of the ranks")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first validation compiles, and starts loader processes, as the first step does."""
        del trainer
        if not self._validated:
            self._allowed = self.plan.recipe.guard.start_minutes * 60
        self._alive(f"start of the validation after step {as_task(pl_module).step}")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        """A batch of a validation is done."""
        del trainer
        self._validated = True
        self._allowed = self.plan.recipe.guard.hang_minutes * 60
        self._alive(f"validation after step {as_task(pl_module).step}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch no more."""
        del trainer, pl_module, stage
        self.stop()

    def _alive(self, doing: str) -> None:
        self.doing = doing
        self._alive_at = time.monotonic()
        # A timer in C, for a rank whose interpreter is held and whose watch cannot run.
        faulthandler.dump_traceback_later(self._allowed + _HELD_SECONDS, exit=True)

    def _watch_meeting(self) -> None:
        asked = None
        while asked is None and not self._done.wait(0.5) and not distributed.is_initialized():
            asked = self.request.read_arrived()
        if asked is None or self._done.wait(_MEETING_SECONDS) or distributed.is_initialized():
            return
        sys.stderr.write(
            f"stopped by {asked.name} before the first step, while rank {self.plan.cluster.rank}"
            " looked for the others; nothing was lost: run the same command again to go on\n"
        )
        leave_exit_code(Stopped.exit_code, os.environ, wait_seconds=0)
        os._exit(Stopped.exit_code)

    def _watch(self) -> None:
        rank = self.plan.cluster.rank
        path = self.run.stacks(rank)
        while not self._done.wait(self._allowed / _LOOKS):
            silent = time.monotonic() - self._alive_at
            if silent < self._allowed:
                continue
            told = (
                f"{utc_now()} rank {rank} has stood still for {silent:.0f} s in: {self.doing};"
                " the same command goes on from the last checkpoint\n"
            )
            _tell(told, sys.stderr)
            try:  # what stands still may be the disk
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w", encoding="utf-8") as file:
                    _tell(told, file)
            except OSError as error:
                sys.stderr.write(f"cannot write {path}: {error.strerror or error}\n")
            if self.plan.world_size > 1:
                time.sleep(max(2 * self._allowed / _LOOKS, _OTHERS_SECONDS))
            for process in multiprocessing.active_children():
                with suppress(ProcessLookupError):
                    os.kill(cast("int", process.pid), TELL_AND_END)
            leave_exit_code(Hung.exit_code, os.environ, wait_seconds=0)
            os._exit(Hung.exit_code)


def _tell(line: str, out: TextIO) -> None:
    """Write a line and the stacks of all threads."""
    out.write(line)
    out.flush()
    faulthandler.dump_traceback(file=out, all_threads=True)
