"""What a person sees of a run, and its log."""

import errno
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from convnext_cli.errors import WriteError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.training.progress import ProgressDisplay

TRAINING = {
    "step": 600, "epoch": 1.9231, "train/loss": 6.1, "train/lr": 1e-4, "memory/gib": 7.3,
    "speed/images_per_second": 32_768.0, "speed/data_wait_frac": 0.0,
}  # fmt: skip


def show(row: dict, *, log: Path) -> tuple[str, str]:
    """(what a person sees, what is in the log)"""
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(), name="in1k_tiny")
    console = Console(file=io.StringIO())
    ProgressDisplay(plan, console=console, log=log).show(row)
    return console.file.getvalue(), log.read_text()


def test_a_line_of_training_says_how_long_the_rest_takes(tmp_path):
    seen, logged = show(TRAINING, log=tmp_path / "train.log")

    assert seen == logged
    assert seen.endswith("  32,768 img/s  7.3 GiB  3 h 13 min left\n")


def test_the_last_line_and_a_validation_say_nothing_of_a_rest(tmp_path):
    validation = {"step": 312, "epoch": 1.0, "val/top1": 5.0, "val/loss": 6.0}

    last, _ = show(TRAINING | {"step": 93_600}, log=tmp_path / "train.log")
    validated, _ = show(validation, log=tmp_path / "train.log")

    assert last.endswith("7.3 GiB\n")
    assert validated.endswith("loss 6.0000\n")


def test_a_line_for_people_is_in_the_log_too_and_a_full_disk_is_told(tmp_path):
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(), name="in1k_tiny")
    console = Console(file=io.StringIO())
    log = tmp_path / "train.log"
    ProgressDisplay(plan, console=console, log=log).say("run: runs/mine [1]")

    assert log.read_text() == console.file.getvalue() == "run: runs/mine [1]\n"
    with pytest.raises(WriteError, match="cannot write /dev/full: No space left"):
        ProgressDisplay(plan, console=console, log=Path("/dev/full")).say("more")


class Gone(io.StringIO):
    """A console that nobody reads any more."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, text)  # EPIPE makes it a BrokenPipeError


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_that_is_gone_costs_no_step(tmp_path, monkeypatch, number, terminal):
    monkeypatch.setattr("os.dup2", lambda *_: None)  # by which rich turns stdout off
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(), name="in1k_tiny")
    console = Console(file=Gone(number), force_terminal=terminal)
    display = ProgressDisplay(plan, console=console, log=tmp_path / "train.log")
    task = SimpleNamespace(step=0)
    monkeypatch.setattr("convnext_cli.training.progress.as_task", lambda _: task)

    display.on_train_start(SimpleNamespace(is_global_zero=True), task)
    display.say("one")
    display.show(TRAINING)
    display.teardown(None, task, "fit")
    monkeypatch.undo()

    one, row = (tmp_path / "train.log").read_text().splitlines()
    assert one == "one"
    assert row.startswith("step   600/93600")
