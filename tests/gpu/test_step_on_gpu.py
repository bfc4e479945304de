"""Whole training steps against their peers on a real GPU."""

import json

import pytest

# Triton compiles the kernels of a model in two to three minutes where its cache is empty.
pytestmark = pytest.mark.timeout(900)


def test_steps_are_measured_compiled_and_with_their_memory(run_cli):
    done = run_cli(
        *("bench", "step", "in1k_tiny", "--batch", "16", "--size", "64", "--steps", "4"),
        *("--rounds", "3", "--against", "timm,torchvision", "--json"),
    )

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["precision"], report["compiled"], report["failed"]) == ("bf16", True, {})
    rates = {rate["system"]: rate for rate in report["rates"]}
    assert set(rates) == {"convnext", "timm", "torchvision"}
    state = 5 * 4 * 28_589_128  # weights, gradients, moments, averages
    for system, rate in rates.items():
        assert state < rate["peak_bytes"] < 10 * state
        assert 0 < rate["matmul_frac"] < 1
        assert 0 < rate["floor_frac"] < 1
        assert rate["floor_ops"] == ("fused" if system == "convnext" else "compiler")


@pytest.mark.parametrize("peer", ["timm", "timm-eager"])
def test_the_time_of_a_step_is_found_in_its_kernels(run_cli, peer):
    done = run_cli(
        *("bench", "step", "in1k_tiny", "--batch", "32", "--size", "128", "--steps", "4"),
        *("--rounds", "2", "--against", peer, "--profile", "--json"),
    )

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["profiles"]) == 2
    for profile in report["profiles"]:
        times = {each["operators"]: each["share"] for each in profile["classes"]}
        assert sum(times.values()) == pytest.approx(1)
        assert times["depthwise forward"] > 0, profile["kernels"]
        # cuDNN's names may leave open which gradient it is
        assert sum(times[kind] for kind in times if "gradient" in kind) > 0, profile["kernels"]
        for kind in ("matrix product", "normalisation", "elementwise", "optimizer", "mixing"):
            assert times[kind] > 0, profile["kernels"]
        assert times.get("other", 0) < 0.05, profile["kernels"]
        assert profile["device_milliseconds"] < 1.1 * profile["step_milliseconds"]


def test_memory_of_a_step_is_near_the_plans_estimate(run_cli):
    done = run_cli(
        *("bench", "step", "in1k_tiny", "--batch", "64", "--kernels", "eager", "--against", ""),
        *("--steps", "1", "--rounds", "1", "--memory", "--json"),
    )

    assert done.exit_code == 0, done.stderr
    memory = {each["checkpointing"]: each for each in json.loads(done.stdout)["memory"]}
    whole, selective, stages, blocks = memory.values()
    assert whole["peak_bytes"] == pytest.approx(whole["predicted_bytes"], rel=0.3)
    assert whole["bytes_per_image"] > stages["bytes_per_image"] > blocks["bytes_per_image"]
    assert whole["bytes_per_image"] > selective["bytes_per_image"] > blocks["bytes_per_image"]
    assert whole["most_images"] > 64


def test_depthwise_convolutions_are_measured_in_bf16(run_cli):
    done = run_cli("bench", "depthwise", "--models", "convnext_tiny", "--batch", "16", "--json")

    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["precision"], len(report["times"])) == ("bf16", 12)  # 3 systems, 4 stages
    for time in report["times"]:
        for measured in (time["forward"], time["input_gradient"], time["weight_gradient"]):
            assert 0 < measured["copy_frac"] < 2  # a small tensor may stay in the cache
            assert measured["error_frac"] < 0.05
