"""Help, planning and refusals answer at once: no heavy library is loaded, where time goes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "torchvision", "torchmetrics", "lightning", "webdataset", "numpy", "timm",
         "matplotlib", "transformers", "onnxruntime")  # fmt: skip
PLAN = ("plan", "in1k_tiny", "--devices", "8", "--nodes", "4", "--json")

# The libraries that are loaded when the command has ended are the last line of stdout.
SCRIPT = """
import json, sys
try:
    from convnext_cli.__main__ import main
    main()
finally:
    loaded = {name.partition(".")[0] for name in sys.modules}
    print("\\n" + json.dumps(sorted(loaded)))
"""


def run(*arguments: str, cwd: Path, exit_code: int = 0) -> tuple[str, set[str]]:
    """What the command wrote to stdout, and the top-level modules that it loaded."""
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == exit_code, done.stderr
    stdout, _, loaded = done.stdout.rstrip("\n").rpartition("\n")
    return stdout, set(json.loads(loaded))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("train", "--help"),
        PLAN,
        ("recipes", "list", "--json"),
        ("recipes", "show", "in22k_large"),
        ("runs", "list", "--root", "."),
        ("data", "--help"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_light_command_loads_no_heavy_library(arguments, tmp_path):
    _, loaded = run(*arguments, cwd=tmp_path)

    assert "convnext_cli" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_plan_of_the_paper_is_made_without_torch(tmp_path):
    stdout, _ = run(*PLAN, cwd=tmp_path)

    plan = json.loads(stdout)
    assert (plan["world_size"], plan["global_images"]) == (32, 4096)
    assert (plan["total_steps"], plan["warmup_steps"]) == (93_600, 6_240)
    assert (plan["parameters"], round(plan["gmacs"], 2)) == (28_589_128, 4.46)


@pytest.mark.parametrize("more", [("--precision", "fp16"), ("--resume", "must")])
def test_a_training_that_is_refused_has_not_loaded_the_trainer(more, tmp_path):
    arguments = ("train", "in1k_tiny", "--device", "cpu", *more)

    _, loaded = run(*arguments, cwd=tmp_path, exit_code=2)

    assert "torch" in loaded
    assert loaded.isdisjoint({"lightning", "torchmetrics", "torchvision", "timm"})


def test_a_process_that_indexes_shards_loads_no_torch():
    code = "import sys, convnext_cli.data.foreign; print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert {"torch", "torchvision", "webdataset"}.isdisjoint(done.stdout.split())
