"""What a device is and what it does in a second, measured by the simplest work that there is."""

import math
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from convnext_cli.bench.roofline import DATA_SHEETS, Rates
from convnext_cli.recipe.schema import Precision

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
_MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
_TRIES, _REPEATS = 5, 5


def name_device(device: str) -> str:
    """The name that the driver gives."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"


def read_versions(device: str) -> dict[str, str]:
    """Of what computes here."""
    versions = {}
    for name in ("torch", "triton", "timm", "torchvision"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue  # a torch for CPUs has no triton
    if device == "cuda":
        versions["cuda"] = torch.version.cuda or ""
        versions["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return versions


def measure_rates(device: str, *, precision: Precision) -> Rates:
    """What the device does in a second; fp32 arithmetic by its data sheet, where that is known."""
    sheet = DATA_SHEETS.get(name_device(device))
    return Rates(
        copy_bytes=measure_copy(device),
        matmul_flops=measure_matmul(device, precision=precision),
        fp32_flops=math.inf if sheet is None else sheet.fp32_flops_per_second,
    )


def measure_matmul(device: str, *, precision: Precision) -> float:
    """FLOP/s of the best of several large matrix products."""
    side = _MATRIX_SIDE[device]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _best_seconds(lambda: left @ right, device=device)


def measure_copy(device: str) -> float:
    """Bytes a second that the best of several copies of one large tensor reads and writes."""
    source = torch.zeros(_COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device=device)
    return 2 * source.numel() / seconds


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def _best_seconds(work: Callable[[], object], *, device: str) -> float:
    times = []
    for _ in range(_TRIES):
        wait(device)
        started = time.perf_counter()
        for _ in range(_REPEATS):
            work()
        wait(device)
        times.append((time.perf_counter() - started) / _REPEATS)
    return min(times)
