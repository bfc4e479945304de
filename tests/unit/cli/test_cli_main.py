"""How `convnext` shows a mistake, and that a bug keeps its traceback."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from convnext_cli import __version__
from convnext_cli.cli._console import console, make_table
from convnext_cli.errors import DataError, LostRank, Stopped


def test_a_mistake_is_one_sentence_a_blank_line_and_a_hint_on_stderr(run_cli):
    done = run_cli("plan", "in1k_tinny")

    assert done.exit_code == 2
    assert done.stdout == ""
    error, blank, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert "in1k_tinny" in error
    assert blank == ""
    assert hint == "hint: did you mean in1k_tiny?"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.rl=1e-3", "optim.rl"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=-1", "optim.lr"),
        ("data.image_px=100000", "data.image_px"),
        ("schedule.length=300", "schedule.length"),
    ],
)
def test_a_wrong_override_is_named_and_nothing_is_written(run_cli, tmp_path, override, sentence):
    done = run_cli("train", "in1k_tiny", override)

    assert done.exit_code == 2
    assert sentence in done.stderr.splitlines()[0]
    assert "hint: " in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "local_rank", "joined", "told"),
    [
        (DataError("shard 3 is gone"), "0", False, "error (rank 8 on "),
        (DataError("shard 3 is gone"), "1", False, ""),
        (DataError("shard 3 is gone"), "1", True, "error (rank 9 on "),
        (Stopped("saved"), "0", True, ""),
        (LostRank("lost"), "0", True, ""),
    ],
)
def test_a_rank_tells_what_it_alone_has_met_and_leaves_the_rest_to_others(
    run_cli, monkeypatch, error, local_rank, joined, told
):
    def end() -> None:
        raise error

    monkeypatch.setattr("convnext_cli.__main__.app", end)
    monkeypatch.setattr("convnext_cli.__main__._has_joined", lambda: joined)
    for name, value in {"RANK": f"{8 + int(local_rank)}", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(console, "quiet", True)  # as of every rank but 0

    done = run_cli("train", "quickstart")

    assert done.exit_code == error.exit_code
    assert done.stderr.startswith(told)
    assert bool(done.stderr) is bool(told)


def test_a_folder_that_was_deleted_is_told_and_not_that_torch_is_broken(
    run_cli, tmp_path, monkeypatch
):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()

    done = run_cli("train", "quickstart")

    assert done.exit_code == 2
    assert "the folder in which this command was started is gone" in done.stderr


def test_an_image_that_no_memory_holds_is_refused(run_cli):
    done = run_cli("predict", "weights.pth", "photo.jpg", "--image-px", 100_000)

    assert done.exit_code == 2
    assert "--image-px" in done.stderr


def test_brackets_in_a_message_are_shown_and_not_read_as_markup(run_cli):
    done = run_cli("plan", "my[red]recipe")

    assert done.exit_code == 2
    assert "my[red]recipe" in done.stderr


def test_the_version_is_data_and_goes_to_stdout(run_cli):
    done = run_cli("--version")

    assert (done.exit_code, done.stdout, done.stderr) == (0, f"convnext {__version__}\n", "")


@pytest.mark.parametrize(
    ("stream", "command", "code"),
    [
        ("stdout", "recipes show in1k_tiny", 141),
        ("stderr", "plan in1k_tiny", 141),
        ("stderr", "plan in1k_tinny", 2),
    ],
)
def test_a_reader_that_leaves_ends_a_command_without_a_word(stream, command, code):
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writer}

    done = subprocess.run(
        [sys.executable, "-m", "convnext_cli", *command.split()],
        **streams, check=False,
    )  # fmt: skip
    os.close(writer)

    assert done.returncode == code
    assert not done.stdout
    assert not done.stderr


def test_a_full_disk_behind_stdout_ends_with_74():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "convnext_cli", "recipes", "show", "quickstart"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip

    assert done.returncode == 74
    error, _, hint = done.stderr.splitlines()
    assert error == "error: cannot write to stdout: its disk is full"
    assert hint == "hint: look: df -h"


def test_data_has_the_same_bytes_in_every_locale():
    done = subprocess.run(
        [sys.executable, "-m", "convnext_cli", "recipes", "show", "quickstart", "about=köln"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=True,
    )  # fmt: skip

    assert done.stdout.startswith("about: köln\n".encode())


@pytest.mark.parametrize("command", [("plan",), ("runs", "show"), ("weights", "inspect")])
def test_a_path_that_the_system_refuses_is_a_mistake(run_cli, command):
    done = run_cli(*command, 300 * "a")

    assert done.exit_code == 2
    error, _, hint = done.stderr.splitlines()
    # from Python 3.14 on there is no such file; before, the system's own word is told
    assert re.fullmatch(r"error: (no \w+ |there is no file )?'?a{300}.*", error)
    assert hint.startswith("hint: ")


def test_a_bug_is_not_dressed_up_as_a_mistake(run_cli, monkeypatch):
    monkeypatch.setattr("convnext_cli.cli.recipes.list_recipes", lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        run_cli("recipes", "list")


def test_a_terminal_that_is_too_narrow_for_a_table_cuts_nothing_off():
    table = make_table("image", ">images")
    table.add_row("holiday/0001.jpg", "1,281,167")
    narrow = Console(width=14)

    with narrow.capture() as captured:
        narrow.print(table)

    shown = captured.get().splitlines()[1:]  # below the head
    assert sorted("".join(shown).replace(" ", "")) == sorted("holiday/0001.jpg1,281,167")
