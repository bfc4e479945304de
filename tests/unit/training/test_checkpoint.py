import os
import signal
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from convnext_cli.errors import CheckpointError, StorageError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.runs.layout import RunDir, checkpoint_step
from convnext_cli.runs.manifest import check_checkpoint
from convnext_cli.training.checkpoint import (
    BackgroundWriter,
    Checkpoints,
    read_step,
    write_checkpoint,
)
from convnext_cli.training.task import Classifier


def content(step: int, size: int = 1000) -> dict[str, object]:
    return {"state_dict": {"w": torch.full((size,), float(step))}, "convnext": {"step": step}}


def test_a_saved_checkpoint_says_its_step_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "checkpoints" / "step=00000007.ckpt"

    write_checkpoint(content(7), path, world_size=1)

    assert read_step(path) == 7
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, "step=00000007.json"]


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        path = disk / "last.ckpt"
        write_checkpoint(content(1), path, world_size=1)

        with pytest.raises(StorageError, match="No space left"):
            write_checkpoint(content(2, size=1_000_000), path, world_size=1)

        assert read_step(path) == 1
        assert sorted(file.name for file in disk.iterdir()) == ["last.ckpt", "last.json"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_damaged_checkpoint_is_refused_with_a_sentence(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    write_checkpoint(content(3), path, world_size=1)
    path.write_bytes(path.read_bytes()[:500])

    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        read_step(path)


@pytest.mark.parametrize(
    "foreign",
    [
        {"args": Namespace(lr=1e-3), "model": {}},  # as the official code saves it
        torch.zeros(3),
        {"convnext": 5},
        {"model": {}},
    ],
)
def test_a_checkpoint_of_another_program_is_refused_with_a_sentence(tmp_path: Path, foreign):
    path = tmp_path / "checkpoint-299.pth"
    torch.save(foreign, path)

    with pytest.raises(CheckpointError, match="cannot be resumed from"):
        read_step(path)


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_or_the_new_one(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    write_checkpoint(content(0), path, world_size=1)
    program = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        from convnext_cli.training.checkpoint import write_checkpoint
        print("ready", flush=True)
        for step in range(1, 10_000):
            state = {"state_dict": {"w": torch.zeros(200_000)}, "convnext": {"step": step}}
            write_checkpoint(state, Path(sys.argv[1]), world_size=1)
            print(step, flush=True)
        """
    )
    saver = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert saver.stdout is not None
    with saver:
        for _ in range(4):  # ready, and three whole saves; the kill falls into a later one
            saver.stdout.readline()
        os.kill(saver.pid, signal.SIGKILL)

    assert read_step(path) >= 3


def test_a_checkpoint_of_the_same_step_counts_until_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch
):
    path = tmp_path / "step=00000003.ckpt"
    write_checkpoint(content(3), path, world_size=1)
    fsync, seen = os.fsync, []

    def look(handle: int) -> None:
        seen.append(check_checkpoint(path).problem)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    write_checkpoint(content(3, size=2000), path, world_size=1)

    assert seen[0] is None
    assert check_checkpoint(path).problem is None


def test_rows_are_on_the_disk_before_the_checkpoint_that_they_lead_to(tmp_path: Path, monkeypatch):
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.metrics.touch()
    fsync, synced = os.fsync, []

    def note(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    plan = make_plan(load_recipe("in1k_tiny"), Cluster(device="cpu"), name="run")
    writer = BackgroundWriter(run, plan)
    monkeypatch.setattr(os, "fsync", note)
    writer.save_checkpoint(content(3), run.checkpoint(3), storage_options=())
    writer.wait()

    assert synced[0] == run.metrics
    assert check_checkpoint(run.checkpoint(3)).problem is None


class Saved:
    """A run with checkpoints at some steps and names for some of them, and a start in it."""

    def __init__(self, folder: Path, *, steps: tuple[int, ...], **names: int) -> None:
        self.run = RunDir(folder)
        for step in steps:
            write_checkpoint(content(step), self.run.checkpoint(step), world_size=1)
        for name, step in names.items():
            getattr(self.run, name).symlink_to(self.run.checkpoint(step).name)

    def start(self, step: int, **state: object) -> Checkpoints:
        plan = make_plan(load_recipe("in1k_tiny"), Cluster(device="cpu"), name="mine")
        checkpoints = Checkpoints(self.run, plan, writer=None, agreement=None)
        checkpoints.load_state_dict({"best_top1": None, "best_ema_top1": None} | state)
        task = Classifier.__new__(Classifier)
        pl.LightningModule.__init__(task)
        task.step = step
        strategy = Namespace(broadcast=lambda value: value)
        checkpoints.on_train_start(Namespace(is_global_zero=True, strategy=strategy), task)
        return checkpoints

    def names(self) -> dict[str, int | None]:
        links = [link for link in self.run.links if link.exists()]
        return {link.stem: checkpoint_step(link.resolve()) for link in links}


def test_a_start_gives_the_name_of_the_best_back_to_the_checkpoint_that_was_it(tmp_path: Path):
    # the run went on to step 6, the best one by then, which is removed or damaged
    saved = Saved(tmp_path, steps=(2, 4, 6), last=6, best=6, best_ema=6)
    saved.run.checkpoint(6).unlink()

    scores = {"best_top1": 50.0, "best_step": 2, "best_ema_top1": 40.0, "best_ema_step": 4}
    started = saved.start(4, **scores)

    assert saved.names() == {"last": 4, "best": 2, "best_ema": 4}
    assert started.state_dict() == scores


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_a_best_score_without_its_checkpoint_is_forgotten(tmp_path: Path, damage: str):
    saved = Saved(tmp_path, steps=(2, 4), last=4, best=2, best_ema=2)
    path = saved.run.checkpoint(2)
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    if damage == "gone":
        path.unlink()

    started = saved.start(4, best_top1=50.0, best_step=2, best_ema_top1=40.0, best_ema_step=4)

    assert saved.names() == {"last": 4, "best_ema": 4}
    assert not saved.run.best.is_symlink()
    assert (started.best_top1, started.best_ema_top1) == (None, 40.0)


def test_a_checkpoint_from_before_the_steps_of_the_best_were_written_takes_them_from_the_names(
    tmp_path: Path,
):
    saved = Saved(tmp_path, steps=(2, 4, 6), last=6, best=2, best_ema=6)

    started = saved.start(4, best_top1=50.0, best_ema_top1=40.0)

    assert saved.names() == {"last": 4, "best": 2}  # step 6 is later than the start
    assert (started.best_top1, started.best_step) == (50.0, 2)
    assert (started.best_ema_top1, started.best_ema_step) == (None, None)
