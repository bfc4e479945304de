"""A rendered sbatch file equals tests/golden/slurm/; `make golden` writes it anew."""

import os
from pathlib import Path

from convnext_cli.launch.slurm import SlurmJob, render_job

GOLDEN = Path(__file__).parents[1] / "golden" / "slurm" / "in1k_tiny.sh"
JOB = SlurmJob(
    recipe="in1k_tiny",
    name="tiny_lr2",
    folder=Path("/home/me/work"),
    extra=("optim.lr=2e-3", "--device", "cuda"),
    data="/data/imagenet",
    nodes=4,
    sbatch_options=("--partition=gpu",),
    venv=Path("/home/me/.venv"),
)


def test_the_job_file_is_the_recorded_one():
    if os.environ.get("CONVNEXT_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(render_job(JOB))

    assert GOLDEN.read_text() == render_job(JOB)
