"""Faults that end or disturb a run: each injected into real processes, each survived."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from convnext_cli.runs.record import read_jsonl

FAULTY = Path(__file__).with_name("faulty.py")
STEPS = 8
RECIPE = f"""
about: A few steps of the smallest model, for tests.
model: {{name: convnextv2_atto, drop_path: 0.1}}
data: {{image_px: 32, workers: 1, order: window, lanes: 4}}
augment: {{rand_augment: null, erasing: 0.25}}
batch: {{global_images: 8, per_device_images: 4}}
optim: {{lr: 1.0e-3, lr_images: 8, clip_norm: 5.0}}
schedule: {{length: {STEPS}st, warmup: 2st}}
ema: {{decay: 0.9}}
evaluate: {{every: 4st, per_device_images: 4}}
checkpoint: {{every: 2st, keep_last: 10}}
guard: {{max_skipped_steps: 1, hang_minutes: 0.25, start_minutes: 2}}
log: {{every_steps: 3, trackers: [csv]}}
"""


@dataclass(frozen=True)
class Runner:
    """Starts the same run again and again, with or without a fault."""

    folder: Path
    data: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "run"

    def command(self, *, fault: str, world: int, more: tuple[str, ...]) -> list[str]:
        start = [sys.executable]
        if world > 1:
            start += ["-m", "torch.distributed.run", "--nproc_per_node", str(world)]
            start += ["--master_addr", "127.0.0.1", "--master_port", str(find_free_network_port())]
        start += [str(FAULTY), fault, "train", str(self.folder / "tiny.yaml")]
        start += ["--data", str(self.data), "--name", "run", "--device", "cpu"]
        return [*start, "--runs-dir", str(self.folder / "runs"), *more]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "FAULT_MARKERS": str(self.folder), "OMP_NUM_THREADS": "1"}

    def __call__(
        self, *more: str, fault: str = "none", world: int = 1
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(fault=fault, world=world, more=more),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )

    def start(self, *more: str, fault: str = "none", world: int = 1) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(fault=fault, world=world, more=more),
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def make_runner(folder: Path, data: Path) -> Runner:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(RECIPE)
    return Runner(folder, data)


@pytest.fixture
def runner(tmp_path, tiny_shards) -> Runner:
    return make_runner(tmp_path, tiny_shards)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_shards) -> dict[int, Path]:
    """The runs that nothing disturbed, by world size."""
    finished = {}
    for world in (1, 2):
        runner = make_runner(tmp_path_factory.mktemp(f"whole{world}"), tiny_shards)
        done = runner(world=world)
        assert done.returncode == 0, done.stderr
        finished[world] = runner.run
    return finished


def load(run: Path, step: int = STEPS) -> dict:
    return torch.load(run / "checkpoints" / f"step={step:08d}.ckpt", weights_only=True)


def rows(run: Path) -> list[dict]:
    kept = ("step", "train/loss", "train/grad_norm", "val/loss", "val_ema/top1", "train/lr")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line).get(key) for key in kept} for line in lines]


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def differing(left: object, right: object, place: str = "") -> list[str]:
    """Where two states are not equal to the bit."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [f"{place}: keys"] if left.keys() != right.keys() else []
        return keys + [d for k in left.keys() & right.keys()
                       for d in differing(left[k], right[k], f"{place}/{k}")]  # fmt: skip
    if isinstance(left, list | tuple):
        return [d for i, pair in enumerate(zip(left, right, strict=True))
                for d in differing(*pair, f"{place}/{i}")]  # fmt: skip
    same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    return [] if same else [place]


def assert_as_undisturbed(run: Path, whole: Path) -> None:
    """The state at the end and the rows on the way are those of the run that was left alone."""
    parts = ("state_dict", "optimizer_states", "convnext", "callbacks")
    ours, theirs = load(run), load(whole)
    assert not [d for part in parts for d in differing(ours[part], theirs[part], part)]
    assert rows(run) == rows(whole)


@pytest.mark.parametrize(
    ("fault", "world"),
    [
        ("term@r1:s3", 2),  # one rank, and not the one that writes
        ("valterm@r1:s4", 2),
        ("int@r0:s3", 1),
    ],
)
def test_a_signal_to_any_rank_saves_ends_with_75_and_the_next_start_ends_alike(
    runner, undisturbed, fault, world
):
    stopped = runner(fault=fault, world=world)

    if world == 1:
        assert stopped.returncode == 75, stopped.stderr
        assert f"stopped by SIGINT after step 3 of {STEPS}" in stopped.stderr
    else:  # torchrun ends with 1 and names the code of the ranks
        assert stopped.returncode == 1
        assert "exitcode  : 75" in stopped.stderr, stopped.stderr
    assert "run the same command again to go on" in stopped.stderr

    again = runner(world=world)

    assert again.returncode == 0, again.stderr
    assert_as_undisturbed(runner.run, undisturbed[world])


def test_a_rank_that_is_killed_ends_the_others_at_once_and_nothing_is_lost(runner, undisturbed):
    killed = runner(fault="kill@r1:s6", world=2)

    assert killed.returncode == 1
    again = runner(world=2)

    assert again.returncode == 0, again.stderr
    assert "going on from step=0000000" in again.stderr
    assert_as_undisturbed(runner.run, undisturbed[2])


def test_a_loader_process_that_is_killed_is_told_and_the_next_start_goes_on(runner, undisturbed):
    killed = runner(fault="worker@r0:s5")

    assert killed.returncode == 76
    assert "a loader process ended unasked" in killed.stderr
    assert "Traceback" not in killed.stderr
    assert runner().returncode == 0
    assert_as_undisturbed(runner.run, undisturbed[1])

    killed = subprocess.run(
        [
            *(sys.executable, FAULTY, "evalworker@r0:s1", "evaluate", runner.run),
            *("--data", runner.data, "--workers", "1", "--batch", "1", "--device", "cpu"),
        ],
        env=runner.environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip

    assert killed.returncode == 76
    assert "a loader process ended unasked in the evaluation" in killed.stderr
    assert "hint: begin again with fewer: --workers 0" in killed.stderr
    assert "Traceback" not in killed.stderr


def test_the_time_limit_of_the_job_is_kept(runner, undisturbed):
    # Past in the middle of the run: a start takes a few seconds, 30 are the margin.
    limit = {**runner.environment(), "SLURM_JOB_END_TIME": str(int(time.time()) + 20)}

    stopped = subprocess.run(
        runner.command(fault="none", world=1, more=()),
        env=limit, capture_output=True, text=True, timeout=200,
    )  # fmt: skip

    assert stopped.returncode == 75, stopped.stderr
    assert "stopped by the time limit of the job before the first step" in stopped.stderr
    assert runner().returncode == 0
    assert_as_undisturbed(runner.run, undisturbed[1])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny_shards) -> Path:
    """A run that was stopped after step 6; copy it."""
    runner = make_runner(tmp_path_factory.mktemp("stopped"), tiny_shards)
    assert runner(fault="int@r0:s6").returncode == 75
    return runner.run


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(runner, undisturbed, stopped):
    shutil.copytree(stopped, runner.run, symlinks=True)
    newest = runner.run / "checkpoints" / "step=00000006.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)

    again = runner()

    assert again.returncode == 0, again.stderr
    assert "passed over step=00000006.ckpt" in again.stderr
    assert "going on from step=00000004.ckpt" in again.stderr
    told = [row["event"] for row in read_jsonl(runner.run / "events.jsonl")]
    assert told[told.index("damaged") - 1] == "resumed"
    assert_as_undisturbed(runner.run, undisturbed[1])


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew_by_itself(runner, stopped):
    shutil.copytree(stopped, runner.run, symlinks=True)
    for path in (runner.run / "checkpoints").glob("step=*.ckpt"):
        path.write_bytes(path.read_bytes()[:-1])

    again = runner()

    assert again.returncode == 2
    assert "is damaged, and there is no older one that is whole" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_full_disk_ends_the_run_with_74_and_the_last_checkpoint_is_whole(runner, undisturbed):
    disk = runner.run
    disk.mkdir(parents=True)
    size = 140  # MB: one checkpoint of 54 MB, and not three
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        full = runner()

        assert full.returncode == 74, full.stderr
        assert "No space left" in full.stderr
        assert "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,size=900m", str(disk)], check=True)
        again = runner()
        assert again.returncode == 0, again.stderr
        assert "going on from step=0000000" in again.stderr
        assert_as_undisturbed(runner.run, undisturbed[1])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_whose_disk_is_gone_comes_back_from_its_copies(runner, undisturbed, tmp_path):
    copies = f"file://{tmp_path}/elsewhere"
    assert runner(f"checkpoint.copy_to={copies}", fault="int@r0:s6").returncode == 75
    shutil.rmtree(runner.run)

    refused = runner(f"checkpoint.copy_to={copies}")

    assert refused.returncode == 2, refused.stderr
    assert f"{copies}/run has copies of one" in refused.stderr
    assert not runner.run.exists()

    command = ["checkpoints", "fetch", f"{copies}/run", "--runs-dir", str(runner.run.parent)]
    fetched = subprocess.run(
        [sys.executable, "-m", "convnext_cli", *command], capture_output=True, text=True
    )
    assert "is back at step 6" in fetched.stderr
    assert runner(f"checkpoint.copy_to={copies}").returncode == 0
    assert_as_undisturbed(runner.run, undisturbed[1])


def test_copies_are_waited_for_however_long_and_made_up_for_by_the_next_start(runner, tmp_path):
    more = (f"checkpoint.copy_to=file://{tmp_path}/elsewhere", "checkpoint.every=8st")
    patient = ("guard.hang_minutes=0.1", "evaluate.every=8st")

    done = runner(*more, *patient, fault="slowcopy@r0:s1")

    assert done.returncode == 0, done.stderr
    copied = tmp_path / "elsewhere" / "run" / "checkpoints" / f"step={STEPS:08d}.json"
    assert copied.is_file()

    # as if it had been killed in that wait
    shutil.rmtree(tmp_path / "elsewhere")
    kept = [event for event in events(runner.run) if event["event"] != "finished"]
    (runner.run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    for _ in range(2):
        assert runner(*more, *patient).returncode == 0

    assert copied.is_file()
    assert [event["event"] for event in events(runner.run)[len(kept) :]] == ["resumed", "finished"]


def test_a_second_start_in_the_same_folder_is_refused_and_says_who_holds_it(runner):
    first = runner.start(fault="stop@r0:s3")
    try:
        deadline = time.monotonic() + 100
        while psutil.Process(first.pid).status() != psutil.STATUS_STOPPED:
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

        second = runner()

        assert second.returncode == 2
        assert f"is being written by process {first.pid} on {socket.gethostname()}" in second.stderr
    finally:
        first.kill()
        first.communicate()
    third = runner()  # its holder is gone
    assert third.returncode == 0, third.stderr


def test_a_step_whose_gradient_is_not_finite_is_left_out_on_all_ranks(runner):
    done = runner(fault="nan@r1:s3", world=2)

    assert done.returncode == 0, done.stderr
    state = load(runner.run)
    assert all(
        torch.isfinite(w).all() for w in state["state_dict"].values() if w.is_floating_point()
    )
    moments = state["optimizer_states"][0]["state"]
    assert {int(moment["step"]) for moment in moments.values()} == {STEPS - 1}
    assert [e["step"] for e in events(runner.run) if e["event"] == "skipped"] == [3]


def test_after_too_many_bad_steps_the_run_goes_back_and_takes_other_images(runner):
    # Two bad steps; after going back the same steps have other images, and are good.
    done = runner(fault="nan@r0:s5,nan@r1:s6", world=2)

    assert done.returncode == 0, done.stderr
    (back,) = [e for e in events(runner.run) if e["event"] == "rolled_back"]
    assert (back["step"], back["to"]) == (6, 4)
    assert json.loads((runner.run / "skips.json").read_text()) == {"skips": [[4, 2]]}
    assert "going back to step 4" in done.stderr
    steps = [row["step"] for row in rows(runner.run)]
    assert steps == sorted(steps)
    assert max(steps) == STEPS
    assert len(json.loads((runner.run / "bad_batch.json").read_text())["samples"]) == 8


@pytest.mark.parametrize("every", ["8st", "2st"])  # known after step 6; or known when 4 is saved
def test_bad_steps_that_are_known_late_are_named_and_gone_back_from_as_if_known_at_once(
    runner, every
):
    faults = "late@r0:s1,nan@r0:s3,nan@r1:s4"

    done = runner(f"checkpoint.every={every}", "evaluate.every=8st", fault=faults, world=2)

    assert done.returncode == 0, done.stderr
    found = events(runner.run)
    assert [e["step"] for e in found if e["event"] == "skipped"] == [3, 4]
    (back,) = [e for e in found if e["event"] == "rolled_back"]
    to = 0 if every == "8st" else 2
    assert (back["step"], back["to"]) == (4, to)
    (stopped,) = [e for e in found if e["event"] == "stopped"]
    assert stopped["step"] == (6 if every == "8st" else 4)
    assert json.loads((runner.run / "skips.json").read_text()) == {"skips": [[to, 4 - to]]}
    assert json.loads((runner.run / "bad_batch.json").read_text())["step"] == 4
    moments = load(runner.run)["optimizer_states"][0]["state"]
    assert {int(moment["step"]) for moment in moments.values()} == {STEPS}
    steps = [row["step"] for row in rows(runner.run)]
    assert steps == sorted(steps)


def test_the_watch_of_before_going_back_does_not_end_the_run(runner):
    # 80 steps of 100 ms and more, after which a watch that was told of the first ones would act
    longer = ("schedule.length=80st", "checkpoint.every=80st", "evaluate.every=80st")
    guard = ("guard.max_skipped_steps=0", "guard.hang_minutes=0.1")

    done = runner(*longer, *guard, fault="nan@r0:s2,slow@r0:s1")

    assert done.returncode == 0, done.stderr
    assert "going back to step 0" in done.stderr


def test_a_run_that_stays_bad_ends_with_71_and_names_the_images(runner):
    done = runner("guard.max_rollbacks=1", fault="nans@r0:s3")

    assert done.returncode == 71, done.stderr
    assert "after going back 1 times" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(json.loads((runner.run / "bad_batch.json").read_text())["samples"]) == 8


@pytest.mark.parametrize("fault", ["stop@r1:s4", "sleep@r1:s4"])
def test_a_hang_prints_where_each_rank_stands_and_ends_with_76(runner, undisturbed, fault):
    hung = runner(fault=fault, world=2)

    assert hung.returncode == 1
    assert "exitcode  : 76" in hung.stderr, hung.stderr
    stacks = (runner.run / "stacks" / "rank=00000.txt").read_text()
    assert "rank 0 has stood still" in stacks
    assert "Thread" in stacks
    again = runner(world=2)
    assert again.returncode == 0, again.stderr
    assert_as_undisturbed(runner.run, undisturbed[2])


def test_a_rank_that_waits_for_one_that_never_comes_ends_with_76(runner):
    first_of_two = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}

    alone = subprocess.run(
        runner.command(fault="none", world=1, more=("guard.start_minutes=0.05",)),
        env=runner.environment() | first_of_two | meeting,
        capture_output=True,
        text=True,
        timeout=200,
    )

    assert alone.returncode == 76, alone.stderr
    stacks = (runner.run / "stacks" / "rank=00000.txt").read_text()
    assert "rank 0 has stood still" in stacks
    assert "init_process_group" in stacks


def test_a_rank_whose_weights_are_not_those_of_the_others_ends_the_run_with_71(runner):
    flipped = runner(fault="flip@r1:s3", world=2)

    assert flipped.returncode == 1
    assert "exitcode  : 71" in flipped.stderr, flipped.stderr
    assert "after step 4 the weights of rank 1 are not those of the other" in flipped.stderr


def test_a_rank_that_all_wait_for_is_named(runner):
    longer = ("schedule.length=60st", "evaluate.every=60st", "checkpoint.every=60st")

    done = runner(*longer, fault="slow@r1:s1", world=2)

    assert done.returncode == 0, done.stderr
    assert "all ranks wait for rank 1" in done.stderr
    named = [event for event in events(runner.run) if event["event"] == "straggler"]
    assert [event["rank"] for event in named] == [1]
    assert named[0]["forward_seconds"] > named[0]["median_forward_seconds"] + 0.04


def test_a_run_goes_on_with_the_same_batches_on_one_two_and_four_ranks(runner, tmp_path):
    plain = "model.drop_path=0.0"  # each rank draws its own
    whole = make_runner(tmp_path / "whole", runner.data)
    assert whole(plain).returncode == 0

    assert runner(plain, fault="int@r0:s3").returncode == 75
    assert runner(plain, fault="term@r0:s5", world=2).returncode == 1
    last = runner(plain, "batch.per_device_images=2", world=4)

    assert last.returncode == 0, last.stderr
    for ours, theirs in zip(rows(runner.run), rows(whole.run), strict=True):
        assert {key: value for key, value in ours.items() if value is not None} == pytest.approx(
            {key: value for key, value in theirs.items() if value is not None}, rel=1e-4
        )


def test_a_kill_at_any_moment_ends_alike(runner, undisturbed):
    for wait in (1.0, 1.7):  # after the first step of an attempt, anywhere in a step or a save
        process = runner.start()
        seen = len(events(runner.run)) if (runner.run / "events.jsonl").exists() else 0
        while process.poll() is None:
            path = runner.run / "events.jsonl"
            if path.exists() and len(path.read_text().splitlines()) > seen:
                break
            time.sleep(0.02)
        time.sleep(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()

    done = runner()

    assert done.returncode == 0, done.stderr
    assert_as_undisturbed(runner.run, undisturbed[1])
