"""The sbatch file: what is asked in its head, the shipped script below; what sbatch says."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import convnext_cli
from convnext_cli.errors import LaunchError
from convnext_cli.launch.slurm import SlurmJob, find_sbatch, render_job, slurm_folder, submit

JOB = SlurmJob(
    recipe="in1k_tiny",
    name="tiny_lr2",
    folder=Path("/home/me/work"),
    extra=("optim.lr=2e-3", "data.path=/with space", "--device", "cuda"),
    data="/data/imagenet",
    nodes=4,
    sbatch_options=("--partition=gpu", "--comment=two words"),
    venv=Path("/home/me/.venv"),
)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a command that does what it is told to, for there is no cluster here."""

    def make(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")

    return make


def run_script(folder, variables):
    """`slurm/multinode.sh` in a job of one process."""
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}
    job |= {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "RECIPE": "in1k_tiny"}
    return subprocess.run(
        ["bash", slurm_folder() / "multinode.sh"],
        env=os.environ | job | variables,
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_below_its_head_a_job_file_is_the_shipped_script():
    shipped = (slurm_folder() / "multinode.sh").read_text()
    body = shipped[shipped.index("# NAME\n") :]

    text = render_job(JOB)
    assert text.endswith(body)
    assert text.count("#SBATCH --nodes=") == text.count("#SBATCH --time=") == 1
    for option in ("--requeue", "--open-mode=append", "--signal=USR1@120"):
        assert f"#SBATCH {option}\n" in text


def test_the_variables_of_a_job_file_mean_in_a_shell_what_was_asked():
    head = render_job(JOB).partition("\n#\n# NAME")[0]
    show = 'printf "%s\\n" "$RECIPE" "$NODES" "$GPUS" "$EXTRA" "$CONTAINER"'
    done = subprocess.run(["bash", "-c", f"{head}\n{show}"], capture_output=True, text=True)

    recipe, nodes, gpus, extra, container = done.stdout.split("\n")[:5]
    assert (recipe, nodes, gpus, container) == ("in1k_tiny", "4", "8", "")
    assert tuple(shlex.split(extra)) == JOB.extra


@pytest.mark.parametrize("name", ["multinode.sh", "array.sh"])
def test_a_shipped_script_is_valid_and_without_a_recipe_says_how_to_begin(name):
    script = slurm_folder() / name

    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "RECIPE" in done.stderr
    assert "hint: RECIPE=in1k_tiny" in done.stderr


def test_a_machine_without_sbatch_is_told_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(LaunchError, match="there is no sbatch on this machine") as caught:
        find_sbatch()
    assert "--dry-run" in str(caught.value.hint)


def test_a_job_file_lies_beside_the_run_and_its_number_comes_back(tmp_path, fake):
    fake("sbatch", f'printf "%s\\n" "$@" >{tmp_path}/told; echo "4711;north"')
    options = ("--partition=gpu", "--comment=two words", "-q high", "--exclusive")
    job = SlurmJob(
        recipe="in1k_tiny",
        name="a",
        folder=tmp_path,
        runs_dir=tmp_path / "runs",
        sbatch_options=options,
    )

    assert submit(job) == "4711"
    assert job.file.read_text() == render_job(job)
    # told as arguments too: SBATCH_PARTITION would go before what the file says
    words = (tmp_path / "told").read_text().splitlines()
    asked = ["--partition=gpu", "--comment=two words", "-q", "high", "--exclusive"]
    assert words[0] == "--parsable"
    assert "--signal=USR1@120" in words
    assert words[-6:] == [*asked, str(job.file)]


def test_what_sbatch_refuses_is_told_with_its_reason(tmp_path, fake):
    fake("sbatch", 'echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1')
    job = SlurmJob(recipe="in1k_tiny", name="a", folder=tmp_path, runs_dir=tmp_path / "runs")

    with pytest.raises(
        LaunchError, match="exit code 1: sbatch: error: invalid partition"
    ) as caught:
        submit(job)
    assert "sinfo" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--comment=two words", '--comment="two words"'),
        ("--comment=it's", '--comment="it\'s"'),
        ("--comment=a#1", '--comment="a#1"'),
        ('--comment=say "so"', '--comment="say \\"so\\""'),
        ("--qos=high", "--qos=high"),
        ("-q high", "-q high"),
    ],
)
def test_a_value_that_is_not_plain_is_quoted_for_sbatch(option, line):
    assert f"#SBATCH {line}\n" in render_job(replace(JOB, sbatch_options=(option,)))


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"EXTRA": "seed=1 'optim.lr=2e-3"}, "a quote in it has no end"),
        ({"VENV": "/nowhere"}, "VENV=/nowhere has no bin/python"),
        ({"CONTAINER": "/nowhere/a.sif"}, "CONTAINER=/nowhere/a.sif is no file"),
        ({"SLURM_NTASKS_PER_NODE": ""}, "does not say how many processes"),  # salloc --ntasks=4
    ],
)
def test_a_job_that_would_train_something_else_is_refused(tmp_path, fake, variables, sentence):
    fake("scontrol", "echo node1")
    fake("srun", f"touch {tmp_path}/started")

    done = run_script(tmp_path, variables)

    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (tmp_path / "started").exists()


def test_a_command_that_is_not_there_is_final(tmp_path, fake):
    fake("scontrol", f'[ "$1" = show ] && echo node1 || echo "$@" >>{tmp_path}/told')
    fake("srun", "exec nowhere")
    fake("squeue", "echo RUNNING None")

    done = run_script(tmp_path, {})

    assert done.returncode == 127
    assert "ended with exit code 127; read runs/in1k_tiny/launch/rank*.log" in done.stdout
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_python_without_the_package_is_final(tmp_path, fake, there):
    fake("scontrol", f'[ "$1" = show ] && echo node1 || echo "$@" >>{tmp_path}/told')
    fake("squeue", "echo RUNNING None")
    ids = "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0"
    fake("srun", f'while [ "$1" != bash ]; do shift; done; exec env {ids} "$@"')
    fake("apptainer", 'while [ "$1" != python ]; do shift; done; exec "$@"')
    train = (
        f'case $1 in -m) echo "$@" >{tmp_path}/began; echo 0 >"$CONVNEXT_EXIT_DIR/0"; exit;; esac'
    )
    path = f"PYTHONPATH={Path(convnext_cli.__file__).parents[1]}" if there else ""
    fake("python", f'{train}\n{path} exec {sys.executable} -S "$@"')

    (tmp_path / "a b.sif").touch()

    done = run_script(tmp_path, {"CONTAINER": "a b.sif", "PYTHONPATH": ""})

    assert done.returncode == (0 if there else 2), done.stderr
    assert (tmp_path / "began").exists() == there
    assert ("a b.sif python has no package convnext on " in done.stderr) != there
    assert not (tmp_path / "told").exists()


def test_extra_arguments_are_words_as_a_shell_reads_them(tmp_path, fake):
    fake("scontrol", "echo node1")
    fake("srun", f'printf "%s\\n" "$@" >{tmp_path}/told; echo 0 >"$CONVNEXT_EXIT_DIR/0"')

    done = run_script(tmp_path, {"EXTRA": """seed=1 "about=it's two" '' --device cpu"""})

    assert done.returncode == 0, done.stderr
    words = (tmp_path / "told").read_text().splitlines()
    assert words[-5:] == ["seed=1", "about=it's two", "", "--device", "cpu"]


@pytest.mark.parametrize(
    ("state", "requeued"),
    [
        ("RUNNING None", True),
        ("SIGNALING None", True),
        ("COMPLETING TimeLimit", True),
        ("COMPLETING None", False),  # after scancel
        ("", False),
    ],
)
def test_a_job_that_was_stopped_is_requeued_as_long_as_nobody_ended_it(
    tmp_path, fake, state, requeued
):
    fake("srun", 'echo 75 >"$CONVNEXT_EXIT_DIR/0"; exit 75')
    fake("squeue", f"echo {state}")
    fake("scontrol", f'[ "$1" = show ] && echo node1 || echo "$@" >>{tmp_path}/told')
    done = run_script(tmp_path, {})

    assert done.returncode == 75, done.stderr
    assert (tmp_path / "told").exists() == requeued, done.stdout
