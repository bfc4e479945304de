"""A save that is killed at one system call after the other: what is left is always whole."""

import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from convnext_cli.errors import WriteError
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.manifest import find_newest_whole
from convnext_cli.training.checkpoint import BackgroundWriter

CALLS = "openat,write,fsync,rename,renameat,unlink,unlinkat,symlink,symlinkat,link"

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def save(run: RunDir, step: int) -> None:
    asked = SimpleNamespace(keep_last=2, failure_hours=24.0)
    plan = SimpleNamespace(
        world_size=1, checkpoint_every_steps=1, checkpoint_every_seconds=None,
        checkpoint_keep_every_steps=None, recipe=SimpleNamespace(checkpoint=asked),
    )  # fmt: skip
    writer = BackgroundWriter(run, plan)
    state = {"state_dict": {"w": torch.full((50_000,), float(step))}, "convnext": {"step": step}}
    writer.save_checkpoint(state, run.checkpoint(step), storage_options=(run.last, run.best))
    writer.wait()


def save_when_told(told: Connection, run: RunDir) -> None:
    save(run, 1)  # now everything is imported
    told.send("ready")
    told.recv()
    try:
        save(run, 2)
    except WriteError as error:
        sys.exit(error.exit_code)


class Tracer:
    """Saves in a process of its own that strace is attached to."""

    def __init__(self) -> None:
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["convnext_cli.training.checkpoint"])

    def save(self, run: RunDir, *options: str, log: Path) -> int:
        """Save step 2; how the process ended."""
        here, there = self.processes.Pipe()
        process = self.processes.Process(target=save_when_told, args=(there, run))
        process.start()
        assert here.recv() == "ready"
        command = ["strace", "-f", "-o", str(log), "-p", str(process.pid), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert "attached" in strace.stderr.readline()
            here.send(None)
            process.join(60)
            strace.wait(60)
        assert process.exitcode is not None
        return process.exitcode


@pytest.fixture(scope="module")
def tracer() -> Tracer:
    return Tracer()


@pytest.fixture
def saved(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "run")
    save(run, 1)
    return run


def copy_run(run: RunDir, folder: Path) -> RunDir:
    shutil.copytree(run.root, folder, symlinks=True)
    return RunDir(folder)


def count_calls(log: Path) -> list[tuple[str, int]]:
    """(name, n): the n-th of that name; strace counts each name and thread by itself."""
    calls = [re.match(r"(\d+)\s+(\w+)\(", line) for line in log.read_text().splitlines()]
    by_thread = [(match[1], match[2]) for match in calls if match]
    writer = Counter(thread for thread, name in by_thread if name == "fsync").most_common(1)[0][0]
    seen: Counter[str] = Counter()
    found = []
    for thread, name in by_thread:
        if thread == writer:
            seen[name] += 1
            found.append((name, seen[name]))
    return found


def test_a_save_that_is_killed_at_any_system_call_leaves_a_whole_checkpoint(
    saved, tmp_path, tracer
):
    log = tmp_path / "calls"
    counted = copy_run(saved, tmp_path / "counted")
    assert tracer.save(counted, "-e", f"trace={CALLS}", log=log) == 0
    calls = count_calls(log)
    assert len(calls) > 20, log.read_text()

    left = []
    for name, number in calls:
        run = copy_run(saved, tmp_path / f"{name}-{number}")

        code = tracer.save(
            run, "-e", f"inject={name}:signal=KILL:when={number}", log=tmp_path / "killed"
        )

        assert code == -signal.SIGKILL, (name, number)
        newest, damaged = find_newest_whole(run)
        assert not damaged, "a first save that is killed would end the run for ever"
        assert newest is not None, (name, number)
        assert newest.manifest is not None
        left.append(newest.manifest.step)
        save(run, 3)
        assert find_newest_whole(run)[0].manifest.step == 3
    assert sorted(left) == left, "once the new one counts, it stays"
    assert set(left) == {1, 2}


@pytest.mark.parametrize(
    ("call", "error"),
    [("write", "ENOSPC"), ("write", "EDQUOT"), ("fsync", "EIO"), ("openat", "EROFS"),
     ("openat", "EACCES"), ("rename", "EIO")],
)  # fmt: skip
def test_a_save_that_the_system_refuses_says_so_and_leaves_the_one_before(
    saved, tmp_path, tracer, call, error
):
    code = tracer.save(saved, "-e", f"inject={call}:error={error}", log=tmp_path / "calls")

    assert code == WriteError.exit_code
    newest, _ = find_newest_whole(saved)
    assert newest is not None
    assert newest.manifest.step == 1
