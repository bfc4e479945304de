"""What the Trainer of this project leaves out of Lightning's."""

import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.io import TorchCheckpointIO

from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import DataFacts, make_plan
from convnext_cli.recipe.schema import Recipe
from convnext_cli.training.build import build_trainer
from convnext_cli.training.devices import quiet_lightning
from convnext_cli.training.throughput import DataClock


def test_no_pass_asks_all_ranks_for_a_signal_and_waits_for_the_answer(monkeypatch):
    recipe = Recipe.model_validate(
        {
            "about": "test",
            "batch": {"global_images": 8, "per_device_images": 8},
            "optim": {"lr_images": 8},
            "schedule": {"length": "20st", "warmup": None},
        }
    )
    facts = DataFacts(train_images=80, val_images=0, num_classes=3, source="test")
    plan = make_plan(recipe, Cluster(device="cpu"), name="test", facts=facts)
    quiet_lightning()  # as a training does: Lightning warns where it finds an srun
    trainer = build_trainer(
        plan, callbacks=[], clock=DataClock(), checkpoint_io=TorchCheckpointIO()
    )
    loop, asked = trainer.fit_loop.epoch_loop, []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: asked.append("all"))

    _TrainingEpochLoop._broadcast_sigterm_tensor(loop)  # Lightning's own does
    loop._broadcast_sigterm_tensor()

    assert asked == ["all"]
