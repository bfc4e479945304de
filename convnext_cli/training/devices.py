"""What devices and a precision ask of this machine and of Lightning."""

import logging
import warnings
from typing import Literal, assert_never

import torch

from convnext_cli.errors import DeviceError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.recipe.schema import Precision

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


def check_devices(cluster: Cluster, *, precision: Precision) -> None:
    """Refuse devices and precisions that this machine does not have.

    Raises:
        DeviceError: No GPU, fewer than asked, or one without bf16; fp16 on a CPU.
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


def quiet_lightning() -> None:
    """Keep Lightning's advertisements, and its warnings about what is meant here, quiet."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r".*module\(s\) in eval mode at the start of training",  # the averaged weights
        r".*isinstance\(treespec, LeafSpec\)",  # Lightning's own use of torch
        r".*does not have many workers",  # the plan chose their number
        r".*was configured so 100% of the batches",
        r".*srun. command is available on your system but is not used",
    ):
        warnings.filterwarnings("ignore", message=message)
