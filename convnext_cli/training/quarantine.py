"""Training images that could not be used: named once, counted, and too many of them end the run.

The loader puts a neighbour in the place of each (`data.reader`); here all ranks agree on what was
lost, `events.jsonl` gets its key and reason, and `data.bad_frac` says how much may be lost.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from convnext_cli.errors import DataError
from convnext_cli.models.weights import read_content
from convnext_cli.plan.resolve import Plan
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import JsonLines, read_jsonl, utc_now
from convnext_cli.training.checkpoint import Checkpoints
from convnext_cli.training.task import Classifier, as_task


class Quarantine(pl.Callback):
    """Keeps the unusable images of a run; the same on every rank.

    Args:
        run: Where events are written.
        plan: Its budget is a share of the training images, and at least one image.
        checkpoints: Saves before the run ends.
        say: Tells people one line; called on rank 0 only.
    """

    def __init__(
        self, run: RunDir, plan: Plan, *, checkpoints: Checkpoints, say: Callable[[str], None]
    ) -> None:
        self.run = run
        self.plan = plan
        self.checkpoints = checkpoints
        self.say = say
        self.reasons: dict[str, str] = {}
        """Why, by key."""

    def state_dict(self) -> dict[str, Any]:
        """What is known so far."""
        return {"reasons": dict(self.reasons)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.reasons = dict(state_dict["reasons"])

    def collect(self, trainer: pl.Trainer, task: Classifier) -> None:
        """Gather from all ranks what could not be used since the last call.

        Every rank calls it at the same step, which waits for the device.
        """
        found, task.bad = task.gather_bad(), []
        new = {bad.key: bad.reason for bad in found if bad.key not in self.reasons}
        self.reasons |= new
        if new and trainer.is_global_zero:
            # A resume meets again what an earlier attempt has written down.
            told = {row.get("key") for row in read_jsonl(self.run.events)}
            with JsonLines(self.run.events) as events:
                for key in sorted(new.keys() - told):
                    row = {"event": "quarantined", "time": utc_now(), "step": task.step}
                    events.write({**row, "key": key, "reason": new[key]})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object, **__: object
    ) -> None:
        """Save and end the run where more images are lost than it may lose.

        After the last step it ends when all is done: no later attempt would validate it.
        """
        task = as_task(pl_module)
        if task.at_step_end and task.step < self.plan.total_steps:
            self._end_if_too_many(trainer, task)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell at the end what was lost."""
        self._end_if_too_many(trainer, as_task(pl_module))
        if trainer.is_global_zero:
            tell_lost(self.reasons, run=self.run, say=self.say)

    def _end_if_too_many(self, trainer: pl.Trainer, task: Classifier) -> None:
        error = find_too_many(self.reasons, run=self.run, plan=self.plan)
        if error is not None:
            self.checkpoints.save_whole(trainer, task)
            raise error


def read_reasons(checkpoint: Path) -> Mapping[str, str]:
    """Why images were unusable, by key, as a run knew it when it wrote a checkpoint.

    Raises:
        CheckpointError: The file cannot be read.
    """
    content, _ = read_content(checkpoint)
    state = content["callbacks"].get(Quarantine.__qualname__, {})  # as Lightning names it
    reasons: Mapping[str, str] = state.get("reasons", {})
    return reasons


def find_too_many(reasons: Mapping[str, str], *, run: RunDir, plan: Plan) -> DataError | None:
    """What ends a run that has lost these images; None: it may lose them."""
    lost, frac = len(reasons), plan.recipe.data.bad_frac
    allowed = max(1, int(frac * plan.train_images)) if frac else 0
    if lost <= allowed:
        return None
    key, reason = min(reasons.items())
    enough = 10.0 ** math.ceil(math.log10((lost + 1) / plan.train_images))
    return DataError(
        f"{lost} of {plan.train_images:,} training images cannot be used, and"
        f" data.bad_frac={frac:g} allows {allowed}; such as {key}: {reason}",
        hint=f"{run.events} names them: repair what can be repaired; the same command goes on with"
        f" data.bad_frac={min(1.0, enough):g}",
    )


def tell_lost(reasons: Mapping[str, str], *, run: RunDir, say: Callable[[str], None]) -> None:
    """Tell people what a run has lost."""
    if reasons:
        images = "1 image" if len(reasons) == 1 else f"{len(reasons)} images"
        say(f"{images} could not be used, and neighbours stood in; keys and reasons: {run.events}")
