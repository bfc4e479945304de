"""`slurm/multinode.sh` on a real Slurm of two nodes: every way to stop ends in the same weights.

The cluster is that of `slurm.sh` beside this file. It needs root and Debian's packages; where
there is neither, the tests say so and are skipped. A requeued job waits until the credential of
its last attempt has expired: two minutes by default, five seconds here.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import read_jsonl

ROOT = Path(__file__).parents[2]
SLURM = Path(__file__).parent / "slurm.sh"

RECIPE = """
about: A few steps of the smallest model, for tests.
model: {name: convnextv2_atto, drop_path: 0.1}
data: {image_px: 32, workers: 1, order: window, lanes: 4}
augment: {rand_augment: null, erasing: 0.25}
batch: {global_images: 8, per_device_images: 4}
optim: {lr: 1.0e-3, lr_images: 8}
schedule: {length: 40st, warmup: 2st}
ema: {decay: 0.9}
evaluate: {every: 40st}
checkpoint: {every: 5st, keep_last: 3}
guard: {start_minutes: 1, hang_minutes: 1}
log: {every_steps: 10, trackers: [csv]}
"""
STEPS = 40
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Cluster:
    """A running Slurm, a folder with a recipe in it, and the weights that must come out."""

    folder: Path
    data: Path
    environ: dict[str, str] = field(repr=False)

    def call(self, *command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, name: str, *options: str, more: str = "") -> "Job":
        """`sbatch slurm/multinode.sh` on two nodes with a process each."""
        variables = {
            "RECIPE": "tiny.yaml",
            "DATA": str(self.data),
            "NAME": name,
            "EXTRA": f"--device cpu {more}",
        }
        shape = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2")
        export = ",".join(["ALL", *(f"{key}={value}" for key, value in variables.items())])
        script = ROOT / "slurm" / "multinode.sh"
        number = self.call("sbatch", "--parsable", *shape, *options, f"--export={export}", script)
        return Job(self, number.strip(), RunDir(self.folder / "runs" / name))


@dataclass(frozen=True)
class Job:
    cluster: Cluster
    number: str
    run: RunDir

    def show(self) -> dict[str, str]:
        text = self.cluster.call("scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.partition("=")[::2] for word in text.split())

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 90
        while self.run.newest_step() < step:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def wait_to_end(self) -> str:
        """The job's last state."""
        deadline = time.monotonic() + 200
        while (state := self.show()["JobState"]) not in ENDED:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.5)
        return state

    def log(self) -> str:
        """What the job and its processes said."""
        controller = self.cluster.folder / "slurm" / "log" / "slurmctld.log"
        job = self.cluster.folder / f"convnext-{self.number}.log"
        paths = [path for path in (job, controller) if path.exists()]
        paths += self.run.launch.glob("*.log")
        return "\n".join(path.read_text() for path in paths)

    def assert_done_after_a_restart(self) -> None:
        assert self.wait_to_end() == "COMPLETED", self.log()
        assert int(self.show()["Restarts"]) >= 1
        events = [row["event"] for row in read_jsonl(self.run.events)]
        assert "resumed" in events
        assert_same_weights(self.run, RunDir(self.cluster.folder / "runs" / "alone"))


def assert_same_weights(left: RunDir, right: RunDir) -> None:
    ours, theirs = (torch.load(run.last, weights_only=True) for run in (left, right))
    assert ours["convnext"]["step"] == theirs["convnext"]["step"] == STEPS
    ours, theirs = ours["state_dict"], theirs["state_dict"]
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, tiny_shards) -> Iterator[Cluster]:
    """A Slurm of two nodes, and a run of the same two processes without it."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm of several nodes on one machine needs root")
    folder = tmp_path_factory.mktemp("cluster")
    state = folder / "slurm"
    environ = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))
    }
    environ |= {
        "CLUSTER_DIR": str(state),
        "SLURM_CONF": str(state / "slurm.conf"),
        "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    up = subprocess.run([SLURM, "up", "2"], env=environ, capture_output=True, text=True)
    if up.returncode != 0:
        subprocess.run([SLURM, "down"], env=environ)
        pytest.skip(f"no Slurm can be had on this machine: {(up.stdout + up.stderr)[-300:]}")
    try:
        (folder / "tiny.yaml").write_text(RECIPE)
        made = Cluster(folder, tiny_shards, environ)
        alone = [sys.executable, "-m", "convnext_cli", "launch", "local", "tiny.yaml"]
        alone += ["--data", str(tiny_shards), "--devices", "2", "--device", "cpu"]
        made.call(*alone, "--name", "alone")
        yield made
    finally:
        subprocess.run([SLURM, "down"], env=environ, check=True)


def test_a_job_of_two_nodes_ends_with_the_weights_of_two_processes_of_one_machine(cluster):
    job = cluster.submit("whole")

    assert job.wait_to_end() == "COMPLETED", job.log()
    assert job.show()["Restarts"] == "0"
    assert "on node[1-2]" in job.log()
    assert_same_weights(job.run, RunDir(cluster.folder / "runs" / "alone"))


def test_a_job_that_is_told_to_stop_saves_is_requeued_and_goes_on_exactly(cluster):
    job = cluster.submit("told")
    job.wait_for_step(5)
    cluster.call("scancel", "--signal=USR1", job.number)

    job.assert_done_after_a_restart()
    assert "exit code 75" in job.log()
    assert "stopped" in [row["event"] for row in read_jsonl(job.run.events)]


def test_a_requeue_from_outside_saves_first_and_goes_on_exactly(cluster):
    job = cluster.submit("requeued")
    job.wait_for_step(5)
    cluster.call("scontrol", "requeue", job.number)

    job.assert_done_after_a_restart()
    assert "exit code 75" in job.log()


def test_killed_processes_of_a_node_are_replaced_and_the_run_goes_on_exactly(cluster):
    job = cluster.submit("killed")
    job.wait_for_step(5)
    cluster.call(SLURM, "kill", "node2", "convnext_cli train")

    job.assert_done_after_a_restart()
    # The one that is left tells of the loss, if srun lets it live long enough.
    assert "exit code 76" in job.log() or "exit code 137" in job.log()


def test_a_job_at_its_time_limit_is_warned_and_goes_on_exactly(cluster):
    # Slurm looks at limits every half minute, so the warning comes 10 to 40 seconds after the
    # start; a node that is held up makes the job last that long.
    job = cluster.submit("limited", "--time=1", "--signal=USR1@20")
    job.wait_for_step(5)
    held_until = time.monotonic() + 30
    cluster.call(SLURM, "kill", "node2", "convnext_cli train", "STOP")
    while time.monotonic() < held_until and job.show()["JobState"] == "RUNNING":
        time.sleep(0.5)
    cluster.call(SLURM, "kill", "node2", "convnext_cli train", "CONT")

    job.assert_done_after_a_restart()


def test_a_mistake_ends_the_job_with_its_code_and_nothing_is_requeued(cluster):
    job = cluster.submit("mistaken", more="optim.lr=fast")

    assert job.wait_to_end() == "FAILED", job.log()
    assert job.show()["ExitCode"] == "2:0"
    assert job.show()["Restarts"] == "0"
    assert "optim.lr" in job.log()
