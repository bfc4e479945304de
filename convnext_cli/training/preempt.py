"""Stops a run at a step boundary after a signal, or before the job's time is over.

Everything is saved, the hint says how to go on, and the exit code is 75. A validation that is under
way is given up and made up for at the start of the next attempt.
"""

import lightning.pytorch as pl

from convnext_cli.errors import Stopped, WriteError
from convnext_cli.plan.resolve import Plan
from convnext_cli.training.agreement import Agreement
from convnext_cli.training.checkpoint import Checkpoints
from convnext_cli.training.task import Classifier, as_task


class StopOnRequest(pl.Callback):
    """Turns the agreed wish to stop into a checkpoint and `Stopped`, on all ranks alike."""

    def __init__(self, agreement: Agreement, checkpoints: Checkpoints, plan: Plan) -> None:
        self.agreement = agreement
        self.checkpoints = checkpoints
        self.plan = plan

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before the first step where that was asked while the run was prepared."""
        del trainer
        if self.agreement.wishes.stop:
            raise Stopped(
                f"stopped by {self._reason()} before the first step; nothing was lost"
                f" (step {as_task(pl_module).step} of {self.plan.total_steps})",
                hint="run the same command again to go on",
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Stop at the end of a step."""
        task = as_task(pl_module)
        if task.at_step_end:
            self._stop_if_asked(trainer, task)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Stop in the middle of a validation."""
        self._stop_if_asked(trainer, as_task(pl_module))

    def _reason(self) -> str:
        return self.agreement.reason or "a signal on another rank"

    def _stop_if_asked(self, trainer: pl.Trainer, task: Classifier) -> None:
        wishes = self.agreement.wishes
        if wishes.failed:
            self.checkpoints.writer.wait()  # raises its own error on the rank that wrote
            raise WriteError(
                f"rank 0 could not write a checkpoint, at step {task.step}",
                hint="its message says why; the same command goes on from the newest whole one",
            )
        # After the last step there is nothing to go on with: validation and the last save remain.
        if not wishes.stop or task.step == self.plan.total_steps:
            return
        path = self.checkpoints.save_whole(trainer, task)
        raise Stopped(
            f"stopped by {self._reason()} after step {task.step} of {self.plan.total_steps};"
            f" everything is saved in {path}",
            hint="run the same command again to go on",
        )
