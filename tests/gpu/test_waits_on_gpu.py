"""The training loop on a real GPU: between two rows nothing waits for the device."""

import json
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from convnext_cli.data.augment import Choices
from convnext_cli.data.mix import BatchMix
from convnext_cli.training.later import LAG_STEPS, Later
from convnext_cli.training.ranks import RankTimer
from convnext_cli.training.recorder import Recorder
from convnext_cli.training.task import Classifier
from convnext_cli.training.watch import HangWatch

RECIPE = """
about: A few steps of the smallest model on a GPU, for tests.
model: {name: convnextv2_atto, drop_path: 0.1}
data: {image_px: 32, workers: 2}
augment: {erasing: 0.25}
batch: {global_images: 16, per_device_images: 8}
optim: {lr: 1.0e-3, lr_images: 16, clip_norm: 1.0}
schedule: {length: 12st, warmup: 2st}
ema: {decay: 0.9}
evaluate: {every: 12st, per_device_images: 4}
checkpoint: {every: 12st, keep_last: 10}
log: {every_steps: 6, trackers: [csv]}
"""


@pytest.fixture
def train(tmp_path, tiny_shards, run_cli):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)

    def run(*more: str):
        done = run_cli(
            *("train", recipe, *more, "--data", tiny_shards, "--name", "run"),
            *("--devices", 1, "--device", "cuda"),
        )
        assert done.exit_code == 0, done.stderr
        return tmp_path / "runs" / "run"

    return run


prototype = pytest.mark.filterwarnings(  # what torch says where this mode is first used
    "ignore:Synchronization debug mode is a prototype:UserWarning"
)


@pytest.fixture
def _no_waits(monkeypatch):
    """After two steps, which compile and fill caches, a wait is an error, but in a row or a save.

    torch sees waits of its own operators, such as `item`; not those of an event.
    """
    begin, end = RankTimer.on_train_batch_start, Recorder.on_train_batch_end

    def watch(self, trainer: pl.Trainer, pl_module: Classifier, *rest: object) -> None:
        torch.cuda.set_sync_debug_mode("error" if pl_module.step >= 2 else "default")
        begin(self, trainer, pl_module, *rest)

    def row(self, trainer: pl.Trainer, pl_module: Classifier, *rest: object, **more: object):
        if pl_module.at_step_end and pl_module.step % 6 == 0:
            torch.cuda.set_sync_debug_mode("default")
        end(self, trainer, pl_module, *rest, **more)

    monkeypatch.setattr(RankTimer, "on_train_batch_start", watch)
    monkeypatch.setattr(Recorder, "on_train_batch_end", row)
    yield
    torch.cuda.set_sync_debug_mode("default")


@prototype
@pytest.mark.usefixtures("_no_waits")
@pytest.mark.parametrize("kernels", ["fused", "compile", "eager"])
@pytest.mark.parametrize("rand_augment", ["null", "rand-m9-mstd0.5-inc1"])
def test_nothing_waits_for_the_device_between_two_rows(train, kernels, rand_augment):
    run = train(f"compute.kernels={kernels}", f"augment.rand_augment={rand_augment}")

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [6, 12]


@prototype
@pytest.mark.usefixtures("_no_waits")
def test_a_wait_in_a_step_is_an_error_of_the_test_above(train, monkeypatch):
    real = Classifier.training_step

    def waiting(task, batch, batch_idx):
        loss = real(task, batch, batch_idx)
        try:
            loss.item()
        finally:
            torch.cuda.set_sync_debug_mode("default")  # what ends the run may wait
        return loss

    monkeypatch.setattr(Classifier, "training_step", waiting)
    monkeypatch.setattr(HangWatch, "start", lambda _: None)  # nothing ends it after an error

    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        train("compute.kernels=eager")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_bad_step_is_left_out_on_the_device_and_named_with_its_own_step(
    train, monkeypatch, precision
):
    real = Classifier.training_step

    def spoiled(task, batch, batch_idx):
        loss = real(task, batch, batch_idx)
        return loss * float("nan") if task.step in {3, 10} else loss

    monkeypatch.setattr(Classifier, "training_step", spoiled)

    run = train("compute.kernels=eager", "--precision", precision)

    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "skipped"] == [4, 11]
    state = torch.load(run / "checkpoints" / "step=00000012.ckpt", weights_only=True)
    moments = state["optimizer_states"][0]["state"].values()
    assert {int(moment["step"]) for moment in moments} == {10}
    for value in state["state_dict"].values():
        assert torch.isfinite(value).all()


def test_a_number_is_read_some_steps_later_and_is_that_of_its_own_step():
    value = torch.full((2,), 3.0, device="cuda")

    later = Later(value)
    value.fill_(4.0)

    assert later.lag_steps == LAG_STEPS
    assert later.read().tolist() == [3.0, 3.0]
    assert later.read().is_pinned()  # else the copy would have been waited for


def test_a_batch_is_mixed_compiled_on_a_gpu_as_it_is_on_a_cpu():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    images = images.to(memory_format=torch.channels_last)
    boxes = np.array([(1, 20, 2, 30, 1020, 1021), (0,) * 6] * 4, dtype=np.int32)
    choices = Choices(np.zeros((8, 0, 0), np.float32), boxes)
    labels = torch.arange(8)
    mix = BatchMix(
        num_classes=10,
        seed=0,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
        group_images=2,
    )

    compiled = replace(mix, compiled=True, channels_last=True)
    x, target = compiled(images.cuda(), labels.cuda(), choices, step=0, first=0)

    expected_x, expected_target = mix(images, labels, choices, step=0, first=0)
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.cpu(), expected_x, atol=2e-6, rtol=0, check_stride=False)
    torch.testing.assert_close(target.cpu(), expected_target, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pass_images", [16, 8])  # one pass a step, and two
def test_recorded_as_cuda_graphs_the_losses_are_those_of_the_compiled_network(
    tmp_path, tiny_shards, run_cli, pass_images
):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("per_device_images: 8", f"per_device_images: {pass_images}"))
    losses = {}
    for graphs in ("false", "true"):
        done = run_cli(
            *("train", recipe, f"compute.cuda_graphs={graphs}", "log.every_steps=1"),
            *("compute.kernels=fused", "model.drop_path=0"),
            *("--data", tiny_shards, "--name", graphs),
            *("--devices", 1, "--device", "cuda"),
        )
        assert done.exit_code == 0, done.stderr
        lines = (tmp_path / "runs" / graphs / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses[graphs] = [row["train/loss"] for row in rows if "train/loss" in row]

    assert len(losses["true"]) == 12
    assert losses["true"] == pytest.approx(losses["false"], rel=2e-2)
