"""What is said of a node: good, doubtful and bad values of each thing that is looked at."""

import resource

import pytest

from convnext_cli.doctor.machine import (
    judge_disk,
    judge_gpus,
    judge_job,
    judge_links,
    judge_memory,
    judge_open_files,
    judge_processor,
    judge_shared_memory,
    judge_software,
    judge_versions,
    look_at_disk,
)

H100 = "NVIDIA H100 80GB HBM3, 570.86, 81559, 4, 31, 0"
LINKED = """\
\tGPU0\tGPU1\tNIC0\tCPU Affinity
GPU0\t X \tNV18\tSYS\t0-47
GPU1\tNV18\t X \tSYS\t0-47
NIC0\tSYS\tSYS\t X
"""
ACROSS = "\tGPU0\tGPU1\nGPU0\t X \tSYS\nGPU1\tSYS\t X \n"


@pytest.mark.parametrize(
    ("version", "level"), [("2.11.0+cu130", "ok"), ("2.12.1", "ok"), ("2.10.0", "problem")]
)
def test_torch_is_new_enough_or_not(version, level):
    finding = judge_software(version)

    assert finding.level == level
    assert version in finding.found
    assert bool(finding.advice) == (level != "ok")


@pytest.mark.parametrize(
    ("table", "sees", "levels", "words"),
    [
        (None, 0, ["warning"], "none: training runs on the CPU"),
        (H100, 0, ["problem"], "nvidia-smi lists 1, but torch finds none"),
        (None, 2, ["ok"], "no nvidia-smi"),
        (H100, 1, ["ok"], "1 of 1 in use: NVIDIA H100 80GB HBM3, driver 570.86"),
        (H100.replace(", 4,", ", 40000,"), 1, ["ok", "warning"], "40,000 of 81,559 MiB are taken"),
        (H100.replace(", 31,", ", 91,"), 1, ["ok", "warning"], "91 degrees"),
        (H100[:-1] + "3", 1, ["ok", "problem"], "3 memory errors"),
        (H100[:-1] + "[N/A]", 1, ["ok"], "in use"),
    ],
)
def test_gpus_are_there_and_well(table, sees, levels, words):
    findings = judge_gpus(table, torch_sees=sees)

    assert [finding.level for finding in findings] == levels
    assert words in findings[-1].found


def test_links_count_between_gpus_only():
    (linked,) = judge_links(LINKED, gpus=2)
    (across,) = judge_links(ACROSS, gpus=2)

    assert (linked.level, linked.found) == ("ok", "GPUs are joined by NV18")
    assert across.level == "warning"
    assert judge_links(ACROSS, gpus=1) == judge_links(None, gpus=8) == []


@pytest.mark.parametrize(
    ("cores", "devices", "environ", "level"),
    [
        (2, 1, {}, "ok"),
        (64, 8, {}, "ok"),
        (16, 8, {}, "warning"),
        (64, 8, {"OMP_NUM_THREADS": "1"}, "ok"),
        (64, 8, {"OMP_NUM_THREADS": "16"}, "warning"),
        (64, 8, {"OMP_NUM_THREADS": "16,2"}, "warning"),
        (2, 1, {"OMP_NUM_THREADS": "4,2"}, "warning"),
        (2, 1, {"OMP_NUM_THREADS": "1,8"}, "ok"),
        (2, 1, {"OMP_NUM_THREADS": "all"}, "ok"),
    ],
)
def test_there_are_cores_for_the_devices(cores, devices, environ, level):
    assert judge_processor(cores=cores, devices=devices, environ=environ).level == level


def test_host_memory_counts_by_device():
    assert judge_memory(64 * 10**9, devices=8).level == "ok"
    assert judge_memory(16 * 10**9, devices=8).level == "warning"


def test_docker_s_default_shared_memory_is_too_small():
    finding = judge_shared_memory(64 << 20, devices=1, workers=8)

    assert finding.level == "problem"
    assert "docker run --shm-size=16g" in finding.advice
    assert judge_shared_memory(16 << 30, devices=8, workers=8).level == "ok"


@pytest.mark.parametrize(
    ("soft", "hard", "level", "advice"),
    [
        (65_536, 65_536, "ok", ""),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, "ok", ""),
        (1024, 524_288, "warning", "ulimit -n 524288"),
        (1024, resource.RLIM_INFINITY, "warning", "ulimit -n 65536"),
        (1024, 1024, "warning", "raise nofile in /etc/security/limits.conf"),
    ],
)
def test_the_limit_of_open_files(soft, hard, level, advice):
    finding = judge_open_files(soft, hard)

    assert (finding.level, finding.advice) == (level, advice)


@pytest.mark.parametrize(
    ("free", "rate", "level"),
    [(10**12, 2e9, "ok"), (10**9, 2e9, "warning"), (10**12, 2e7, "warning")],
)
def test_a_disk_is_large_and_fast(tmp_path, free, rate, level):
    finding = judge_disk(
        "run directory", tmp_path, free=free, needed_bytes=30 * 10**9, bytes_per_second=rate
    )

    assert finding.level == level
    assert str(tmp_path) in finding.found


def test_a_folder_to_be_made_is_tried_above_it_and_nothing_stays(tmp_path):
    finding = look_at_disk("run directory", tmp_path / "a" / "b", needed_bytes=0)

    assert f"{tmp_path}: " in finding.found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path, monkeypatch):
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("convnext_cli.doctor.machine.tempfile.NamedTemporaryFile", refuse)
    folder = tmp_path / "my runs"
    folder.mkdir()
    finding = look_at_disk("run directory", folder, needed_bytes=0)

    assert (finding.level, finding.found) == (
        "problem",
        f"{folder} cannot be written: Permission denied",
    )
    assert finding.advice == f"choose another: ls -ld '{folder}'; df -h '{folder}'"


@pytest.mark.parametrize(
    ("end", "level", "words"),
    [
        ("", "warning", "its time limit is not known"),
        ("1300", "warning", "5 minutes are left"),
        ("700", "warning", "whose time limit is over"),
        ("8200", "ok", "2.0 hours are left"),
    ],
)
def test_the_time_that_a_job_has_left(end, level, words):
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_END_TIME": end}
    finding = judge_job(environ, now=1000.0, has_slurm=True)

    assert finding.level == level
    assert finding.found == f"job 7 of 4 nodes, {words}"


def test_outside_of_a_job_nothing_is_wrong():
    assert judge_job({}, now=0.0, has_slurm=True).found == "not in a job"
    assert "convnext launch local" in judge_job({}, now=0.0, has_slurm=False).found


def test_ranks_of_different_software_and_clocks():
    same = [("n1", "torch 2.11", 100.0), ("n2", "torch 2.11", 101.0)]
    apart = [("n1", "torch 2.11", 100.0), ("n2", "torch 2.12", 130.0)]

    assert judge_versions(same) == []
    versions, clocks = judge_versions(apart)
    assert (versions.level, versions.found) == ("problem", "n1 has torch 2.11; n2 has torch 2.12")
    assert (clocks.level, clocks.found) == ("warning", "the clocks of the nodes differ by 30 s")


def test_a_file_in_the_place_of_a_folder_is_a_problem(tmp_path):
    (tmp_path / "my runs").touch()

    finding = look_at_disk("run directory", tmp_path / "my runs", needed_bytes=1)

    assert finding.level == "problem"
    assert f"ls -ld '{tmp_path}/my runs'; df -h '{tmp_path}/my runs'" in finding.advice
