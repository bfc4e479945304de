"""What is written survives kills, resumes and full disks, and tells no secrets."""

import csv
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convnext_cli.errors import RunError, StorageError, WriteError
from convnext_cli.runs.record import (
    JsonLines,
    read_json,
    read_jsonl,
    record_environment,
    utc_now,
    write_csv,
    write_event,
    write_json,
    writing_to,
)


def write_rows(path: Path, *rows: dict[str, object]) -> None:
    with JsonLines(path) as lines:
        for row in rows:
            lines.write(row)


WRITE_UNTIL_KILLED = """
import sys
from pathlib import Path
from convnext_cli.runs.record import JsonLines
lines = JsonLines(Path(sys.argv[1]))
for step in range(10**9):
    lines.write({"step": step, "train/loss": 1.0})
"""


@pytest.mark.parametrize("content", ["[]", '{"total_steps": 1'])
def test_the_hint_moves_a_damaged_run_aside_whatever_its_name(tmp_path, content):
    run = tmp_path / "my run"
    run.mkdir()
    (run / "plan.json").write_text(content)

    with pytest.raises(RunError) as caught:
        read_json(run / "plan.json")

    assert shlex.split(caught.value.hint)[-3:] == ["mv", str(run), f"{run}.damaged"]


def test_rows_come_back_as_written(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"

    write_rows(path, {"step": 1, "train/loss": 6.9}, {"step": 2, "val/top1": 0.5})

    assert read_jsonl(path) == [{"step": 1, "train/loss": 6.9}, {"step": 2, "val/top1": 0.5}]


def test_each_row_is_readable_before_the_file_is_closed(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write({"step": 1})

    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1}]
    lines.close()
    lines.close()


def test_opening_again_appends(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path, {"step": 1})
    write_rows(path, {"step": 2})

    assert [row["step"] for row in read_jsonl(path)] == [1, 2]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path, {"step": 1, "train/loss": float("nan"), "x": [float("inf"), 1.0]})

    assert path.read_text() == '{"step": 1, "train/loss": null, "x": [null, 1.0]}\n'


def test_an_absent_file_has_no_rows(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"step": 2, "tr', b"12", b"\x00\x00\x00", b'{"st\n', b"\xff"])
def test_a_torn_last_line_is_passed_over_and_cut_off_before_the_next_row(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)

    assert read_jsonl(path) == [{"step": 1}]

    write_rows(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')

    write_rows(path, {"step": 3})

    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]


def test_a_file_that_holds_only_a_torn_line_starts_anew(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"ste')
    write_rows(path, {"step": 1})

    assert path.read_text() == '{"step": 1}\n'


def test_damage_in_the_middle_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')

    with pytest.raises(RunError, match="line 2 is not a JSON object: rubbish") as caught:
        read_jsonl(path)

    subprocess.run(str(caught.value.hint).removeprefix("remove that line: ").split(), check=True)
    assert [row["step"] for row in read_jsonl(path)] == [1, 3]


def test_a_kill_at_any_moment_leaves_a_file_that_goes_on_without_gap(tmp_path):
    path = tmp_path / "m.jsonl"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = (sys.executable, "-c", WRITE_UNTIL_KILLED, str(path))
    with subprocess.Popen(command, env=environment) as process:
        while process.poll() is None and (not path.exists() or path.stat().st_size < 5000):
            time.sleep(0.01)
        process.kill()

    count = len(read_jsonl(path))
    assert count > 100
    write_rows(path, {"step": count})

    assert [row["step"] for row in read_jsonl(path)] == list(range(count + 1))


def test_a_resume_leaves_neither_gap_nor_double_row(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path, *({"step": step} for step in range(1, 8)))

    with JsonLines(path) as lines:
        assert lines.truncate_after(4) == 3
        for step in (5, 6, 7, 8):
            lines.write({"step": step})

    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_truncating_keeps_rows_without_a_step_and_their_bytes(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"note":"x"}\n{"step":  1}\n{"step": 9}\n')

    with JsonLines(path) as lines:
        lines.truncate_after(1)

    assert path.read_text() == '{"note":"x"}\n{"step":  1}\n'


def test_truncating_after_the_last_step_changes_nothing(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path, {"step": 1})
    before = path.stat().st_ino

    with JsonLines(path) as lines:
        assert lines.truncate_after(1) == 0

    assert path.stat().st_ino == before


def test_a_folder_that_is_a_file_is_a_users_error(tmp_path):
    (tmp_path / "run").touch()

    with pytest.raises(StorageError, match=r"metrics\.jsonl: .*/run is a file, not") as caught:
        JsonLines(tmp_path / "run" / "metrics.jsonl")

    assert caught.value.exit_code == 2


def test_a_full_disk_is_a_users_error_and_the_next_row_is_whole(tmp_path):
    path, before = tmp_path / "events.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_event(path, "started", step=0)

    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot write .*events\.jsonl: File too large"):
            write_event(path, "checkpoint", step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    write_event(path, "stopped", step=2)
    assert [row["step"] for row in read_jsonl(path)] == [0, 2]


def test_the_hint_looks_at_a_folder_that_is_there(tmp_path):
    with pytest.raises(StorageError) as refused, writing_to(tmp_path / "a" / "b" / "file"):
        raise PermissionError(13, "Permission denied")

    assert str(refused.value.hint).endswith(f"ls -ld {shlex.quote(str(tmp_path))}")


def test_reading_a_folder_as_rows_is_a_users_error(tmp_path):
    with pytest.raises(RunError, match="cannot read"):
        read_jsonl(tmp_path)


def test_json_is_written_whole_and_readable_by_others(tmp_path):
    path = tmp_path / "new" / "plan.json"

    write_json(path, {"total_steps": 10, "lr": float("inf"), "out": Path("runs/a"), "k": (1, 2)})

    assert read_json(path) == {"total_steps": 10, "lr": None, "out": "runs/a", "k": [1, 2]}
    assert path.read_text().endswith("}\n")
    assert list(path.parent.iterdir()) == [path]


def test_a_name_that_is_no_utf8_comes_back(tmp_path):
    name = os.fsdecode(b"caf\xe9")

    write_json(tmp_path / "plan.json", {"name": name})
    write_rows(tmp_path / "events.jsonl", {"name": name})

    assert read_json(tmp_path / "plan.json") == {"name": name}
    assert read_jsonl(tmp_path / "events.jsonl") == [{"name": name}]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    write_json(path, {"a": 1})

    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    assert read_json(path) == {"a": 1}


def test_a_destination_that_is_a_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "plan.json").mkdir()

    with pytest.raises(StorageError):
        write_json(tmp_path / "plan.json", {"a": 1})

    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[1]", "holds no JSON object, but a list")],
)
def test_a_broken_json_file_is_named(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_text(content)

    with pytest.raises(RunError, match=message):
        read_json(path)


def test_an_absent_json_file_is_named(tmp_path):
    with pytest.raises(RunError, match=r"cannot read .*plan\.json: No such file"):
        read_json(tmp_path / "plan.json")


def test_the_csv_has_the_keys_of_all_rows(tmp_path):
    write_rows(
        tmp_path / "m.jsonl",
        {"train/loss": 6.9, "step": 1, "epoch": 0.5, "time": "t1"},
        {"step": 2, "time": "t2", "val/top1": 12.5, "train/loss": float("nan")},
    )

    write_csv(tmp_path / "m.jsonl", tmp_path / "m.csv")

    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["step", "epoch", "time", "train/loss", "val/top1"],
        ["1", "0.5", "t1", "6.9", ""],
        ["2", "", "t2", "nan", "12.5"],
    ]


def test_the_time_is_utc_with_its_offset():
    assert utc_now().endswith("+00:00")


def test_the_environment_names_machine_versions_and_command():
    environment = record_environment(variables={}, command=["convnext", "train", "in1k_tiny"])

    assert environment["python"] == platform.python_version()
    assert environment["command"] == ["convnext", "train", "in1k_tiny"]
    assert environment["packages"]["torch"]
    assert environment["cpu"]["count"] >= environment["cpu"]["usable"] >= 1
    assert environment["memory_gib"] > 0
    json.dumps(environment, allow_nan=False)


def test_the_environment_keeps_what_steers_training_and_nothing_private():
    variables = {"SLURM_JOB_ID": "42", "LOCAL_RANK": "3", "NCCL_DEBUG": "INFO", "HOME": "/home/me"}

    recorded = record_environment(variables=variables)["variables"]

    assert recorded == {"LOCAL_RANK": "3", "NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "42"}


def test_no_secret_reaches_the_file(tmp_path):
    variables = {
        "WANDB_API_KEY": "s3cr3t", "HF_TOKEN": "s3cr3t", "MLFLOW_TRACKING_PASSWORD": "s3cr3t",
        "MLFLOW_TRACKING_URI": "https://me:s3cr3t@host/x?sig=1&access_token=s3cr3t",
    }  # fmt: skip
    command = [
        "convnext", "train", "in1k_tiny", "tracker.api_key=s3cr3t with space", "--token", "s3cr3t",
        "--password=s3cr3t", "data.url=https://u:s3cr3t@host/a?X-Amz-Signature=s3cr3t",
        "optim.lr=1",
    ]  # fmt: skip

    write_json(tmp_path / "e.json", record_environment(variables=variables, command=command))

    text = (tmp_path / "e.json").read_text()
    assert "s3cr3t" not in text
    assert "optim.lr=1" in text
    assert "with space" not in text


def test_git_state_tells_commit_and_whether_files_were_changed(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ("git", *identity, "-C", str(tmp_path), *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-q", "-m", "a")
    monkeypatch.chdir(tmp_path)

    clean = record_environment()["git"]["folder"]
    (tmp_path / "a.py").write_text("2\n")
    changed = record_environment()["git"]["folder"]

    assert clean == {"root": str(tmp_path), "commit": git("rev-parse", "HEAD"), "dirty": False}
    assert changed == clean | {"dirty": True}


def test_outside_a_repository_there_is_no_git_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert record_environment()["git"]["folder"] is None


def test_gpus_are_listed_as_nvidia_smi_tells_them(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559, 550.54, GPU-1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    assert record_environment()["gpus"] == [
        {"name": "NVIDIA H100", "memory_mib": 81559, "driver": "550.54", "uuid": "GPU-1"}
    ]


def test_a_failing_nvidia_smi_means_no_gpus(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'no driver'; exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    assert record_environment()["gpus"] == []
