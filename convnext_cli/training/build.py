"""A plan becomes a Lightning Trainer with this project's callbacks.

Lightning's own checkpointing, progress bar, loggers, samplers, signal handling and summary are off:
what they do here is done by `checkpoint`, `progress`, `trackers`, the data room, `preempt` and the
plan.
"""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.io import CheckpointIO

from convnext_cli.plan.resolve import Plan
from convnext_cli.training.devices import lightning_precision
from convnext_cli.training.strategy import build_strategy, find_environment
from convnext_cli.training.throughput import DataClock

_FIRST_SCALE = 2.0**13
"""Of the loss in fp16. torch's 2**16 brings the first gradients of a ConvNeXt to the largest number
there is, and steps that are left out because of that are no sign of a run that diverges."""


def build_trainer(
    plan: Plan,
    *,
    callbacks: Sequence[pl.Callback],
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
        logger=False,
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
