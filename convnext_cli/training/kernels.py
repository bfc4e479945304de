"""Which kernels compute each stage of a run: as asked, or the fastest here, alike on every rank."""

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import nn

from convnext_cli.catalog.ways import Way
from convnext_cli.data.fetch import default_cache_home
from convnext_cli.models.choice import choose_ways, list_usable
from convnext_cli.models.convnext import ConvNeXt
from convnext_cli.plan.resolve import Plan
from convnext_cli.training.task import as_task


def resolve_ways(
    plan: Plan, model: nn.Module, *, say: Callable[[str], None] = lambda _: None
) -> list[Way] | None:
    """The way of each stage, measured where the plan leaves it open; None: plain ones."""
    if not isinstance(model, ConvNeXt) or plan.kernels in {"compile", "eager"}:
        return None
    device = next(model.parameters()).device
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[plan.precision]
    if plan.kernels == "fused":
        stages = model.list_stages()
        return [list_usable(blocks[-1], device=device, dtype=dtype)[-1] for blocks in stages]
    choices = choose_ways(
        model,
        images=plan.per_device_images,
        image_px=plan.recipe.data.image_px,
        device=device,
        dtype=dtype,
        cache=default_cache_home() / "kernels",
        say=say,
    )
    return [choice.way for choice in choices]


class ChooseKernels(pl.Callback):
    """Decides before the first step, once the network is on its device; rank 0 decides for all."""

    def __init__(self, plan: Plan, *, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.say = say

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the ways of the network and of its average."""
        task = as_task(pl_module)
        ways = None
        if trainer.is_global_zero:
            ways = resolve_ways(self.plan, task.model, say=self.say)
        ways = trainer.strategy.broadcast(ways)
        if ways is None:
            return
        for network in (task.model, task.ema_model):
            if isinstance(network, ConvNeXt):
                network.use_ways(ways)
        if trainer.is_global_zero:
            self.say(f"kernels of the stages: {', '.join(ways)}")
