"""More unusable images than a run may lose end it; after the last step, when all is done."""

from types import SimpleNamespace

import lightning.pytorch as pl
import pytest

from convnext_cli.errors import DataError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.runs.layout import RunDir
from convnext_cli.training.quarantine import Quarantine
from convnext_cli.training.task import Classifier


@pytest.mark.parametrize("left", [1, 0])
def test_the_last_step_is_validated_before_lost_images_end_the_run(tmp_path, left):
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(device="cpu"), name="mine")
    saved: list[int] = []
    checkpoints = SimpleNamespace(save_whole=lambda _, task: saved.append(task.step))
    quarantine = Quarantine(RunDir(tmp_path), plan, checkpoints=checkpoints, say=print)
    quarantine.load_state_dict({"reasons": {f"{number}": "bad" for number in range(1000)}})
    task = Classifier.__new__(Classifier)
    pl.LightningModule.__init__(task)
    task.step, task.at_step_end = plan.total_steps - left, True

    if left == 0:
        quarantine.on_train_batch_end(None, task)
        assert saved == []
    with pytest.raises(DataError, match="1000 of 1,281,167 training images cannot be used"):
        (quarantine.on_train_batch_end if left else quarantine.on_train_end)(None, task)

    assert saved == [task.step]
