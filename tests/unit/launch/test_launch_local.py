"""Processes of this machine: what a signal comes to before any of them is there."""

import os
import signal
import threading
import time

import pytest

from convnext_cli.errors import Stopped
from convnext_cli.launch import local


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_there_is_a_process_ends_with_75_and_leaves_nothing(
    tmp_path, monkeypatch, capfd, number
):
    monkeypatch.chdir(tmp_path)
    begin = "import pathlib, time; pathlib.Path('began').touch(); time.sleep(60)"
    monkeypatch.setattr(local, "_TORCHRUN", begin)

    def tell():
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=tell).start()
    with pytest.raises(Stopped, match=f"stopped by {number.name} before the first step") as caught:
        local.LocalLaunch(["train"], num_processes=2).run()

    assert caught.value.exit_code == 75
    assert capfd.readouterr().err == ""
