"""Rows of a run over several attempts."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest

from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import JsonLines, read_jsonl
from convnext_cli.training.recorder import Recorder
from convnext_cli.training.task import Classifier
from convnext_cli.training.throughput import DataClock


@pytest.mark.parametrize("validation_due", [False, True])
def test_a_validation_that_is_made_up_for_has_one_row(tmp_path, validation_due):
    run = RunDir(tmp_path)
    trained, validated = {"step": 4, "train/loss": 1.0}, {"step": 4, "val/loss": 2.0}
    with JsonLines(run.metrics) as rows:
        for row in ({"step": 2, "val/loss": 3.0}, trained, validated, {"step": 5}):
            rows.write(row)
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(device="cpu"), name="mine")
    recorder = Recorder(
        run, plan, clock=DataClock(), quarantine=None, senders=[], show=lambda _: None
    )
    task = Classifier.__new__(Classifier)
    pl.LightningModule.__init__(task)
    task.step, task.validation_due = 4, validation_due

    recorder.on_train_start(SimpleNamespace(is_global_zero=True), task)
    recorder.teardown(None, task, "fit")

    kept = [trained] if validation_due else [trained, validated]
    assert read_jsonl(run.metrics) == [{"step": 2, "val/loss": 3.0}, *kept]


def test_trackers_are_opened_where_training_begins_and_get_each_row(tmp_path):
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(device="cpu"), name="mine")
    calls: list[object] = []
    sender = SimpleNamespace(
        start=lambda: calls.append("start"),
        send=lambda values, step: calls.append((step, values)),
    )
    recorder = Recorder(
        RunDir(tmp_path),
        plan,
        clock=DataClock(),
        quarantine=None,
        senders=[sender],
        show=lambda _: None,
    )
    task = Classifier.__new__(Classifier)
    pl.LightningModule.__init__(task)
    task.step, task.validation_due, task.validation = 4, False, {"val/loss": 2.0}
    trainer = SimpleNamespace(is_global_zero=True)

    recorder.on_train_start(trainer, task)
    recorder.on_validation_end(trainer, task)
    recorder.teardown(None, task, "fit")

    assert calls == ["start", (4, {"val/loss": 2.0})]
