"""`convnext evaluate`, `predict` and `finetune` as a person runs them, from one small run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TINY = """
about: A few steps of the smallest model, for tests.
model: {name: convnextv2_atto}
data: {image_px: 32, workers: 0}
augment: {rand_augment: null, erasing: null}
mix: {mixup: null, cutmix: null}
batch: {global_images: 13, per_device_images: 13}
optim: {lr: 1.0e-3, lr_images: 13, layer_decay: null}
schedule: {length: 4st, warmup: null}
ema: {decay: 0.5}
evaluate: {every: 2st, crop_frac: 1.0}
checkpoint: {every: 2st}
log: {every_steps: 2, trackers: [csv]}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A run of four steps; only read it."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "tiny.yaml").write_text(TINY)
    command = [sys.executable, "-m", "convnext_cli", "train", "tiny.yaml", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--data", str(tiny_shards)],
        cwd=folder, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


def evaluate(run_process, checkpoint: Path, data: Path, *more: str) -> dict:
    done = run_process(
        "evaluate", checkpoint, "--data", data, "--device", "cpu", "--workers", "0", "--json", *more
    )
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_two_processes_score_what_one_scores(
    run_process, run: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # rounding depends on how threads share the work
    one = evaluate(run_process, run, tiny_shards, "--batch", "5")
    two = evaluate(run_process, run, tiny_shards, "--batch", "5", "--devices", "2")

    assert one["images"] == two["images"] == 12
    for key in ("top1", "top5", "loss", "ece"):
        assert two[key] == pytest.approx(one[key], rel=1e-9, abs=1e-9), key
    assert two["per_class"] == one["per_class"]
    assert two["worst_pairs"] == one["worst_pairs"]


def test_raw_and_averaged_weights_score_what_training_wrote(
    run_process, run: Path, tiny_shards: Path
):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if "val/loss" in row)
    checkpoint = run / "checkpoints" / "last.ckpt"

    for source, prefix in (("raw", "val"), ("ema", "val_ema")):
        report = evaluate(run_process, checkpoint, tiny_shards, "--weights", source)
        assert report["weights"] == source
        assert (report["image_px"], report["crop"], report["crop_frac"]) == (32, "center", 1.0)
        assert report["top1"] == pytest.approx(last[f"{prefix}/top1"])
        assert report["loss"] == pytest.approx(last[f"{prefix}/loss"], rel=1e-5)


def test_timm_scores_what_the_run_scores(run_process, run: Path, tiny_shards: Path):
    converted = run.parent / "timm.safetensors"
    done = run_process("weights", "convert", run / "checkpoints" / "last.ckpt",
                       "--to", "timm", "--out", converted)  # fmt: skip
    assert done.exit_code == 0, done.stderr

    ours = evaluate(run_process, run / "checkpoints" / "last.ckpt", tiny_shards)
    theirs = evaluate(
        run_process, f"timm:convnextv2_atto:{converted}", tiny_shards,
        "--image-px", "32", "--crop-frac", "1.0",
    )  # fmt: skip

    assert theirs["model"] == "timm:convnextv2_atto"
    assert theirs["top1"] == ours["top1"]
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)


def test_predict_names_classes_and_the_files_that_are_none(
    run_process, run: Path, image_folder: Path
):
    bad = image_folder / "val" / "notes.jpg"
    bad.write_text("no image")

    done = run_process("predict", run, image_folder / "val", "--json", "--device", "cpu")

    assert done.exit_code == 2
    assert f"{bad}: " in done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) == 15
    names = {guess["name"] for guess in seen[0]["predictions"]}
    assert names == {"cross", "disc", "square"}
    total = sum(guess["probability"] for guess in seen[0]["predictions"])
    assert total == pytest.approx(1.0, abs=1e-5)


def test_fine_tuning_chooses_a_recipe_and_takes_the_weights(
    run_process, run: Path, tiny_shards: Path
):
    done = run_process(
        "finetune", "batch.global_images=12", "optim.lr_images=12", "schedule.length=2st",
        "schedule.warmup=null", "data.workers=0", "evaluate.every=null",
        "--from", run, "--data", tiny_shards, "--device", "cpu", "--name", "tuned",
        "--runs-dir", run.parent,
    )  # fmt: skip

    assert done.exit_code == 0, done.stderr
    assert "small_data: the checkpoint is a convnextv2_atto" in done.stderr
    assert "its head is kept" in done.stderr
    assert "took convnextv2_atto (ema weights)" in done.stderr
    report = evaluate(run_process, run.parent / "tuned", tiny_shards)
    assert report["image_px"] == 32


def test_a_recipe_of_another_architecture_is_refused(run_process, run: Path, tiny_shards: Path):
    done = run_process(
        "finetune", "in22k_in1k_tiny_224", "--from", run, "--data", tiny_shards, "--device", "cpu",
        "--runs-dir", run.parent,
    )  # fmt: skip

    assert done.exit_code == 2
    assert "trains a convnext_tiny, but the checkpoint is a convnextv2_atto" in done.stderr
    assert not (run.parent / "in22k_in1k_tiny_224").exists()
