"""What is saved of a run, when, and which are kept; written so that a kill loses nothing.

```
step=00000312.ckpt    the whole state after 312 optimizer steps, written beside and renamed
last.ckpt             -> the newest
best.ckpt             -> the best val/top1
best_ema.ckpt         -> the best val_ema/top1
```

A checkpoint holds tensors and plain values only, so it is read with `weights_only=True`.
"""

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from convnext_cli.errors import CheckpointError
from convnext_cli.plan.resolve import Plan
from convnext_cli.runs.layout import RunDir, checkpoint_step
from convnext_cli.runs.record import writing_to, written_whole
from convnext_cli.training.task import CHECKPOINT_KEY, Classifier


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, makes it durable, then renames it.

    At every instant the path holds the old checkpoint or the new one, whole.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,  # noqa: ANN401  # Lightning's signature
    ) -> None:
        """Write one checkpoint; called on rank 0 only.

        Raises:
            StorageError: The place cannot be written; what was there is untouched.
        """
        del storage_options
        target = Path(path)
        with writing_to(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(target) as beside:
                _save(checkpoint, beside)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch's zip writer raises this over the disk's own error
        cause = error.__cause__ or error.__context__
        if isinstance(cause, OSError):
            raise cause from error
        raise


def read_step(path: Path) -> int:
    """The optimizer step at which a training checkpoint was written.

    Raises:
        CheckpointError: The file is damaged or not a training checkpoint of this project.
    """
    try:
        # mapped, so that only the pickled outline is read and no tensor
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return int(content[CHECKPOINT_KEY]["step"])
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be resumed from: not a whole training checkpoint",
            hint="resume from another one with --resume PATH, or start afresh with --name NAME",
        ) from error


class Checkpoints(pl.Callback):
    """Saves at the plan's interval, after validation where both fall together, and at the end.

    The best scores travel in the checkpoint, so that a resumed run never mistakes a worse model
    for the best one.
    """

    def __init__(self, run: RunDir, plan: Plan) -> None:
        self.run = run
        self.plan = plan
        self.best_top1: float | None = None
        self.best_ema_top1: float | None = None
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The best scores so far."""
        return {"best_top1": self.best_top1, "best_ema_top1": self.best_ema_top1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best scores up again."""
        self.best_top1 = state_dict["best_top1"]
        self.best_ema_top1 = state_dict["best_ema_top1"]

    def save(self, trainer: pl.Trainer, task: Classifier) -> Path:
        """Save now, on every rank together; a second call at the same step does nothing."""
        path = self.run.checkpoint(task.step)
        if self._saved_step != task.step:
            trainer.save_checkpoint(path, weights_only=False)
            self._saved_step = task.step
            self._saved_at = time.monotonic()
            if trainer.is_global_zero:
                self._point(self.run.last, path)
                self._prune()
        return path

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Save where the interval falls on a step without validation."""
        task = _task(pl_module)
        if not task.at_step_end or self.plan.validates_at(task.step):
            return
        if task.step == self.plan.total_steps or self._is_due(trainer, task.step):
            self.save(trainer, task)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the best, and save where the interval falls on this step."""
        task = _task(pl_module)
        better = self._is_better("best_top1", task.validation.get("val/top1"))
        better_ema = self._is_better("best_ema_top1", task.validation.get("val_ema/top1"))
        due = task.step == self.plan.total_steps or self._is_due(trainer, task.step)
        if not (better or better_ema or due):
            return
        path = self.save(trainer, task)
        if trainer.is_global_zero:
            if better:
                self._point(self.run.best, path)
            if better_ema:
                self._point(self.run.best_ema, path)
            self._prune()

    def _is_better(self, name: str, top1: float | None) -> bool:
        best: float | None = getattr(self, name)
        if top1 is None or (best is not None and top1 <= best):
            return False
        setattr(self, name, top1)
        return True

    def _is_due(self, trainer: pl.Trainer, step: int) -> bool:
        if self.plan.checkpoint_every_steps is not None:
            return step % self.plan.checkpoint_every_steps == 0
        assert self.plan.checkpoint_every_seconds is not None
        due = time.monotonic() - self._saved_at >= self.plan.checkpoint_every_seconds
        # the clocks of the ranks differ a little, and all must save together
        return trainer.strategy.reduce_boolean_decision(due, all=False)

    def _point(self, name: Path, path: Path) -> None:
        """Make `name` point to a checkpoint, in one step."""
        beside = name.with_name(f".{name.name}.new")
        with writing_to(name.parent):
            beside.unlink(missing_ok=True)
            beside.symlink_to(path.name)
            beside.replace(name)

    def _prune(self) -> None:
        """Remove the checkpoints that are neither among the newest nor pointed to."""
        found = [path for path in self.run.list_checkpoints() if checkpoint_step(path) is not None]
        names = (self.run.last, self.run.best, self.run.best_ema)
        pointed = {name.resolve() for name in names if name.exists()}
        for path in found[: -self.plan.recipe.checkpoint.keep_last]:
            if path.resolve() not in pointed:
                path.unlink(missing_ok=True)


def _task(module: pl.LightningModule) -> Classifier:
    assert isinstance(module, Classifier)
    return module
