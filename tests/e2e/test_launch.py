"""`convnext launch local`: two processes under torchrun, disturbed, end as if they were not."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from convnext_cli.runs.layout import RunDir

RECIPE = """
about: A few steps of the smallest model, for tests.
model: {name: convnextv2_atto}
data: {image_px: 32, workers: 0}
augment: {rand_augment: null}
batch: {global_images: 8, per_device_images: 4}
optim: {lr: 1.0e-3, lr_images: 8}
schedule: {length: 30st, warmup: 2st}
ema: {decay: null}
evaluate: {every: 30st}
checkpoint: {every: 5st, keep_last: 10}
log: {every_steps: 10, trackers: [csv]}
"""


def start(folder: Path, data: Path, *more: str, name: str) -> subprocess.Popen:
    (folder / "tiny.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "convnext_cli", "launch", "local", "tiny.yaml", *more]
    command += ["--data", str(data), "--devices", "2", "--device", "cpu", "--name", name]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, run: RunDir, step: int) -> None:
    while run.newest_step() < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def weights(run: RunDir) -> dict[str, torch.Tensor]:
    return torch.load(run.last, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_shards) -> RunDir:
    """A run of two processes that nothing disturbed; only read it."""
    folder = tmp_path_factory.mktemp("alone")
    process = start(folder, tiny_shards, name="alone")
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    return RunDir(folder / "runs" / "alone")


def test_a_killed_process_is_replaced_and_the_run_ends_with_the_same_weights(
    tmp_path, tiny_shards, alone
):
    run = RunDir(tmp_path / "runs" / "killed")
    process = start(tmp_path, tiny_shards, name="killed")
    wait_for_step(process, run, 5)
    torchrun = psutil.Process(process.pid).children()[0]
    torchrun.children()[1].kill()
    _, stderr = process.communicate(timeout=240)

    assert process.returncode == 0, stderr
    # 137 of the killed one, or 76 of the other, which may be the first to say that it is alone.
    assert re.search(r"exit code (137|76) at step", stderr), stderr
    ours, theirs = weights(run), weights(alone)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_a_signal_to_the_launcher_saves_and_ends_it_with_75_and_no_restart(
    tmp_path, tiny_shards, alone
):
    run = RunDir(tmp_path / "runs" / "told")
    process = start(tmp_path, tiny_shards, name="told")
    wait_for_step(process, run, 5)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    stopped_at = run.newest_step()
    again = start(tmp_path, tiny_shards, name="told")
    _, more = again.communicate(timeout=240)

    assert process.returncode == 75, stderr
    assert "error: stopped by " in stderr
    assert "Traceback" not in stderr
    assert 5 <= stopped_at < 30
    assert again.returncode == 0, more
    ours, theirs = weights(run), weights(alone)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_a_signal_while_the_processes_are_loaded_ends_with_75(tmp_path):
    process = start(tmp_path, tmp_path / "nowhere", name="early")
    found: list[psutil.Process] = []
    while len(found) < 3:  # torchrun and its two
        assert process.poll() is None, process.communicate()[1]
        found = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 75, stderr
    assert "error: stopped by SIGTERM before the first step" in stderr
    assert "Traceback" not in stderr


def test_a_mistake_is_final(tmp_path):
    process = start(tmp_path, tmp_path / "nowhere", name="mistaken")
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 2, stderr
    assert stderr.count("error: ") >= 1
    assert "starting again" not in stderr
