"""What a person sees of a run under way: a bar on a terminal, else lines; both in train.log."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from convnext_cli.errors import StorageError, UserError
from convnext_cli.plan.resolve import Plan
from convnext_cli.recipe.durations import render_duration
from convnext_cli.runs.record import writing_to
from convnext_cli.training.task import as_task

Row = Mapping[str, Any]


def render_row(row: Row, *, plan: Plan) -> str:
    """One line for people of a training or validation row."""
    head = f"step {row['step']:>{len(str(plan.total_steps))}}/{plan.total_steps}"
    head += f"  epoch {row['epoch']:.2f}"
    if "train/loss" in row:
        parts = [f"loss {row['train/loss']:.4f}", f"lr {row['train/lr']:.2e}"]
        if "train/grad_norm" in row:
            parts.append(f"grad {row['train/grad_norm']:.2f}")
        parts.append(f"{row['speed/images_per_second']:,.0f} img/s")
        if row["speed/data_wait_frac"] > 0.1:  # worth a word only where it costs something
            parts.append(f"waiting for data {row['speed/data_wait_frac']:.0%}")
        parts.append(f"{row['memory/gib']:.1f} GiB")
        if "data/replaced_images" in row:
            parts.append(f"{row['data/replaced_images']} unusable images: see events.jsonl")
    else:
        parts = [f"val top-1 {row['val/top1']:.2f}%", f"loss {row['val/loss']:.4f}"]
        if "val_ema/top1" in row:
            parts += [f"EMA top-1 {row['val_ema/top1']:.2f}%", f"loss {row['val_ema/loss']:.4f}"]
    return "  ".join([head, *parts])


def render_rest(row: Row, *, plan: Plan) -> str:
    """How long the steps that are left take at a training row's rate; "" for other rows."""
    steps = plan.total_steps - row["step"]
    if not row.get("speed/images_per_second") or not steps:
        return ""
    seconds = steps * plan.global_images / row["speed/images_per_second"]
    return f"  {render_duration(seconds)} left"


def log_error(log: Path, error: UserError) -> None:
    """Write what ends a run, which the console is told when all is closed, to its log as well."""
    with suppress(StorageError):  # the error may be that very disk
        _append(log, f"error: {error}")


def _append(log: Path, line: str) -> None:
    with writing_to(log), log.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


class ProgressDisplay(pl.Callback):
    """A live bar where stderr is a terminal; a line a row where it is not. Rank 0 only."""

    def __init__(self, plan: Plan, *, console: Console, log: Path) -> None:
        self.plan = plan
        self.console = console
        self.log_path = log
        self._bar: Progress | None = None

    def say(self, line: str) -> None:
        """Write one line for people, and to the log."""
        with self._while_somebody_reads():
            self.console.print(line, markup=False, soft_wrap=True)
        self._log(line)

    def show(self, row: Row) -> None:
        """Show a new row."""
        line, rest = render_row(row, plan=self.plan), render_rest(row, plan=self.plan)
        if self._bar is None or "val/top1" in row:
            self.say(line + rest)
            return
        self._log(line + rest)  # the bar tells it by itself
        self._bar.update(self._bar.task_ids[0], text=line.split("  ", 2)[2])

    @contextmanager
    def _while_somebody_reads(self) -> Iterator[None]:
        """Fall silent where the console is gone; the run goes on, and train.log has every line.

        Ctrl-C ends the `tee` of `convnext train ... 2>&1 | tee log` too, and at once.
        """
        try:
            yield
        except (OSError, SystemExit):  # rich ends the process where a pipe's reader has left
            self.console.quiet = True

    def _log(self, line: str) -> None:
        _append(self.log_path, line)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar at the step where the run goes on."""
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        bar = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[text]}"),
            console=self.console,
        )
        step = as_task(pl_module).step
        bar.add_task("train", total=self.plan.total_steps, completed=step, text="first steps ...")
        with self._while_somebody_reads():
            bar.start()
            self._bar = bar

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Move the bar."""
        del trainer
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=as_task(pl_module).step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the bar, whatever ended the run."""
        del trainer, pl_module, stage
        if self._bar is not None:
            with self._while_somebody_reads():
                self._bar.stop()
            self._bar = None
