"""What is saved of a run, when, and which are kept; written so that a kill loses nothing.

```
step=00000312.json    its size and hash (`runs/manifest.py`): without it, it does not count
step=00000312.ckpt    the whole state after 312 optimizer steps, written beside and renamed last
last.ckpt             -> the newest
best.ckpt             -> the best val/top1
best_ema.ckpt         -> the best val_ema/top1
```

A start points these names to what the checkpoint that it goes on from knows, for newer ones may be
damaged or gone.

The training loop waits until the state is copied to the host's memory; a thread writes it. A
checkpoint holds tensors and plain values only, so it is read with `weights_only=True`.
"""

import math
import os
import shutil
import time
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from convnext_cli.data.build import IndexedData
from convnext_cli.errors import CheckpointError, WriteError, quote_path
from convnext_cli.models.weights import read_content
from convnext_cli.plan.resolve import Plan
from convnext_cli.runs.copies import Copier
from convnext_cli.runs.layout import RunDir, checkpoint_step
from convnext_cli.runs.manifest import HashedFile, Manifest, check_checkpoint, manifest_path
from convnext_cli.runs.record import sync, utc_now, write_event, writing_to, written_whole
from convnext_cli.training.agreement import Agreement
from convnext_cli.training.task import CHECKPOINT_KEY, Classifier, as_task

_FIRST_INTERVAL_SECONDS = 60.0
"""Before anything is measured."""

_LONGEST_LOSS_SECONDS = 60.0
"""Work that an `auto` interval puts at risk, where saving is cheap enough for it."""

_LARGEST_COST = 0.01
"""Share of a run that saving may take."""


BestSteps = tuple[int | None, int | None]
"""Steps of the best raw and averaged weights; None: there are none yet."""


def save_interval(*, cost_seconds: float, write_seconds: float, failure_hours: float) -> float:
    """Seconds from one save to the next.

    Young's optimum sqrt(2 x cost x time between failures), but no more than a minute of work at
    risk; above both goes that saving takes less than 1% of the run, and that a write is done before
    the next begins.

    Args:
        cost_seconds: How long training stands still for a save.
        write_seconds: How long the write takes beside it.
        failure_hours: Mean time between two failures of the run.

    Source: Young, Comm. ACM 17(9), 1974; Daly, FGCS 22(3), 2006.
    """
    young = math.sqrt(2 * cost_seconds * failure_hours * 3600)
    return max(min(young, _LONGEST_LOSS_SECONDS), cost_seconds / _LARGEST_COST, 2 * write_seconds)


def copy_to_host(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same values in memory of their own, which training does not change any more."""
    copied: dict[str, Any] = tree_map(
        lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf,
        checkpoint,
    )
    return copied


def write_checkpoint(checkpoint: dict[str, Any], target: Path, *, world_size: int) -> Manifest:
    """Write one checkpoint beside its place, make it durable, write its manifest, then rename it.

    At every instant the path holds the old checkpoint or the new one, whole; and a first one never
    lies there without its manifest, which would look as if a whole one had been damaged.

    Raises:
        WriteError: The place cannot be written; what was there is untouched.
    """
    with writing_to(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(checkpoint, target)
        with written_whole(target) as beside:
            with beside.open("wb") as file:
                hashed = HashedFile(file)
                _save(checkpoint, hashed)
            sync(beside)  # may take long, and until then the old one of this step counts
            manifest = Manifest(
                step=int(checkpoint[CHECKPOINT_KEY]["step"]),
                bytes=hashed.bytes,
                sha256=hashed.sha256,
                time=utc_now(),
                world_size=world_size,
            )
            with written_whole(manifest_path(target)) as beside_manifest:
                beside_manifest.write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _check_space(checkpoint: dict[str, Any], target: Path) -> None:
    tensors = [leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, Tensor)]
    needed = sum(tensor.nbytes for tensor in tensors)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise WriteError(
            f"cannot write {target}: No space left for {needed:,} bytes, {free:,} are free",
            hint=f"make room on the disk of {target.parent}: df -h {quote_path(target.parent)}",
        )


def _save(checkpoint: dict[str, Any], file: HashedFile) -> None:
    try:
        torch.save(checkpoint, file)  # type: ignore[arg-type]  # it wants write and flush alone
    except RuntimeError as error:
        # torch's zip writer raises this over the disk's own error
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError):
            raise cause from error
        raise


def point_name(name: Path, path: Path) -> None:
    """Make a name point to a checkpoint beside it, in one step."""
    beside = name.with_name(f".{name.name}.new")
    with writing_to(name.parent):
        beside.unlink(missing_ok=True)
        beside.symlink_to(path.name)
        beside.replace(name)


def read_step(path: Path) -> int:
    """The optimizer step at which a training checkpoint was written.

    Raises:
        CheckpointError: The file is damaged or not a training checkpoint of this project.
    """
    try:
        content, _ = read_content(path)  # mapped: the pickled outline is read, and no tensor
        return int(content[CHECKPOINT_KEY]["step"])
    except (CheckpointError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be resumed from: not a whole training checkpoint",
            hint="resume from another one with --resume PATH, or start afresh with --name NAME",
        ) from error


def read_data_state(path: Path) -> Mapping[str, Any]:
    """What the order of the images of a checkpoint depends on; empty for a stream.

    Raises:
        CheckpointError: The file cannot be read.
    """
    content, _ = read_content(path)
    state: Mapping[str, Any] = content.get(IndexedData.__qualname__, {})  # as Lightning names it
    return state


def read_best_steps(run: RunDir, checkpoint: Path) -> BestSteps:
    """What a run knew of its best checkpoints when it wrote one.

    Raises:
        CheckpointError: The file cannot be read.
    """
    content, _ = read_content(checkpoint)
    return _best_steps_in(content["callbacks"][Checkpoints.__qualname__], run)  # Lightning's name


def _best_steps_in(state: Mapping[str, Any], run: RunDir) -> BestSteps:
    # earlier versions did not write these: the names say it
    return (
        state.get("best_step", _named_step(run.best)),
        state.get("best_ema_step", _named_step(run.best_ema)),
    )


def mend_names(run: RunDir, step: int, *, best_steps: BestSteps) -> BestSteps:
    """Point the names to what there is, for a run that stands at a step.

    Args:
        run: Whose names.
        step: Of the checkpoint that `last` is to name.
        best_steps: Those of the best raw and averaged weights.

    Returns:
        The same, None where the checkpoint is not whole, which then has no name.
    """
    # hashed once where both are the best at the same step, as they often are
    whole = {
        at
        for at in set(best_steps)
        if at is not None and at <= step and check_checkpoint(run.checkpoint(at)).problem is None
    }
    if run.checkpoint(step).exists():
        point_name(run.last, run.checkpoint(step))
    best, best_ema = (
        _mend(run, name, at if at in whole else None)
        for name, at in zip((run.best, run.best_ema), best_steps, strict=True)
    )
    return best, best_ema


def _mend(run: RunDir, name: Path, step: int | None) -> int | None:
    """Point a name to the checkpoint of a step; None: to none."""
    if step is None:
        name.unlink(missing_ok=True)
    elif _named_step(name) != step:
        point_name(name, run.checkpoint(step))
    return step


class BackgroundWriter(TorchCheckpointIO):
    """Lightning's way to save and load: copies the state, and writes it in a thread.

    One write is under way at a time; a second save waits for the first. What fails is raised by
    `wait` and by the next save. Rank 0 alone writes.

    Args:
        run: Where checkpoints lie and events are written.
        plan: Its interval, and what is kept.
        copier: Copies each checkpoint elsewhere.
    """

    def __init__(self, run: RunDir, plan: Plan, *, copier: Copier | None = None) -> None:
        super().__init__()
        self.run = run
        self.plan = plan
        self.copier = copier
        self.cost_seconds = 0.0
        """What the newest save took of the training loop's time."""
        self._interval_seconds = plan.checkpoint_every_seconds or _FIRST_INTERVAL_SECONDS
        self._saved_at = time.monotonic()
        self._pool = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._write: futures.Future[None] | None = None

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,  # noqa: ANN401  # Lightning's signature
    ) -> None:
        """Start to write one checkpoint.

        Args:
            checkpoint: Copied before this returns.
            path: Its place.
            storage_options: Names that are pointed to it when it is written.

        Raises:
            WriteError: The write before this one failed.
        """
        self.wait()
        copied = copy_to_host(checkpoint)
        self._write = self._pool.submit(self._run, copied, Path(path), tuple(storage_options))

    def tell_cost(self, seconds: float) -> None:
        """Say how long training stood still for a save that is started; on every rank."""
        self.cost_seconds = seconds
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether an interval in time is over."""
        if self.plan.checkpoint_every_steps is not None:
            return False
        return time.monotonic() - self._saved_at >= self._interval_seconds

    @property
    def failed(self) -> bool:
        """Whether the newest write has failed; does not wait."""
        write = self._write
        return write is not None and write.done() and write.exception() is not None

    def wait(self) -> None:
        """Until the newest write is on the disk.

        Raises:
            WriteError: It failed.
        """
        if self._write is not None:
            self._write.result()

    def teardown(self) -> None:
        """Let a write that is under way come to its end, whatever ended the run."""
        if self._write is not None:
            # Not by joining the thread: CPython 3.11 takes one for ended whose join was interrupted
            # by an exception, as torch's handler raises for a loader process that is lost.
            futures.wait([self._write])
        self._pool.shutdown(wait=False)

    def finish_copies(self) -> None:
        """Let copies that are under way come to their end, which may take long."""
        if self.copier is not None:
            self.copier.finish()

    def _run(self, checkpoint: dict[str, Any], path: Path, names: tuple[Path, ...]) -> None:
        started = time.monotonic()
        rows = self.run.metrics
        if rows.exists():  # a power cut must not leave the checkpoint and take the rows before it
            with writing_to(rows):
                sync(rows)
        manifest = write_checkpoint(checkpoint, path, world_size=self.plan.world_size)
        seconds = time.monotonic() - started
        self.point(path, names)
        if self.plan.checkpoint_every_steps is None and self.plan.checkpoint_every_seconds is None:
            self._interval_seconds = save_interval(
                cost_seconds=self.cost_seconds,
                write_seconds=seconds,
                failure_hours=self.plan.recipe.checkpoint.failure_hours,
            )
        told = {"bytes": manifest.bytes, "write_seconds": round(seconds, 3)}
        write_event(self.run.events, "checkpoint", step=manifest.step, **told)
        if self.copier is not None:
            self.copier.start()

    def point(self, path: Path, names: tuple[Path, ...]) -> None:
        """Make names point to a checkpoint, each in one step, and remove what nobody needs."""
        for name in names:
            point_name(name, path)
        pointed = {link.resolve() for link in self.run.links if link.exists()}
        found = [path for path in self.run.list_checkpoints() if checkpoint_step(path) is not None]
        for old in found[: -self.plan.recipe.checkpoint.keep_last]:
            if old.resolve() not in pointed and not self._is_kept(old):
                old.unlink(missing_ok=True)
                manifest_path(old).unlink(missing_ok=True)

    def _is_kept(self, path: Path) -> bool:
        step, every = checkpoint_step(path), self.plan.checkpoint_keep_every_steps
        return step is not None and every is not None and step % every == 0


class Checkpoints(pl.Callback):
    """Saves at the plan's interval, after validation where both fall together, and at the end.

    The best scores travel in the checkpoint with their steps, so that a resumed run never mistakes
    a worse model for the best one, nor takes the name from it.
    """

    def __init__(
        self, run: RunDir, plan: Plan, *, writer: BackgroundWriter, agreement: Agreement
    ) -> None:
        self.run = run
        self.plan = plan
        self.writer = writer
        self.agreement = agreement
        self.best_top1: float | None = None
        self.best_ema_top1: float | None = None
        self.best_step: int | None = None
        self.best_ema_step: int | None = None
        self._saved_step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best scores so far, and the steps that have them."""
        return {
            "best_top1": self.best_top1,
            "best_ema_top1": self.best_ema_top1,
            "best_step": self.best_step,
            "best_ema_step": self.best_ema_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best scores up again."""
        self.best_top1 = state_dict["best_top1"]
        self.best_ema_top1 = state_dict["best_ema_top1"]
        self.best_step, self.best_ema_step = _best_steps_in(state_dict, self.run)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget a best score whose checkpoint is gone, and point the names to what is there.

        Rank 0 looks, for all ranks have to save at the same steps.
        """
        found = (self.best_step, self.best_ema_step)
        if trainer.is_global_zero:
            found = mend_names(self.run, as_task(pl_module).step, best_steps=found)
        self.best_step, self.best_ema_step = trainer.strategy.broadcast(found)
        if self.best_step is None:
            self.best_top1 = None
        if self.best_ema_step is None:
            self.best_ema_top1 = None

    def save(self, trainer: pl.Trainer, task: Classifier, *, names: tuple[Path, ...] = ()) -> Path:
        """Save now, on every rank together, and point `names` to it when it is written."""
        path = self.run.checkpoint(task.step)
        names = (self.run.last, *names)
        self.agreement.grant_save()
        if self._saved_step == task.step:
            self.writer.wait()
            if trainer.is_global_zero:
                self.writer.point(path, names)
            return path
        started = time.monotonic()
        trainer.save_checkpoint(path, weights_only=False, storage_options=names)
        self._saved_step = task.step
        self.writer.tell_cost(time.monotonic() - started)
        return path

    def save_whole(self, trainer: pl.Trainer, task: Classifier) -> Path:
        """Save, and wait until it is on the disk."""
        path = self.save(trainer, task)
        self.writer.wait()
        return path

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Save where the interval falls on a step without validation."""
        task = as_task(pl_module)
        if task.at_step_end and not task.validation_due and self._is_due(task.step):
            self.save(trainer, task)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the best, and save where the interval falls on this step."""
        task = as_task(pl_module)
        names = []
        if self._is_better("best_top1", task.validation.get("val/top1")):
            self.best_step = task.step
            names.append(self.run.best)
        if self._is_better("best_ema_top1", task.validation.get("val_ema/top1")):
            self.best_ema_step = task.step
            names.append(self.run.best_ema)
        if names or self._is_due(task.step):
            self.save(trainer, task, names=tuple(names))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The run is finished when its last checkpoint is on the disk."""
        del trainer, pl_module
        self.writer.wait()

    def _is_due(self, step: int) -> bool:
        every = self.plan.checkpoint_every_steps
        if step == self.plan.total_steps:
            return True
        return self.agreement.wishes.save if every is None else step % every == 0

    def _is_better(self, name: str, top1: float | None) -> bool:
        best: float | None = getattr(self, name)
        if top1 is None or (best is not None and top1 <= best):
            return False
        setattr(self, name, top1)
        return True


def _named_step(name: Path) -> int | None:
    """The step of the checkpoint that a name points to; None: it points to none."""
    return checkpoint_step(name.resolve()) if name.exists() else None
