"""What the ranks agree on, with the ranks' gather but one process."""

from collections.abc import Iterator
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from torch import distributed

from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import DataFacts, make_plan
from convnext_cli.recipe.schema import Recipe
from convnext_cli.runs.interrupt import StopRequest
from convnext_cli.runs.layout import RunDir
from convnext_cli.training.agreement import Agreement, RankTime
from convnext_cli.training.checkpoint import Checkpoints
from convnext_cli.training.task import Classifier


class Clock:
    """A writer whose interval is over when the test says so; and the Trainer that it saves for."""

    cost_seconds = 0.0
    failed = False
    is_global_zero = True

    def __init__(self, *, world_size: int) -> None:
        self.world_size = world_size
        self.due = False
        self.saves = 0

    def is_due(self) -> bool:
        return self.due

    def save_checkpoint(self, *_: object, **__: object) -> None:
        self.saves += 1

    def tell_cost(self, seconds: float) -> None:
        self.due = False


@pytest.fixture(params=[1, 2])
def world_size(request, tmp_path) -> Iterator[int]:
    """Of a single process that acts at once, and of ranks that act a step late."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield request.param
    distributed.destroy_process_group()


class Steps:
    """A run of steps and validations as the Trainer would call its two callbacks."""

    def __init__(self, folder, *, world_size: int) -> None:
        recipe = Recipe.model_validate(
            {
                "about": "test",
                "batch": {"global_images": 8, "per_device_images": 8},
                "optim": {"lr_images": 8},
                "schedule": {"length": "20st", "warmup": None},
                "checkpoint": {"every": "auto"},
            }
        )
        facts = DataFacts(train_images=80, val_images=0, num_classes=3, source="test")
        plan = make_plan(recipe, Cluster(device="cpu"), name="test", facts=facts)
        self.clock = Clock(world_size=world_size)
        timer = SimpleNamespace(own=RankTime(0.0, 0.0))
        self.agreement = Agreement(StopRequest(), self.clock, timer=timer)
        self.checkpoints = Checkpoints(
            RunDir(folder), plan, writer=self.clock, agreement=self.agreement
        )
        self.callbacks: tuple[pl.Callback, ...] = (self.agreement, self.checkpoints)
        self.task = Classifier.__new__(Classifier)
        pl.LightningModule.__init__(self.task)
        self.task.step, self.task.at_step_end, self.task.validation_due = 0, True, False
        self.task.validation = {}
        self.agreement.on_train_start(self.clock, self.task)

    def take(self, *, validation_batches: int = 0) -> int:
        """One step; returns the saves so far."""
        self.task.step += 1
        self.task.validation_due = validation_batches > 0
        for callback in self.callbacks:
            callback.on_train_batch_end(self.clock, self.task)
        if validation_batches:
            for callback in self.callbacks:
                callback.on_validation_start(self.clock, self.task)
            for _ in range(validation_batches):
                self.agreement.on_validation_batch_end(self.clock, self.task)
            for callback in self.callbacks:
                callback.on_validation_end(self.clock, self.task)
        return self.clock.saves


def test_an_interval_that_is_over_makes_one_save(tmp_path, world_size):
    steps = Steps(tmp_path, world_size=world_size)
    steps.take()
    steps.clock.due = True

    saves = [steps.take() for _ in range(5)]

    assert saves == ([1] * 5 if world_size == 1 else [0, 1, 1, 1, 1])


@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("before", [0, 1])
def test_an_interval_that_is_over_at_a_validation_makes_one_save_after_it(
    tmp_path, world_size, batches, before
):
    steps = Steps(tmp_path, world_size=world_size)
    steps.clock.due = True
    if before and world_size > 1:
        assert steps.take() == 0

    saves = [steps.take(validation_batches=batches), *(steps.take() for _ in range(4))]

    assert saves == [1] * 5
