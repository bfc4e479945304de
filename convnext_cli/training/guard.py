"""Gradients that are not finite: counted, named, and too many of them send the run back.

`Classifier` leaves such a step out, on the device and on all ranks alike because they have the same
gradient. So the weights are right at any time, and only the news may come late: on a GPU it is read
a fixed number of steps later (`later.LAG_STEPS`), by all ranks after the same step, and before
anything is validated or saved. Each such step is written to `events.jsonl`. More than
`guard.max_skipped_steps` within `guard.window_steps`, and the run goes back to the newest whole
checkpoint from before the first of them; the images from there to the last of them are left out
(`skips.json`, `data.order.Skip`). After `guard.max_rollbacks` the run ends with exit code 71.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from convnext_cli.data.order import Skip
from convnext_cli.errors import Diverged
from convnext_cli.plan.resolve import Plan
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.manifest import find_newest_whole, manifest_path
from convnext_cli.runs.record import write_event, write_json
from convnext_cli.training.checkpoint import BackgroundWriter
from convnext_cli.training.later import Later
from convnext_cli.training.start import read_skips
from convnext_cli.training.task import Classifier, as_task


class RolledBack(Exception):  # noqa: N818  # not an error: the run goes on
    """The run has to go on from an older checkpoint, which all ranks find anew."""


def leave_out(skips: Sequence[Skip], *, start: int, step: int) -> tuple[Skip, ...]:
    """What a run leaves out that goes back from a step to `start`: no image before that step's.

    Also where it goes back behind an earlier skip, as from a damaged checkpoint to an older one.
    """
    moved = (Skip(min(skip.step, start), skip.length) for skip in skips)
    return (*moved, Skip(start, step - start))


class FiniteGuard(pl.Callback):
    """Watches for steps that were left out; the same on every rank."""

    def __init__(self, run: RunDir, plan: Plan, *, writer: BackgroundWriter) -> None:
        self.run = run
        self.plan = plan
        self.writer = writer
        self.skipped_steps: list[int] = []
        self._pending: deque[tuple[int, Later]] = deque()
        """Steps of which it is not known yet, and what will say it."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Count the steps that were left out, as far as it is known by now.

        Raises:
            RolledBack: There were too many.
            Diverged: And the run has gone back often enough.
        """
        task = as_task(pl_module)
        if task.at_step_end:
            left_out = Later(task.left_out)
            self._pending.append((task.step, left_out))
            self._settle(trainer, task, keep=left_out.lag_steps)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the rest, for a run that goes back need not be validated."""
        self._settle(trainer, as_task(pl_module), keep=0)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count the rest, before anything is written: a checkpoint is of a step that is known."""
        self._settle(trainer, as_task(pl_module), keep=0)
        # not by `state_dict`, which Lightning calls before it
        checkpoint["callbacks"][self.state_key] = {"skipped_steps": list(self.skipped_steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count up again."""
        self.skipped_steps = list(state_dict["skipped_steps"])

    def _settle(self, trainer: pl.Trainer, task: Classifier, *, keep: int) -> None:
        """Read what is known of all but the newest steps."""
        guard = self.plan.recipe.guard
        while len(self._pending) > keep:
            step, left_out = self._pending.popleft()
            if not left_out.read():
                continue
            first = step - guard.window_steps
            self.skipped_steps = [*(found for found in self.skipped_steps if found > first), step]
            if trainer.is_global_zero:
                write_event(self.run.events, "skipped", step=step)
            if len(self.skipped_steps) > guard.max_skipped_steps:
                self._go_back(trainer, task, step=step)

    def _go_back(self, trainer: pl.Trainer, task: Classifier, *, step: int) -> None:
        """Leave out the images up to a step, and go on from before the first of the bad ones."""
        skips = read_skips(self.run)
        # Everybody has read before somebody writes.
        trainer.strategy.barrier()
        last = step - 1
        told = (
            f"the gradient is not finite in {len(self.skipped_steps)} of the last"
            f" {self.plan.recipe.guard.window_steps} steps, the newest step {step}"
            f" (learning rate {task.lr_at(last):.3g}, {self.plan.precision})"
        )
        if trainer.is_global_zero:
            names = trainer.datamodule.names_at(last)  # type: ignore[attr-defined]  # ImageData's
            write_json(self.run.bad_batch, {"step": step, "samples": names})
        if len(skips) >= self.plan.recipe.guard.max_rollbacks:
            raise Diverged(
                f"{told}, after going back {len(skips)} times",
                hint="lower optim.lr, set optim.clip_norm=1.0, or use --precision bf16 or fp32;"
                f" {self.run.bad_batch} names the images of the newest step; under another --name",
            )
        self.writer.wait()
        if trainer.is_global_zero:
            for path in self.run.list_newer(self.skipped_steps[0] - 1):
                path.unlink()  # its steps will be taken again
                manifest_path(path).unlink(missing_ok=True)
            newest, _ = find_newest_whole(self.run)
            start = 0 if newest is None or newest.manifest is None else newest.manifest.step
            skips = leave_out(skips, start=start, step=step)
            write_json(self.run.skips, {"skips": [list(skip) for skip in skips]})
            write_event(self.run.events, "rolled_back", step=step, to=start, why=told)
            if self.writer.copier is not None:  # else what went would be fetched from there
                self.writer.copier.start()
        trainer.strategy.barrier()
        raise RolledBack(told)
