"""What devices and a precision ask of this machine and of Lightning."""

import logging
import warnings
from importlib.util import find_spec
from typing import Literal, assert_never

import torch

from convnext_cli.errors import DeviceError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.recipe.schema import Precision, Strategy

LightningPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]


def lightning_precision(precision: Precision) -> LightningPrecision:
    """Lightning's word for a precision."""
    match precision:
        case "fp32":
            return "32-true"
        case "bf16":
            return "bf16-mixed"
        case "fp16":
            return "16-mixed"
        case _:
            assert_never(precision)


FP8_CAPABILITY = (8, 9)
"""The first compute capability with fp8: Ada, then Hopper (9.0) and later."""


def check_devices(cluster: Cluster, *, precision: Precision, fp8: bool = False) -> None:
    """Refuse devices and precisions that this machine does not have, and have fp32 mean fp32.

    By torch's default, convolutions of fp32 are in TF32 on a GPU, though matrix products are not.

    Raises:
        DeviceError: No GPU, fewer than asked, or one without bf16; fp16 on a CPU; fp8 on a GPU
            without it, or without torchao.
    """
    match cluster.device:
        case "cpu":
            if precision == "fp16":
                raise DeviceError(
                    "fp16 needs a GPU: a CPU has no fast fp16 arithmetic",
                    hint="use --precision bf16 or --precision fp32",
                )
        case "cuda":
            _check_gpus(cluster.devices_per_node, precision=precision)
            torch.backends.cudnn.allow_tf32 = precision != "fp32"
            if fp8:
                check_fp8(torch.cuda.get_device_capability())
        case _:
            assert_never(cluster.device)


def _check_gpus(asked: int, *, precision: Precision) -> None:
    if not torch.cuda.is_available():
        raise DeviceError(
            "a GPU was asked for, but torch finds none on this machine",
            hint="use --device cpu, or check the driver with nvidia-smi",
        )
    found = torch.cuda.device_count()
    if asked > found:
        raise DeviceError(
            f"{asked} GPUs were asked for, but this machine has {found}",
            hint=f"use --devices {found}",
        )
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceError(
            f"{torch.cuda.get_device_name()} has no bf16 arithmetic",
            hint="use --precision fp16 or --precision fp32",
        )


def check_fp8(capability: tuple[int, int]) -> None:
    """Refuse fp8 on a GPU of this compute capability, or without its library.

    Raises:
        DeviceError: The GPU has no fp8 arithmetic, or torchao is not installed.
    """
    if capability < FP8_CAPABILITY:
        raise DeviceError(
            f"compute.fp8: fp8 needs a GPU of compute capability 8.9 or more, and this one has"
            f" {capability[0]}.{capability[1]}",
            hint="turn it off: compute.fp8=false",
        )
    if find_spec("torchao") is None:
        raise DeviceError(
            "compute.fp8: it needs torchao, which is not installed",
            hint="install it with pip install 'convnext[fp8]', or set compute.fp8=false",
        )


def check_strategy(cluster: Cluster, *, strategy: Strategy) -> None:
    """Refuse a strategy whose library is not installed; one device needs none.

    Raises:
        DeviceError: DeepSpeed is asked for and not there.
    """
    asks = strategy in {"zero1", "zero2", "zero3"} and cluster.world_size > 1
    if asks and find_spec("deepspeed") is None:
        raise DeviceError(
            f"compute.strategy: {strategy} needs DeepSpeed, which is not installed",
            hint="install it with pip install 'convnext[deepspeed]', or set compute.strategy=fsdp",
        )


def quiet_lightning() -> None:
    """Keep Lightning's advertisements, and its warnings about what is meant here, quiet."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r".*module\(s\) in eval mode at the start of training",  # the averaged weights
        r".*isinstance\(treespec, LeafSpec\)",  # Lightning's own use of torch
        r".*does not have many workers",  # the plan chose their number
        r".*was configured so 100% of the batches",
        r".*srun. command is available on your system but is not used",
        r".*GPU available but not used",  # asked for by --device cpu
        r"Grad strides do not match bucket view strides",  # of axes of length 1: copied alike
        r".*TensorFloat32 tensor cores for float32 matrix multiplication available",  # not in fp32
    ):
        warnings.filterwarnings("ignore", message=message)
