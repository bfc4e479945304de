"""A rank that stands still ends, whatever else does not work."""

import subprocess
import sys

PROGRAM = """
import time
from pathlib import Path

from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.runs.layout import RunDir
from convnext_cli.training.watch import HangWatch

recipe = load_recipe("in1k_tiny", ["guard.start_minutes=0.002"])
watch = HangWatch(RunDir(Path("gone")), make_plan(recipe, Cluster(), name="mine"))
watch.start()
time.sleep(10)
"""


def test_a_hang_ends_with_76_where_its_stacks_cannot_be_written(tmp_path):
    (tmp_path / "gone").touch()  # no folder, as of a disk that is gone

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 76, done.stderr
    assert "rank 0 has stood still" in done.stderr
    assert "cannot write gone/stacks/rank=00000.txt: Not a directory" in done.stderr
