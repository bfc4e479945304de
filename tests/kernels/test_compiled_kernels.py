"""Every kernel compiled for an H100: what the interpreter takes, a compiler may not."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = {
    *("depthwise_kernel", "depthwise_input_grad_kernel", "depthwise_weight_grad_kernel"),
    *("normalise_kernel", "normalise_backward_kernel"),
    *("mlp_forward_kernel", "mlp_input_grad_kernel", "mlp_weight_grad_kernel"),
    *("mlp_project_kernel", "mlp_hidden_grad_kernel", "mlp_kept_grad_kernel"),
    *("layer_scale_grad_kernel", "gelu_kernel", "gelu_backward_kernel"),
    *("gelu_grn_sums_kernel", "gelu_grn_kernel", "gelu_grn_backward_kernel"),
    *("grn_scale_kernel", "grn_slope_kernel", "sum_kept_kernel"),
}


def test_all_kernels_compile_for_sm_90_without_a_spill():
    command = [sys.executable, "-W", "ignore", ROOT / "benchmarks" / "kernels.py", "--json"]
    command += ["--model", "convnext_tiny", "--model", "convnextv2_tiny"]
    done = subprocess.run(
        [*command, "--stage", "0", "--stage", "2"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["kernels"]
    assert {row["kernel"] for row in rows} == KERNELS
    assert [row["kernel"] for row in rows if row["spilled_bytes"]] == []
    wide = [row for row in rows if row["kernel"].startswith("depthwise")]
    for row in wide:  # half of its slots for arithmetic would be memory's speed
        assert row["FFMA"] / row["loop_instructions"] > 0.6, row
    assert all(row["HGMMA"] for row in rows if row["kernel"].startswith("mlp_"))
