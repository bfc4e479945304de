"""Exit codes: who tells which, which one is that of the whole, and what is tried again."""

import subprocess
import threading
import time

import pytest
from ruamel.yaml import YAML

from convnext_cli.launch.exits import (
    choose_exit_code,
    is_worth_another,
    read_exit_codes,
    repeat,
)
from convnext_cli.launch.slurm import slurm_folder
from convnext_cli.runs.exit_code import leave_exit_code


def environ(folder, rank, ranks=2):
    told = {"CONVNEXT_EXIT_DIR": str(folder), "CONVNEXT_EXIT_RANKS": str(ranks)}
    return told | {"RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}


def test_a_process_leaves_its_code_where_a_launcher_asks_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    leave_exit_code(2, {"RANK": "0"})
    assert list(tmp_path.iterdir()) == []

    leave_exit_code(0, environ(tmp_path, 1))
    leave_exit_code(75, environ(tmp_path, 0), wait_seconds=5)

    assert read_exit_codes(tmp_path) == [75, 0]


def test_a_process_that_failed_waits_for_the_others_and_not_for_ever(tmp_path):
    late = threading.Timer(0.3, leave_exit_code, (75, environ(tmp_path, 1)))
    late.start()
    began = time.monotonic()
    leave_exit_code(75, environ(tmp_path, 0), wait_seconds=20)
    waited = time.monotonic() - began
    late.join()

    assert 0.2 < waited < 5
    began = time.monotonic()
    leave_exit_code(1, environ(tmp_path, 0, ranks=9), wait_seconds=0.3)
    assert 0.2 < time.monotonic() - began < 5


def test_a_launcher_that_is_gone_does_not_keep_a_process_from_ending(tmp_path):
    leave_exit_code(75, environ(tmp_path / "gone", 0))

    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize(
    ("codes", "launcher_code", "whole"),
    [
        ([0, 0], 0, 0),
        ([75, 75], 1, 75),
        ([71, 1], 1, 71),
        ([1, 74], 1, 74),
        ([75, 2], 1, 2),
        ([1, 76], 1, 76),
        ([1, 1], 1, 1),
        ([1], 1, 137),  # one was killed, and the other failed for want of it
        ([], 1, 137),
        ([75], 137, 75),  # the launcher was quicker than the other's word
        ([], 0, 0),
    ],
)
def test_the_code_of_the_whole_is_the_reason_of_whoever_failed_first(codes, launcher_code, whole):
    assert choose_exit_code(codes, num_ranks=2, launcher_code=launcher_code) == whole


@pytest.mark.parametrize(
    ("code", "again"),
    [
        *((code, False) for code in (0, 1, 2, 71, 74)),
        *((code, True) for code in (75, 76, 137, 143)),
    ],
)
def test_stops_and_deaths_are_tried_again_and_nothing_else(code, again):
    assert is_worth_another(code) is again


def test_attempts_go_on_while_there_are_new_checkpoints_and_end_where_there_are_none():
    steps = iter([0, 10, 10, 20, 20, 20, 20, 20, 20, 20])
    attempts, said = [], []

    def attempt() -> int:
        attempts.append(137)
        return 137

    code = repeat(attempt, newest_step=lambda: next(steps), restarts=2, say=said.append)

    assert code == 137
    assert len(attempts) == 5  # two with progress, then one and two restarts without
    assert "3 attempts in a row ended at step 20" in said[-1]


def test_a_final_code_ends_it_at_once():
    codes = iter([75, 71, 0])

    code = repeat(lambda: next(codes), newest_step=lambda: 0, restarts=3, say=lambda _: None)

    assert code == 71
    assert next(codes) == 0


def test_the_manifest_for_kubernetes_holds_the_same_codes_for_final():
    text = (slurm_folder() / "kubernetes.yaml").read_text()
    (job,) = YAML(typ="safe").load(text)["spec"]["replicatedJobs"]
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]

    codes = rule["onExitCodes"]["values"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert [is_worth_another(code) for code in codes] == [False, False, False]
    assert sorted(codes) == [2, 71, 74]
    assert "--module convnext_cli train in1k_tiny" in container["command"][-1]
    subprocess.run(["bash", "-n", "-c", container["command"][-1]], check=True)


def test_a_pod_that_is_to_end_tells_the_processes_alone_and_ends_with_their_code(tmp_path):
    text = (slurm_folder() / "kubernetes.yaml").read_text()
    (job,) = YAML(typ="safe").load(text)["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    torchrun = tmp_path / "bin" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text("""#!/bin/bash
trap 'echo told >>torchrun' TERM
bash -c 'trap "echo 75 >$CONVNEXT_EXIT_DIR/0; exit 75" TERM
touch ready
while :; do sleep 0.1; done' &
while kill -0 $! 2>/dev/null; do wait $!; done
exit 1
""")
    torchrun.chmod(0o755)
    told = {"CONVNEXT_EXIT_DIR": str(tmp_path / "exits"), "NODES": "1", "MASTER_ADDR": "a"}
    pod = subprocess.Popen(
        container["command"],
        env=told | {"PATH": f"{torchrun.parent}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "0"},
        cwd=tmp_path,
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    pod.terminate()

    assert pod.wait(timeout=20) == 75
    assert not (tmp_path / "torchrun").exists()
