"""What a person sees of a run, and its log."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from convnext_cli.errors import WriteError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.training.progress import ProgressDisplay


def test_a_line_for_people_is_in_the_log_too_and_a_full_disk_is_told(tmp_path):
    plan = make_plan(load_recipe("in1k_tiny"), Cluster(), name="in1k_tiny")
    console = Console(file=io.StringIO())
    log = tmp_path / "train.log"
    ProgressDisplay(plan, console=console, log=log).say("run: runs/mine [1]")

    assert log.read_text() == console.file.getvalue() == "run: runs/mine [1]\n"
    with pytest.raises(WriteError, match="cannot write /dev/full: No space left"):
        ProgressDisplay(plan, console=console, log=Path("/dev/full")).say("more")
