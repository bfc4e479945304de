"""The script for a GPU runs at toy size, so that it is whole when somebody has one for minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKPOINTING = ["none", "selective", "stages", "blocks"]


def run_script(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """`benchmarks/gpu/step.sh` at toy size."""
    return subprocess.run(
        ["bash", ROOT / "benchmarks/gpu/step.sh"],
        cwd=folder,
        env=os.environ | {"TOY": "1", "OUT": "out", "PYTHON": sys.executable} | settings,
        capture_output=True,
        text=True,
        timeout=590,
    )


@pytest.mark.timeout(600)
def test_the_script_for_a_gpu_runs_at_toy_size(tmp_path):
    done = run_script(tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert len(told) == 6
    assert all("exit code 0" in line for line in told[1::2])
    assert (tmp_path / "out/depthwise.md").exists()
    report = json.loads((tmp_path / "out/step-convnextv2_atto.json").read_text())
    assert len(report["profiles"]) == 2
    memory = json.loads((tmp_path / "out/memory/step-convnextv2_atto.json").read_text())
    assert [each["checkpointing"] for each in memory["memory"]] == CHECKPOINTING


@pytest.mark.timeout(600)
def test_the_script_goes_on_after_a_failure_and_tells_it(tmp_path):
    done = run_script(tmp_path, MODELS="no_such_recipe")

    assert done.returncode == 1
    codes = [line.rpartition(" ")[2] for line in done.stdout.splitlines() if "exit code" in line]
    assert codes == ["0", "2", "2"]
    assert done.stdout.strip() == (tmp_path / "out/step.log").read_text().strip()


def test_the_script_begins_nothing_without_time_left(tmp_path):
    done = run_script(tmp_path, SECONDS_LEFT="5")

    assert done.returncode == 0
    assert [line.rpartition(":")[0] for line in done.stdout.splitlines()] == [
        "== depthwise convolutions",
        "== v2_in1k_atto",
        "== memory of v2_in1k_atto",
    ]
