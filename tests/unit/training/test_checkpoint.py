import os
import signal
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from convnext_cli.errors import CheckpointError, StorageError
from convnext_cli.training.checkpoint import read_step, write_checkpoint


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
