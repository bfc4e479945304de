"""The benchmark of steps runs at toy size, so that it is whole when somebody needs a number."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from time import monotonic, sleep

import psutil
import pytest

CHECKPOINTING = ["none", "selective", "stages", "blocks"]


def test_whole_steps_are_measured_beside_their_peers(run_process):
    done = run_process(
        *("bench", "step", "v2_in1k_atto", "--batch", 2, "--size", 32, "--device", "cpu"),
        *("--steps", 2, "--rounds", 2, "--against", "timm-eager,torchvision", "--json"),
    )

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    rates = {rate["system"]: rate for rate in report["rates"]}
    assert set(rates) == {"convnext", "timm-eager"}
    assert list(report["failed"]) == ["torchvision"]
    assert [pair["peer"] for pair in report["ratios"]] == ["timm-eager"]
    for rate in rates.values():
        assert 0 < rate["low"] <= rate["images_per_second"] <= rate["high"]
        assert 0 < rate["loss"] < 20
        assert rate["peak_bytes"] is None
    assert report["flops_per_image"] == pytest.approx(6 * 0.55e9 / 49, rel=0.05)
    assert (report["images"], report["precision"], report["compiled"]) == (2, "fp32", False)
    assert report["best_peer"]["peer"] == "timm-eager"
    floors = {floor["ops"]: floor["images_per_second"] for floor in report["floors"]}
    assert list(floors) == ["eager", "compiler", "fused", "best per stage"]
    for rate in rates.values():
        assert (rate["floor_ops"], rate["sheet_frac"]) == ("eager", None)
        assert rate["floor_frac"] == pytest.approx(rate["images_per_second"] / floors["eager"])


def test_torchvision_takes_the_same_steps(run_process):
    done = run_process(
        *("bench", "step", "in1k_tiny", "--batch", 2, "--size", 32, "--device", "cpu"),
        *("--steps", 1, "--rounds", 1, "--against", "torchvision", "mix.cutmix=null"),
    )

    assert done.exit_code == 0, done.stderr
    assert "torchvision" in done.stderr.split("times as fast")[1]
    assert "left out" not in done.stderr


def test_several_recipes_are_measured_in_one_command(run_process, tmp_path):
    done = run_process(
        *("bench", "step", "v2_in1k_atto,compare_resnet50", "--batch", 2, "--size", 32),
        *("--device", "cpu", "--steps", 1, "--rounds", 1, "--against", "timm-eager"),
        *("--out", "results", "--json"),
    )

    assert done.exit_code == 0, done.stderr
    reports = json.loads(done.stdout)
    assert [report["model"] for report in reports] == ["convnextv2_atto", "resnet50"]
    for report in reports:
        written = tmp_path / f"results/step-{report['model']}.json"
        assert json.loads(written.read_text()) == report
        assert [rate["system"] for rate in report["rates"]] == ["convnext", "timm-eager"]
        assert report["failed"] == {}


def test_ctrl_c_ends_all_systems(tmp_path):
    command = [sys.executable, "-m", "convnext_cli", "bench", "step", "v2_in1k_atto"]
    options = ["--batch", "2", "--size", "32", "--device", "cpu", "--rounds", "100000"]
    process = subprocess.Popen(
        [*command, *options, "--against", "timm-eager"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a group of its own, as a shell gives it
    )
    systems: list[psutil.Process] = []
    try:
        deadline = monotonic() + 100
        while len(systems) < 2:
            assert monotonic() < deadline
            assert process.poll() is None
            sleep(0.2)
            with contextlib.suppress(psutil.NoSuchProcess):  # one of them may end meanwhile
                below = psutil.Process(process.pid).children()
                systems = [each for each in below if "spawn_main" in " ".join(each.cmdline())]
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert not any(each.is_running() for each in systems)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_time_and_memory_of_a_step_are_taken_apart(run_process, tmp_path):
    done = run_process(
        *("bench", "step", "v2_in1k_atto", "--batch", 8, "--size", 64, "--device", "cpu"),
        *("--steps", 1, "--rounds", 1, "--against", "timm", "--profile", "--memory"),
        *("--out", "results", "--json"),
    )

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert json.loads((tmp_path / "results/step-convnextv2_atto.json").read_text()) == report
    assert (tmp_path / "results/step-convnextv2_atto.md").read_text().startswith("## convnextv2_")
    assert [profile["system"] for profile in report["profiles"]] == ["convnext", "timm"]
    for profile in report["profiles"]:
        times = {each["operators"]: each for each in profile["classes"]}
        assert sum(each["share"] for each in times.values()) == pytest.approx(1)
        # Ranges and shapes were found: none of these is told by a name alone.
        for kind in ("mixing", "optimizer", "depthwise forward", "depthwise gradients"):
            assert times[kind]["milliseconds"] > 0, kind
        assert times["other"]["share"] < 0.3
        assert times["matrix product"]["floor_milliseconds"] > 0
    memory = {each["checkpointing"]: each for each in report["memory"]}
    assert list(memory) == CHECKPOINTING
    for each in memory.values():
        assert each["images"] == [4, 8]
        assert each["peak_bytes"] == pytest.approx(each["predicted_bytes"], rel=0.3)
    per_image = {name: each["bytes_per_image"] for name, each in memory.items()}
    assert max(per_image, key=per_image.get) == "none"
    assert min(per_image, key=per_image.get) == "blocks"


def test_a_model_of_timm_has_rates_without_a_roofline(run_process):
    done = run_process(
        *("bench", "step", "compare_resnet50", "--batch", 2, "--size", 32, "--device", "cpu"),
        *("--steps", 1, "--rounds", 1, "--against", "", "--memory", "--profile", "--json"),
    )

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["floors"], report["best_peer"], report["failed"]) == ([], None, {})
    (rate,) = report["rates"]
    assert (rate["floor_frac"], rate["best_floor_frac"]) == (None, None)
    assert [memory["checkpointing"] for memory in report["memory"]] == ["none"]
    (profile,) = report["profiles"]
    assert all(each["floor_milliseconds"] is None for each in profile["classes"])


def test_the_depthwise_convolution_is_measured_alone(run_process, tmp_path):
    done = run_process(
        *("bench", "depthwise", "--models", "convnextv2_atto,convnextv2_pico", "--batch", 2),
        *("--size", 32, "--device", "cpu", "--out", tmp_path, "--json"),
    )

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    shapes = [(time["channels"], time["side"]) for time in report["times"]]
    assert shapes[::3] == shapes[1::3] == shapes[2::3]
    assert shapes[::3] == [
        *((40, 8), (80, 4), (160, 2), (320, 1)),
        *((64, 8), (128, 4), (256, 2), (512, 1)),
    ]
    for time in report["times"]:
        assert time["system"] in {"torch NHWC", "torch NCHW", "convnext NHWC"}
        for measured in (time["forward"], time["input_gradient"], time["weight_gradient"]):
            assert measured["milliseconds"] > 0
            assert measured["error_frac"] < 1e-5
    assert "| 512 | 1 | torch NCHW |" in (tmp_path / "depthwise.md").read_text()


def test_a_report_that_cannot_be_written_is_shown_all_the_same(run_process, tmp_path):
    (tmp_path / "depthwise.json").mkdir()

    done = run_process(
        *("bench", "depthwise", "--models", "convnextv2_atto", "--batch", 1, "--size", 32),
        *("--device", "cpu", "--out", tmp_path, "--json"),
    )

    assert done.exit_code == 74
    assert json.loads(done.stdout)["times"]
    assert f"cannot write {tmp_path / 'depthwise.json'}: Is a directory" in done.stderr
