"""A plan and a run directory become a Lightning Trainer with this project's callbacks.

Lightning's own checkpointing, progress bar, samplers, signal handling and summary are off: what
they do here is done by `checkpoint`, `progress`, the data room, `preempt` and the plan.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import assert_never

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.io import CheckpointIO

from convnext_cli.errors import UserError
from convnext_cli.plan.resolve import Plan
from convnext_cli.recipe.schema import Tracker
from convnext_cli.runs.layout import RunDir
from convnext_cli.training.devices import lightning_precision
from convnext_cli.training.strategy import build_strategy, find_environment
from convnext_cli.training.throughput import DataClock

_FIRST_SCALE = 2.0**13
"""Of the loss in fp16. torch's 2**16 brings the first gradients of a ConvNeXt to the largest number
there is, and steps that are left out because of that are no sign of a run that diverges."""


def chosen_trackers(plan: Plan) -> tuple[Tracker, ...]:
    """The trackers of a recipe; auto: csv, and tensorboard where it is installed."""
    asked = plan.recipe.log.trackers
    if asked != "auto":
        return asked
    return ("csv", "tensorboard") if find_spec("tensorboard") else ("csv",)


def build_loggers(plan: Plan, run: RunDir, *, first_step: int) -> list[Logger]:
    """The trackers of a recipe.

    Raises:
        UserError: A tracker is asked for that is not installed.
    """
    return [
        logger
        for tracker in chosen_trackers(plan)
        if (logger := _build_logger(tracker, run, first_step=first_step)) is not None
    ]


def _build_logger(tracker: Tracker, run: RunDir, *, first_step: int) -> Logger | None:
    if tracker != "csv" and not find_spec(tracker):
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
            import mlflow  # noqa: PLC0415
            from lightning.pytorch.loggers import MLFlowLogger  # noqa: PLC0415

            run.trackers.mkdir(parents=True, exist_ok=True)
            beside = f"sqlite:///{run.trackers.resolve() / 'mlflow.db'}"
            return MLFlowLogger(
                experiment_name="convnext",
                run_name=run.name,
                # a server that MLFLOW_TRACKING_URI names goes before a file beside the run
                tracking_uri=mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else beside,
            )
        case _:
            assert_never(tracker)


def build_trainer(
    plan: Plan,
    *,
    callbacks: Sequence[pl.Callback],
    loggers: Sequence[Logger],
    clock: DataClock,
    checkpoint_io: CheckpointIO,
) -> pl.Trainer:
    """A Trainer for one attempt of a run: one long epoch over the steps that are left."""
    every = plan.eval_every_steps or plan.total_steps
    scaled = []
    if plan.precision == "fp16":
        scaler = torch.amp.GradScaler("cuda", init_scale=_FIRST_SCALE)
        scaled = [MixedPrecision("16-mixed", "cuda", scaler)]
    trainer = pl.Trainer(
        accelerator="gpu" if plan.cluster.device == "cuda" else "cpu",
        devices=plan.cluster.devices_per_node,
        num_nodes=plan.cluster.num_nodes,
        strategy=build_strategy(
            plan.cluster,
            strategy=plan.recipe.compute.strategy,
            shard_group=plan.recipe.compute.shard_group,
            clip_norm=plan.recipe.optim.clip_norm,
        ),
        # weights that are put together in inference mode could not be trained with again
        inference_mode=plan.recipe.compute.strategy == "ddp",
        plugins=[find_environment(), checkpoint_io, *scaled],
        precision=None if scaled else lightning_precision(plan.precision),
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
        benchmark=plan.cluster.device == "cuda",  # batches have few shapes
    )
    # It asks all ranks in each pass whether rank 0 got a SIGTERM, and waits for the device; here it
    # never hears of one, and `agreement` asks.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]  # noqa: SLF001
    # Its handlers save in the middle of a step, requeue by themselves and end with exit code 0.
    connector = trainer._signal_connector  # noqa: SLF001  # Lightning has no switch for it
    connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer
