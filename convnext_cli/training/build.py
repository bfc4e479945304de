"""A plan and a run directory become a Lightning Trainer with this project's callbacks.

Lightning's own checkpointing, progress bar, samplers, signal handling and summary are off: what
they do here is done by `checkpoint`, `progress`, the data room, `preempt` and the plan.
"""

import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, assert_never

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from convnext_cli.errors import DeviceError, UserError
from convnext_cli.plan.resolve import Plan
from convnext_cli.recipe.schema import Precision, Tracker
from convnext_cli.runs.layout import RunDir
from convnext_cli.training.checkpoint import AtomicCheckpointIO
from convnext_cli.training.throughput import DataClock

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


def check_devices(plan: Plan) -> None:
    """Refuse devices and precisions that this machine does not have.

    Raises:
        DeviceError: No GPU, fewer than asked, or one without bf16.
    """
    if plan.cluster.device == "cpu":
        if plan.precision == "fp16":
            raise DeviceError(
                "fp16 needs a GPU: a CPU has no fast fp16 arithmetic",
                hint="use --precision bf16 or --precision fp32",
            )
        return
    if not torch.cuda.is_available():
        raise DeviceError(
            "a GPU was asked for, but torch finds none on this machine",
            hint="train on the CPU with --device cpu, or check the driver with nvidia-smi",
        )
    found, asked = torch.cuda.device_count(), plan.cluster.devices_per_node
    if asked > found:
        raise DeviceError(
            f"{asked} GPUs were asked for, but this machine has {found}",
            hint=f"use --devices {found}",
        )
    if plan.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise DeviceError(
            f"{torch.cuda.get_device_name()} has no bf16 arithmetic",
            hint="use --precision fp16 or --precision fp32",
        )


def build_strategy(plan: Plan) -> Strategy:
    """How devices share the work; fresh each time, for Lightning keeps state in it."""
    if plan.world_size == 1:
        return SingleDeviceStrategy(device="cuda:0" if plan.cluster.device == "cuda" else "cpu")
    return DDPStrategy(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # no model here keeps running statistics that must agree
        process_group_backend="nccl" if plan.cluster.device == "cuda" else "gloo",
    )


def build_loggers(plan: Plan, run: RunDir, *, first_step: int) -> list[Logger]:
    """The trackers of a recipe.

    Raises:
        UserError: A tracker is asked for that is not installed.
    """
    asked: Sequence[Tracker] = ()
    if plan.recipe.log.trackers != "auto":
        asked = plan.recipe.log.trackers
    elif find_spec("tensorboard"):
        asked = ("tensorboard",)
    return [
        logger
        for tracker in asked
        if (logger := _build_logger(tracker, run, first_step=first_step)) is not None
    ]


def _build_logger(tracker: Tracker, run: RunDir, *, first_step: int) -> Logger | None:
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
    if tracker in packages and not find_spec(packages[tracker]):
        raise UserError(
            f"log.trackers: {tracker} is not installed",
            hint="install the trackers: pip install 'convnext[trackers]'",
        )
    match tracker:
        case "csv":
            return None  # metrics.csv is written from metrics.jsonl by the recorder
        case "tensorboard":
            from lightning.pytorch.loggers import TensorBoardLogger  # noqa: PLC0415

            return TensorBoardLogger(
                run.trackers, name="", version="tensorboard", purge_step=first_step + 1
            )
        case "wandb":
            from lightning.pytorch.loggers import WandbLogger  # noqa: PLC0415

            return WandbLogger(
                project="convnext",
                name=run.name,
                id=run.name,
                resume="allow",
                save_dir=run.trackers,
            )
        case "mlflow":
            from lightning.pytorch.loggers import MLFlowLogger  # noqa: PLC0415

            return MLFlowLogger(
                experiment_name="convnext",
                run_name=run.name,
                tracking_uri=f"sqlite:///{run.trackers.resolve() / 'mlflow.db'}",
            )
        case _:
            assert_never(tracker)


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


def build_trainer(
    plan: Plan,
    *,
    callbacks: Sequence[pl.Callback],
    loggers: Sequence[Logger],
    clock: DataClock,
) -> pl.Trainer:
    """A Trainer for one attempt of a run: one long epoch over the steps that are left."""
    every = plan.eval_every_steps or plan.total_steps
    return pl.Trainer(
        accelerator="gpu" if plan.cluster.device == "cuda" else "cpu",
        devices=plan.cluster.devices_per_node,
        num_nodes=plan.cluster.num_nodes,
        strategy=build_strategy(plan),
        plugins=[AtomicCheckpointIO()],
        precision=lightning_precision(plan.precision),
        max_epochs=1,
        min_epochs=0,
        accumulate_grad_batches=plan.accumulate_steps,
        val_check_interval=every * plan.accumulate_steps,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if plan.val_images else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        profiler=clock,
        callbacks=list(callbacks),
        logger=list(loggers),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        benchmark=plan.cluster.device == "cuda",  # every batch has the same shape
    )
