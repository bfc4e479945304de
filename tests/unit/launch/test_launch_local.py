"""Processes of this machine: what a signal comes to before any of them is there."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from convnext_cli.errors import Stopped
from convnext_cli.launch import local

WAIT = "import pathlib, time; pathlib.Path('began').touch(); time.sleep(60)"


def tell(number: signal.Signals, *, when: Path) -> None:
    """Send a signal to this process as soon as a file is there."""

    def wait() -> None:
        while not when.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_there_is_a_process_ends_with_75_and_leaves_nothing(
    tmp_path, monkeypatch, capfd, number
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "_TORCHRUN", WAIT)
    tell(number, when=tmp_path / "began")

    with pytest.raises(Stopped, match=f"stopped by {number.name} before the first step") as caught:
        local.LocalLaunch(["train"], num_processes=2).run()

    assert caught.value.exit_code == 75
    assert capfd.readouterr().err == ""


def test_ctrl_c_while_a_process_loads_ends_it_without_a_traceback(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    start = f"subprocess.call([sys.executable, '-c', {WAIT!r}])"
    monkeypatch.setattr(local, "_TORCHRUN", f"import subprocess, sys; sys.exit(128 - {start})")
    tell(signal.SIGINT, when=tmp_path / "began")

    with pytest.raises(Stopped, match="stopped by SIGINT before the first step"):
        local.LocalLaunch(["train"], num_processes=1).run()

    assert capfd.readouterr().err == ""
