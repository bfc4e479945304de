"""The laws of training, over the real command with real processes on a CPU."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from convnext_cli.data.index import read_index
from convnext_cli.runs.record import read_jsonl

RECIPE = """
about: A few steps of the smallest model, for tests.
model: {name: convnextv2_atto, drop_path: 0.1}
data: {image_px: 32, workers: 1, order: window, lanes: 4}
augment: {rand_augment: null, erasing: 0.25}
batch: {global_images: 8, per_device_images: 8}
optim: {lr: 1.0e-3, lr_images: 8}
schedule: {length: 6st, warmup: 2st}
ema: {decay: 0.9}
evaluate: {every: 4st}
checkpoint: {every: 1st, keep_last: 10}
log: {every_steps: 1, trackers: [csv]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def train(recipe: Path, data: Path, *more: str, name: str = "run") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "convnext_cli", "train", str(recipe), "--data", str(data)]
    command += ["--name", name, "--runs-dir", str(recipe.parent / "runs"), "--device", "cpu", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def run_dir(recipe: Path, name: str = "run") -> Path:
    return recipe.parent / "runs" / name


@dataclass(frozen=True)
class Finished:
    """A run of six steps that nothing disturbed; shared, so read only."""

    recipe: Path
    root: Path
    output: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_shards) -> Finished:
    path = tmp_path_factory.mktemp("finished") / "tiny.yaml"
    path.write_text(RECIPE)
    done = train(path, tiny_shards)
    assert done.returncode == 0, done.stderr
    return Finished(path, run_dir(path), done)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(left: Path, right: Path) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    differing = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not differing


def test_a_run_leaves_checkpoints_rows_a_plot_and_the_next_command(finished):
    run, done = finished.root, finished.output

    assert [row["step"] for row in rows(run) if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(run) if "val_ema/top1" in row] == [4, 6]
    assert (run / "checkpoints" / "last.ckpt").resolve().name == "step=00000006.ckpt"
    assert (run / "plots" / "curves.png").stat().st_size > 1000
    assert (run / "metrics.csv").read_text().startswith("step,")
    assert "convnext evaluate" in done.stderr
    assert done.stdout == ""


def test_averaging_does_not_change_the_raw_weights(recipe, tiny_shards, finished):
    assert train(recipe, tiny_shards, "ema.decay=null", name="without").returncode == 0

    averaged = weights(finished.root / "checkpoints/last.ckpt")
    raw = {key: value for key, value in averaged.items() if key.startswith("model.")}
    plain = weights(run_dir(recipe, "without") / "checkpoints/last.ckpt")
    assert raw.keys() == plain.keys()
    assert all(torch.equal(raw[key], plain[key]) for key in raw)


def test_a_run_of_growing_images_goes_on_across_a_change_of_size(recipe, tiny_shards):
    growing = ["progressive.from_px=32", "data.image_px=96", "progressive.until=0.67"]
    growing += ["model.drop_path=0.5", "model.drop_path_kind=skip", "evaluate.every=6st"]
    done = train(recipe, tiny_shards, *growing, name="whole")
    assert done.returncode == 0, done.stderr
    whole, parted = run_dir(recipe, "whole"), run_dir(recipe, "parted")
    plan = json.loads((whole / "plan.json").read_text())
    assert [(size["image_px"], size["first_step"]) for size in plan["train_sizes"]] == [
        (32, 0), (64, 2), (96, 4),
    ]  # fmt: skip
    shutil.copytree(whole, parted, symlinks=True)
    for step in range(4, 7):
        (parted / "checkpoints" / f"step={step:08d}.ckpt").unlink()

    again = train(recipe, tiny_shards, *growing, name="parted")

    assert again.returncode == 0, again.stderr
    assert "going on from step=00000003.ckpt" in again.stderr
    assert_same_weights(whole / "checkpoints/last.ckpt", parted / "checkpoints/last.ckpt")
    kept = ("step", "train/loss", "val/loss", "val_ema/top1")
    assert [[row.get(key) for key in kept] for row in rows(parted)] == [
        [row.get(key) for key in kept] for row in rows(whole)
    ]


def test_two_devices_that_leave_samples_out_train_without_a_warning(recipe, tiny_shards):
    skipping = ["model.drop_path=0.5", "model.drop_path_kind=skip"]

    done = train(recipe, tiny_shards, "schedule.length=3st", "--devices", "2", *skipping)

    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert all(row["train/grad_norm"] > 0 for row in rows(run_dir(recipe)) if "train/loss" in row)


@pytest.fixture
def damaged(tiny_shards, tmp_path):
    """A copy of the shards in which every third training image is no image any more."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_shards, folder)
    for index_path in sorted(folder.glob("train-*.index.npz")):
        index = read_index(index_path)
        shard = folder / index_path.name.replace(".index.npz", ".tar")
        content = bytearray(shard.read_bytes())
        for offset in index.image_offset[::3]:
            content[offset : offset + 64] = bytes(64)
        shard.write_bytes(content)
    return folder


def test_damaged_images_are_replaced_named_once_and_told(recipe, damaged):
    done = train(recipe, damaged, "data.bad_frac=1.0")

    assert done.returncode == 0, done.stderr
    events = read_jsonl(run_dir(recipe) / "events.jsonl")
    keys = [row["key"] for row in events if row["event"] == "quarantined"]
    reasons = {row["reason"] for row in events if row["event"] == "quarantined"}
    assert 10 <= len(keys) == len(set(keys)) <= 15
    assert reasons == {"its bytes are not those that were indexed (xxh3)"}
    told = sum(row.get("data/replaced_images", 0) for row in rows(run_dir(recipe)))
    assert told >= len(keys)
    assert f"{len(keys)} images could not be used, and neighbours stood in" in done.stderr


def test_more_damage_than_the_budget_allows_ends_the_run_with_a_checkpoint(recipe, damaged):
    stopped = train(recipe, damaged)

    assert stopped.returncode == 2
    assert "of 39 training images cannot be used, and data.bad_frac=0.0001 allows 1;" in (
        stopped.stderr
    )
    assert "Traceback" not in stopped.stderr
    assert (run_dir(recipe) / "checkpoints" / "last.ckpt").exists()

    allowed = train(recipe, damaged, "data.bad_frac=1.0")

    assert allowed.returncode == 0, allowed.stderr
    assert "going on from" in allowed.stderr


def test_damage_in_evaluation_ends_the_run(recipe, tiny_shards, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_shards, folder)
    index = read_index(folder / "val-000000.index.npz")
    with (folder / "val-000000.tar").open("r+b") as shard:
        shard.seek(int(index.image_offset[5]) + 200)
        shard.write(b"x")

    done = train(recipe, folder)

    assert done.returncode == 2
    assert "its bytes are not those that were indexed (xxh3)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_shard_that_is_missing_is_told_before_anything_is_spent(recipe, tiny_shards, tmp_path):
    folder = tmp_path / "lost"
    shutil.copytree(tiny_shards, folder)
    lost = sorted(folder.glob("train-*.tar"))[1]
    lost.unlink()

    done = train(recipe, folder)

    assert done.returncode == 2
    assert f"{lost}: No such file or directory" in done.stderr
    assert not run_dir(recipe).exists()


def test_a_checkpoint_goes_on_only_with_the_data_it_was_made_with(
    recipe, finished, image_folder, tmp_path
):
    from convnext_cli.data.pack import PackOptions, pack

    checkpoints = run_dir(recipe) / "checkpoints"
    shutil.copytree(finished.root, run_dir(recipe), symlinks=True)
    for step in range(3, 7):
        (checkpoints / f"step={step:08d}.ckpt").unlink()
    pack(image_folder, tmp_path / "other", options=PackOptions(images_per_shard=16))

    other = train(recipe, tmp_path / "other")
    newest = str(checkpoints / "step=00000002.ckpt")
    elsewhere = train(recipe, tmp_path / "other", "--resume", newest, name="elsewhere")

    for done, told in (
        (other, "that is not what"),
        (elsewhere, "the checkpoint was made with data set"),
    ):
        assert done.returncode == 2
        assert told in done.stderr
        assert "images would come twice or never" in done.stderr
        assert "Traceback" not in done.stderr
    assert not run_dir(recipe, "elsewhere").exists()


def test_a_stream_trains_and_prints_its_weaker_promise(recipe, tiny_shards):
    done = train(
        recipe,
        f"{tiny_shards}/train-{{000000..000002}}.tar",
        *("data.mode=stream", f"data.val_path={tiny_shards}/val-000000.tar"),
        *("data.train_images=39", "data.val_images=12", "model.num_classes=3"),
    )

    assert done.returncode == 0, done.stderr
    assert "data.mode=stream: the order depends on devices and workers" in done.stderr
    assert [row["step"] for row in rows(run_dir(recipe)) if "val/top1" in row] == [4, 6]


def test_the_same_command_after_the_end_says_what_came_out(tiny_shards, finished):
    before = (finished.root / "metrics.jsonl").read_bytes()

    again = train(finished.recipe, tiny_shards)

    assert again.returncode == 0, again.stderr
    assert "finished   6 steps, best top-1" in again.stderr
    assert (finished.root / "metrics.jsonl").read_bytes() == before


def test_a_run_from_before_a_key_was_known_goes_on_under_its_default(recipe, tiny_shards, finished):
    run = run_dir(recipe)
    shutil.copytree(finished.root, run, symlinks=True)
    (run / "checkpoints" / "step=00000006.ckpt").unlink()
    text = (run / "recipe.yaml").read_text()
    older = re.sub(r"  drop_path_kind: .*\n|progressive:\n(  .*\n)+", "", text)
    assert len(older) < len(text) - 40
    (run / "recipe.yaml").write_text(older)

    other = train(recipe, tiny_shards, "model.drop_path_kind=skip")
    again = train(recipe, tiny_shards)

    assert other.returncode == 2
    assert "holds a run with model.drop_path_kind=scale, but skip is asked" in other.stderr
    assert again.returncode == 0, again.stderr
    assert "going on from step=00000005.ckpt" in again.stderr


def test_a_resume_from_an_older_checkpoint_sets_the_newer_ones_aside(recipe, tiny_shards, finished):
    run = run_dir(recipe)
    shutil.copytree(finished.root, run, symlinks=True)
    older = run / "checkpoints" / "step=00000003.ckpt"

    done = train(recipe, tiny_shards, "--resume", str(older))

    assert done.returncode == 0, done.stderr
    newer = [f"step=0000000{step}.ckpt" for step in (4, 5, 6)]
    assert f"newer checkpoints are set aside in {older.parent / 'abandoned'}" in done.stderr
    aside = sorted(path.name for path in (older.parent / "abandoned").iterdir())
    assert aside == sorted([*newer, *(name.replace("ckpt", "json") for name in newer)])
    events = read_jsonl(run / "events.jsonl")
    (told,) = [row for row in events if row["event"] == "abandoned"]
    assert (told["step"], told["files"]) == (3, newer)
    # after the start: else the time since the last attempt would count as that attempt's own
    assert events[events.index(told) - 1]["event"] == "resumed"
    assert_same_weights(older.parent / "last.ckpt", finished.root / "checkpoints" / "last.ckpt")


def test_another_recipe_in_the_same_folder_is_refused(tiny_shards, finished):
    other = train(finished.recipe, tiny_shards, "optim.lr=5e-4")

    assert other.returncode == 2
    assert "holds a run with optim.lr=0.001, but 0.0005 is asked now" in other.stderr
    assert "--name" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_loss_that_is_not_finite_ends_the_run_with_71(recipe, tiny_shards):
    done = train(recipe, tiny_shards, "optim.lr=1e30", "checkpoint.every=100st")

    assert done.returncode == 71, done.stderr
    assert "the model gave non-finite outputs for 12 of 12 images" in done.stderr
