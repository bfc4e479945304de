import hashlib
import random
from pathlib import Path

import pytest

from convnext_cli.errors import CheckpointError
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.manifest import (
    Manifest,
    check_checkpoint,
    find_newest_whole,
    manifest_path,
    require_whole,
)


def write(run: RunDir, step: int, content: bytes = b"weights" * 500) -> Path:
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    path = run.checkpoint(step)
    path.write_bytes(content)
    manifest = Manifest(
        step=step,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        time="2026-11-23T00:00:00.000+00:00",
        world_size=1,
    )
    manifest_path(path).write_text(manifest.to_json())
    return path


def test_no_flip_of_one_bit_is_overlooked(tmp_path):
    path = write(RunDir(tmp_path), 3)
    content = path.read_bytes()
    rng = random.Random(0)

    for _ in range(400):
        place = rng.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)

        assert "sha256" in str(check_checkpoint(path).problem)

    path.write_bytes(content)
    assert check_checkpoint(path).problem is None


@pytest.mark.parametrize("step", [4, 9])
def test_a_damaged_manifest_makes_its_checkpoint_not_count(tmp_path, step):
    run = RunDir(tmp_path)
    path = write(run, step)
    manifest_path(path).write_text("{")

    assert "manifest" in str(check_checkpoint(path).problem)


def test_a_link_has_the_manifest_of_its_target(tmp_path):
    run = RunDir(tmp_path)
    path = write(run, 3)
    run.last.symlink_to(path.name)

    assert check_checkpoint(run.last).problem is None
    path.write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"last\.ckpt is damaged: 5 bytes"):
        require_whole(run.last)


def test_a_file_of_others_needs_no_manifest(tmp_path):
    path = tmp_path / "published.pth"
    path.write_bytes(b"weights")

    require_whole(path)


def test_the_newest_whole_checkpoint_is_found_behind_damaged_ones(tmp_path):
    run = RunDir(tmp_path)
    for step in (2, 4, 6, 8):
        write(run, step)
    run.checkpoint(8).write_bytes(b"cut")
    manifest_path(run.checkpoint(6)).unlink()

    newest, damaged = find_newest_whole(run)

    assert newest is not None
    assert newest.path == run.checkpoint(4)
    assert [state.path for state in damaged] == [run.checkpoint(8), run.checkpoint(6)]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert find_newest_whole(RunDir(tmp_path)) == (None, [])
