"""Steps that were left out: counted over attempts, gone back from, and what is left out then."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from convnext_cli.data.order import Order, Skip
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import Plan, make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.runs.copies import Copier, RemoteFolder
from convnext_cli.runs.layout import RunDir
from convnext_cli.training.checkpoint import BackgroundWriter, write_checkpoint
from convnext_cli.training.guard import FiniteGuard, RolledBack, leave_out
from convnext_cli.training.start import find_start, read_skips
from convnext_cli.training.task import Classifier


class Attempt:
    """One attempt of a run, whose steps are good or bad as the test says."""

    def __init__(self, folder: Path, *, max_skipped_steps: int = 1) -> None:
        self.run = RunDir(folder / "mine")
        self.plan: Plan = make_plan(
            load_recipe(
                "in1k_tiny",
                [
                    f"guard.max_skipped_steps={max_skipped_steps}",
                    "guard.window_steps=10",
                    f"checkpoint.copy_to={folder / 'copies'}",
                ],
            ),
            Cluster(device="cpu"),
            name="mine",
        )
        copies = RemoteFolder(str(folder / "copies" / "mine"))
        self.copier = Copier(self.run, copies, say=lambda _: None)
        self.writer = BackgroundWriter(self.run, self.plan, copier=self.copier)
        self.guard = FiniteGuard(self.run, self.plan, writer=self.writer)
        self.trainer = SimpleNamespace(
            is_global_zero=True,
            strategy=SimpleNamespace(barrier=lambda: None),
            datamodule=SimpleNamespace(names_at=lambda _: []),
        )
        self.task = Classifier.__new__(Classifier)
        pl.LightningModule.__init__(self.task)
        self.task.plan, self.task.step, self.task.at_step_end = self.plan, 0, True

    def take(self, *, bad: bool) -> None:
        self.task.step += 1
        self.task.left_out = torch.tensor(float(bad))
        self.guard.on_train_batch_end(self.trainer, self.task)

    def save(self) -> dict:
        checkpoint: dict = {"convnext": {"step": self.task.step}, "callbacks": {}}
        self.guard.on_save_checkpoint(self.trainer, self.task, checkpoint)
        write_checkpoint(checkpoint, self.run.checkpoint(self.task.step), world_size=1)
        return checkpoint


def test_bad_steps_of_the_attempt_before_count(tmp_path):
    before, after = Attempt(tmp_path), Attempt(tmp_path)
    before.take(bad=False)
    before.save()
    before.take(bad=True)
    saved = before.save()
    after.task.step = 2
    after.guard.load_state_dict(saved["callbacks"][after.guard.state_key])

    with pytest.raises(RolledBack, match="2 of the last 10 steps"):
        after.take(bad=True)

    assert read_skips(after.run) == (Skip(1, 2),)
    assert [path.name for path in after.run.list_checkpoints()] == ["step=00000001.ckpt"]


def test_a_run_that_goes_back_to_its_begin_is_not_taken_for_one_whose_disk_is_gone(tmp_path):
    attempt = Attempt(tmp_path)
    attempt.take(bad=True)
    attempt.save()
    attempt.copier.folder.push(attempt.run)

    with pytest.raises(RolledBack):
        attempt.take(bad=True)
    attempt.copier.finish()

    start = find_start(replace(attempt.plan, data_fingerprint="x"), attempt.run, resume="auto")
    assert (start.checkpoint, start.step) == (None, 0)
    assert attempt.copier.folder.list_steps() == []


@pytest.mark.parametrize("start", [100, 80])
def test_a_run_that_goes_back_twice_takes_no_image_of_before(start):
    def order(skips: tuple[Skip, ...]) -> Order:
        return Order(shard_images=(10_000,), seed=0, global_images=10, skips=skips)

    first = leave_out((), start=100, step=140)
    second = leave_out(first, start=start, step=120)

    assert len(second) == 2  # of them there may be `guard.max_rollbacks`
    assert order(first).locate(100) == (0, 140)
    assert order(second).locate(start) == order(first).locate(120) == (0, 160)
    assert order(second).locate(start - 1) == (0, start - 1)
    assert order(second).locate(300) == (0, 300 + 160 - start)
