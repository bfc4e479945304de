"""Stops a run at a step boundary after a signal: save, say how to go on, exit 75.

The handler only sets a flag. All ranks agree on it between two optimizer steps, so that no rank
waits in a collective for one that has left.
"""

import signal
import threading
from types import FrameType

import lightning.pytorch as pl

from convnext_cli.errors import Stopped
from convnext_cli.plan.resolve import Plan
from convnext_cli.training.checkpoint import Checkpoints
from convnext_cli.training.task import Classifier

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, the end of a job, and Slurm's warning."""

_AGREE_EVERY_STEPS = 10
"""With several ranks, agreeing costs a wait for the device; a step is short beside a grace time."""


class StopOnSignal(pl.Callback):
    """Turns the first signal into a checkpoint and `Stopped`; a second Ctrl-C stops at once."""

    def __init__(self, checkpoints: Checkpoints, plan: Plan) -> None:
        self.checkpoints = checkpoints
        self.plan = plan
        self.received: signal.Signals | None = None
        self._before: dict[int, object] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers, over those that Lightning has installed for itself."""
        del trainer, pl_module
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Stop here, unless this step is still to be validated."""
        assert isinstance(pl_module, Classifier)
        if pl_module.at_step_end and not self.plan.validates_at(pl_module.step):
            self._stop_if_asked(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after a validation during which the signal came."""
        assert isinstance(pl_module, Classifier)
        self._stop_if_asked(trainer, pl_module)

    def _stop_if_asked(self, trainer: pl.Trainer, task: Classifier) -> None:
        stop = self.received is not None
        if trainer.world_size > 1:
            if task.step % _AGREE_EVERY_STEPS and not self.plan.validates_at(task.step):
                return
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if not stop or task.step == self.plan.total_steps:
            return
        path = self.checkpoints.save(trainer, task)
        name = "a signal on another rank" if self.received is None else self.received.name
        raise Stopped(
            f"stopped by {name} after step {task.step} of {self.plan.total_steps};"
            f" everything is saved in {path}",
            hint="run the same command again to go on",
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        del trainer, pl_module, stage
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]  # as signal.signal gave it
        self._before.clear()
