"""Training on a real GPU: every precision, compiled or not, and what it must agree with."""

import json

import pytest
import torch

from convnext_cli.training.diagnosis import MAX_DENSE_CLASSES, ConfusedPair, Diagnostics

RECIPE = """
about: A few steps of the smallest model on a GPU, for tests.
model: {name: convnextv2_atto, drop_path: 0.1}
data: {image_px: 32, workers: 2}
augment: {rand_augment: null}
batch: {global_images: 16, per_device_images: 8}
optim: {lr: 1.0e-3, lr_images: 16, clip_norm: 1.0}
schedule: {length: 8st, warmup: 2st}
ema: {decay: 0.9}
log: {every_steps: 1, trackers: [csv]}
"""


@pytest.fixture
def train(tmp_path, tiny_shards, run_cli):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE)

    def run(name: str, *more: str) -> list[dict]:
        done = run_cli(
            "train", recipe, *more, "--data", tiny_shards, "--name", name, "--devices", 1
        )
        assert done.exit_code == 0, done.stderr
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kernels", ["auto", "fused", "compile", "eager"])
def test_every_precision_learns_with_all_kernels(train, precision, kernels):
    rows = train("run", f"compute.kernels={kernels}", "--precision", precision, "--device", "cuda")

    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 8
    assert all(0 < loss < 5 for loss in losses)


def test_a_gpu_gives_the_losses_of_a_cpu(train):
    plain = ["compute.kernels=eager", "--precision", "fp32", "model.drop_path=0"]
    plain.append("augment.erasing=null")  # its noise is drawn on the device

    gpu = train("gpu", *plain, "--device", "cuda")
    cpu = train("cpu", *plain, "--device", "cpu")

    for left, right in zip(gpu, cpu, strict=True):
        if "train/loss" in left:
            assert left["train/loss"] == pytest.approx(right["train/loss"], abs=2e-3)


@pytest.mark.parametrize("kernels", ["compile", "eager"])
def test_blocks_that_skip_and_images_that_grow_learn_on_a_gpu(train, kernels):
    asked = ["model.drop_path=0.5", "model.drop_path_kind=skip", f"compute.kernels={kernels}"]
    asked += ["data.image_px=64", "progressive.from_px=32", "--device", "cuda"]

    losses = [row["train/loss"] for row in train("run", *asked) if "train/loss" in row]

    assert len(losses) == 8
    assert all(0 < loss < 5 for loss in losses)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_drop_path_waits_for_no_device():
    from convnext_cli.models.drop_path import add_kept, draw_paths

    x_NCHW = torch.randn(16, 8, 7, 7, device="cuda", requires_grad=True)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for kind in ("scale", "skip"):
            drawn = draw_paths(x_NCHW, blocks=2, drop_path=0.5, kind=kind)[1]
        add_kept(x_NCHW, torch.sin, drawn).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert x_NCHW.grad is not None


@pytest.mark.parametrize("kernels", ["compile", "eager"])
def test_fp8_learns_nearly_what_bf16_learns(train, kernels):
    pytest.importorskip("torchao", reason="torchao is not installed")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    # At 96 px a pass of 8 images has 72 positions in the last stage, no multiple of 16.
    wide = ["model.name=convnextv2_nano", "data.image_px=96", f"compute.kernels={kernels}"]
    wide += ["--precision", "bf16", "--device", "cuda"]

    plain, fp8 = train("plain", *wide), train("fp8", *wide, "compute.fp8=true")

    for left, right in zip(plain, fp8, strict=True):
        if "train/loss" in left:
            assert right["train/loss"] == pytest.approx(left["train/loss"], rel=0.1)


def test_confused_pairs_of_many_classes_are_counted_on_a_gpu():
    metric = Diagnostics(MAX_DENSE_CLASSES + 1).to("cuda")

    metric.update(torch.eye(2, metric.num_classes, device="cuda"), torch.tensor([0, 2]).cuda())

    assert metric.compute_diagnosis().confused == (ConfusedPair(label=2, predicted=1, images=1),)
