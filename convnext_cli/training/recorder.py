"""Writes the rows of a run: metrics.jsonl, metrics.csv and the trackers; shows them.

Values leave the device only when a row is due: together, in one copy that the host waits for. While
a row is written the device has nothing to do: for less than the 1.4 ms that a file and TensorBoard
took on a CPU, 0.2% of 50 steps of 12 ms; trackers have threads of their own. For that the rates are
true, and a row is in metrics.jsonl before anything else is done with its step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from convnext_cli.plan.resolve import Plan
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import JsonLines, utc_now, write_csv, write_event
from convnext_cli.training.later import Later
from convnext_cli.training.quarantine import Quarantine
from convnext_cli.training.task import as_task
from convnext_cli.training.throughput import DataClock, Meter, read_memory_gib
from convnext_cli.training.trackers import Sender, chosen_trackers

Row = Mapping[str, Any]


class Recorder(pl.Callback):
    """One row every `log.every_steps`, and one after each validation.

    Rows are the same sums on every rank; only rank 0 writes and shows them.
    """

    def __init__(
        self,
        run: RunDir,
        plan: Plan,
        *,
        clock: DataClock,
        quarantine: Quarantine,
        senders: Sequence[Sender],
        show: Callable[[Row], None],
    ) -> None:
        self.run = run
        self.plan = plan
        self.quarantine = quarantine
        self.senders = senders
        self.show = show
        self._file: JsonLines | None = None
        self._meter = Meter(plan.per_device_images * plan.world_size, clock)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop rows that a resumed run will write again, and open the trackers."""
        task = as_task(pl_module)
        if trainer.is_global_zero:
            self._file = JsonLines(self.run.metrics)
            self._file.truncate_after(task.step, key="val/loss" if task.validation_due else None)
            write_event(self.run.events, "ready", step=task.step)
        for sender in self.senders:
            sender.start()
        self._meter = Meter(self._meter.images_per_pass, self._meter.clock)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Write the training row where it is due."""
        task = as_task(pl_module)
        self._meter.end_batch()
        if not task.at_step_end or not self._is_due(task.step):
            return
        own = torch.stack([task.loss_sum, torch.full_like(task.loss_sum, len(task.bad))])
        loss_sum, replaced = trainer.strategy.reduce(own, reduce_op="sum").unbind()
        # Not a number where no step of the row had a finite gradient.
        loss = loss_sum / (task.loss_steps * task.step_passes)
        norm = task.grad_norm if task.grad_norm is not None else torch.zeros_like(loss)
        # The one wait for the device; it makes the rates below true.
        values = Later(torch.stack([loss, replaced, norm])).read()
        row = {
            "train/loss": float(values[0]),
            "train/lr": task.lr_at(task.step - 1),
            **self._meter.read(),
            "memory/gib": read_memory_gib(self.plan.cluster.device),
        }
        if task.grad_norm is not None:
            row["train/grad_norm"] = float(values[2])
        if values[1]:
            row["data/replaced_images"] = int(values[1])
            self.quarantine.collect(trainer, task)
        task.loss_sum = torch.zeros_like(task.loss_sum)
        task.loss_steps = torch.zeros_like(task.loss_steps)
        self._write(trainer, task.step, row)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the validation row and the table of all rows."""
        task = as_task(pl_module)
        self._write(trainer, task.step, task.validation)
        if trainer.is_global_zero and "csv" in chosen_trackers(self.plan):
            write_csv(self.run.metrics, self.run.metrics_csv)
        self._meter.pause()

    def _is_due(self, step: int) -> bool:
        return step % self.plan.recipe.log.every_steps == 0 or step == self.plan.total_steps

    def _write(self, trainer: pl.Trainer, step: int, values: Mapping[str, float]) -> None:
        if not trainer.is_global_zero or self._file is None:
            return
        row = {
            "step": step,
            "epoch": round(step / self.plan.steps_per_epoch, 4),
            "time": utc_now(),
            **values,
        }
        self._file.write(row)
        for sender in self.senders:
            sender.send(values, step=step)
        self.show(row)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the file; the table holds what was written."""
        del trainer, pl_module, stage
        if self._file is not None:
            self._file.close()
            self._file = None
            if "csv" in chosen_trackers(self.plan):
                write_csv(self.run.metrics, self.run.metrics_csv)
