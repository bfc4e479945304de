"""Whole training steps against their peers on a real GPU."""

import json


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
    for rate in rates.values():
        assert state < rate["peak_bytes"] < 10 * state
        assert 0 < rate["matmul_frac"] < 1
