"""Traces to times: by launch on a GPU, by own time on a CPU."""

import pytest
import torch

from convnext_cli.bench.trace import sum_classes, sum_kernels, trace_step

DEPTHWISE_SHAPES = [[8, 96, 14, 14], [8, 96, 14, 14], [96, 1, 7, 7], []]
WGRAD = "sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc"


def event(cat: str, name: str, ts: float, dur: float, *, tid: int = 1, **args: object) -> dict:
    return {"cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def test_a_kernel_belongs_to_the_operator_around_its_launch():
    events = [
        event("user_annotation", "mixing", 0, 50),
        event("cpu_op", "aten::mul", 10, 20),
        event("cuda_runtime", "cudaLaunchKernel", 12, 3, correlation=1),
        event("cpu_op", "aten::mul", 60, 20),
        event("cuda_runtime", "cudaLaunchKernel", 62, 3, correlation=2),
        event(
            "cpu_op", "aten::convolution_backward", 0, 90, tid=2, **{"Input Dims": DEPTHWISE_SHAPES}
        ),
        event("cuda_driver", "cuLaunchKernelEx", 5, 3, tid=2, correlation=3),
        event("kernel", "elementwise_kernel", 1000, 7, tid=7, correlation=1),
        event("kernel", "elementwise_kernel", 1010, 11, tid=7, correlation=2),
        event("kernel", WGRAD, 1030, 40, tid=7, correlation=3),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 1080, 5, tid=7, correlation=99),
        event("gpu_user_annotation", "mixing", 1000, 200, tid=7),
    ]

    kernels = sum_kernels(events, steps=1, device="cuda")

    assert kernels[0].name == WGRAD
    assert sum_classes(kernels) == pytest.approx(
        {
            "depthwise weight gradient": 0.040,
            "elementwise": 0.011,
            "mixing": 0.007,
            "copies": 0.005,
        }
    )


def test_a_kernel_that_names_its_operator_needs_no_launch_in_the_same_thread():
    events = [
        event(
            *("cpu_op", "aten::cudnn_convolution", 0, 90),
            **{"External id": 5, "Input Dims": DEPTHWISE_SHAPES[1:]},
        ),
        event("cuda_runtime", "cudaLaunchKernel", 5, 3, tid=77, correlation=3),
        event("kernel", "an_engine", 1030, 40, tid=7, correlation=3, **{"External id": 5}),
    ]

    assert sum_classes(sum_kernels(events, steps=1, device="cuda")) == {"depthwise forward": 0.04}


def test_times_are_of_one_step():
    events = [event("kernel", "nvjet_tst_128x64", 100 * n, 8, correlation=n) for n in range(6)]

    (kernel,) = sum_kernels(events, steps=3, device="cuda")

    assert (kernel.milliseconds, kernel.launches) == (pytest.approx(0.016), 2)


def test_an_operator_of_a_cpu_has_its_own_time_alone():
    events = [
        event("user_annotation", "Optimizer.step#AdamW.step", 0, 1000),
        event("user_annotation", "network", 0, 600),
        event("cpu_op", "aten::linear", 10, 100),
        event("cpu_op", "aten::addmm", 20, 80),
        event("cpu_op", "aten::copy_", 30, 30),
        event("cpu_op", "aten::add_", 700, 40),
        event("Trace", "PyTorch Profiler (0)", 0, 2000),
    ]

    times = sum_classes(sum_kernels(events, steps=1, device="cpu"))

    assert times == pytest.approx({"matrix product": 0.07, "copies": 0.03, "optimizer": 0.04})


def test_a_trace_without_work_is_an_error():
    with pytest.raises(RuntimeError, match="saw no work"):
        trace_step(lambda: None, steps=1, device="cpu")


def test_the_work_of_a_real_trace_is_found():
    left, right = torch.randn(64, 64), torch.randn(64, 64)

    kernels = trace_step(lambda: left @ right, steps=2, device="cpu")

    product = next(kernel for kernel in kernels if kernel.name == "aten::mm")
    assert (product.operators, product.launches) == ("matrix product", 1)
    assert product.milliseconds > 0
