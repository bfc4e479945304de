"""The LightningModule: one optimizer step, the averaged weights, and exact evaluation.

Shapes: N images, C channels, H height, W width, K classes.

A run is one long Lightning epoch: `Classifier.step` counts optimizer steps over all attempts, and
everything that changes with time (learning rate, mixing, drop path) is a function of that count.
So a resume needs no clock and no saved random state.

Metric names, as they appear in metrics.jsonl and every tracker:

| name | what |
|---|---|
| `train/loss` | mean training loss since the row before, over all ranks |
| `train/lr` | learning rate of the head (layer decay scale 1) |
| `train/grad_norm` | norm of the gradient before clipping |
| `val/loss`, `val/top1`, `val/top5` | raw weights; accuracies in percent |
| `val_ema/loss`, `val_ema/top1`, `val_ema/top5` | averaged weights |
| `speed/images_per_second`, `speed/data_wait_frac` | over all devices; share of time without data |
| `data/replaced_images` | unusable images since the row before, for which neighbours stood in |
| `memory/gib` | peak of the device (GPU), or what the process has (CPU) |
"""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from convnext_cli.data.mix import BatchMix, normalise
from convnext_cli.data.order import pass_rng
from convnext_cli.data.reader import Batch, Unusable
from convnext_cli.errors import CheckpointError, DataError
from convnext_cli.models.weights import ModelCard
from convnext_cli.optim.build import apply_lr, build_optimizer
from convnext_cli.optim.ema import update_averaged
from convnext_cli.optim.schedule import cosine_lr
from convnext_cli.plan.resolve import Plan
from convnext_cli.training.scores import Scores

CHECKPOINT_KEY = "convnext"
"""Our own part of a checkpoint: the model card, and where the run stands."""


class Classifier(pl.LightningModule):
    """A network that learns to classify images, as the plan says.

    Args:
        model: Network from (N, 3, H, W) to (N, K).
        averaged: A copy of it that holds the averaged weights; None: no averaging.
        plan: Every number of the run.
        mix: What is done to each training batch on the device.
        card: What the weights are, written into each checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        averaged: nn.Module | None,
        plan: Plan,
        mix: BatchMix,
        card: ModelCard,
    ) -> None:
        super().__init__()
        self.model = model
        self.ema_model = averaged
        self.plan = plan
        self.mix = mix
        self.card = card
        self.step = 0
        """Optimizer steps taken over all attempts."""
        self.grad_norm: Tensor | None = None
        """Norm of the newest gradient before clipping."""
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        """Sum of this rank's losses of the passes since the row before; stays on the device. Kept
        in float64, so that adding up losses in two attempts gives the same bits as in one."""
        self.step_loss = torch.zeros(())
        """Sum of the losses of the passes of the newest step."""
        self.loss_steps = torch.zeros(())
        """Steps in that sum: those whose gradient was finite; stays on the device."""
        self.left_out = torch.zeros(())
        """1 where the newest step was left out, because its gradient is not finite, else 0; stays
        on the device (`guard` reads it later)."""
        self.bad: list[Unusable] = []
        """Images that this rank could not use since the row before."""
        self.at_step_end = False
        """Whether the newest pass ended an optimizer step."""
        self.validation_due = False
        """Whether this step is to be validated and is not yet; true in a checkpoint of a run that
        was stopped before or in a validation, which the next attempt then begins with."""
        self.validation: dict[str, float] = {}
        """The newest validation row."""
        self.val_scores = Scores(plan.num_classes)
        self.val_ema_scores = None if averaged is None else Scores(plan.num_classes)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the published groups; the learning rate is set before each step."""
        return build_optimizer(self.plan, self.model)

    def prepare_images(self, images_NCHW: Tensor) -> Tensor:
        """Put float images into the memory format of the plan."""
        if self.plan.channels_last:
            return images_NCHW.contiguous(memory_format=torch.channels_last)
        return images_NCHW

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Loss of one pass; Lightning divides it by the passes of a step."""
        micro = batch_idx % self.plan.accumulate_steps
        self.at_step_end = micro == self.plan.accumulate_steps - 1
        seed, rank = self.plan.recipe.seed, self.global_rank
        rng = pass_rng(seed, step=self.step, micro=micro, rank=rank)
        # For drop path, which draws on the device; `torch.manual_seed` would visit all devices.
        seed_device = torch.cuda.manual_seed if self.device.type == "cuda" else torch.manual_seed
        seed_device(int(rng.integers(2**63)))
        passes_before = rank * self.plan.accumulate_steps + micro
        x_NCHW, target_NK = self.mix(
            batch.image_NCHW,
            batch.label_N,
            batch.choices,
            step=self.step,
            first=passes_before * self.plan.per_device_images,
        )
        logits_NK = self.model(self.prepare_images(x_NCHW))
        loss: Tensor = functional.cross_entropy(logits_NK.float(), target_NK)
        self.step_loss = loss.detach() if micro == 0 else self.step_loss + loss.detach()
        self.bad += batch.bad
        return loss

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,  # noqa: ANN401  # Lightning wraps the optimizer
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Set the learning rate of this step, step, and average the weights."""
        apply_lr(optimizer, self.lr_at(self.step))
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema_model is not None and self.plan.recipe.ema.decay is not None:
            decay, left_out = self.plan.recipe.ema.decay, self.left_out
            update_averaged(self.ema_model, self.model, decay=decay, left_out=left_out)
        device = self.step_loss.device
        counted = torch.where(self.left_out == 0, self.step_loss, 0.0)
        self.loss_sum = self.loss_sum.to(device) + counted
        self.loss_steps = self.loss_steps.to(device) + 1 - self.left_out
        self.step += 1
        self.validation_due = self.plan.validates_at(self.step)

    def on_train_start(self) -> None:
        """Make up for a validation that the attempt before was stopped in."""
        if self.validation_due:
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True

    def on_train_batch_end(self, *_: object) -> None:
        """Have the last step validated, whatever the interval: asked to stop, Lightning does so."""
        if self.at_step_end and self.step == self.plan.total_steps:
            self.trainer.should_stop = True

    def lr_at(self, step: int) -> float:
        """Learning rate of the head at an optimizer step."""
        return cosine_lr(
            step,
            peak=self.plan.lr,
            floor=self.plan.min_lr,
            warmup_steps=self.plan.warmup_steps,
            total_steps=self.plan.total_steps,
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm in every precision, and leave out a step whose gradient is not finite.

        Lightning calls this on unscaled gradients before every optimizer step. The ranks have the
        same gradient, so they all find the same. Fused AdamW reads on the device that a step is to
        be left out: no update, no decay, no moments, no count. In fp16 the loss scaler passes over
        the step; it reads its own finding on the host, which waits for the device.

        Source: torch/optim/adam.py `_fused_adam`, which takes `found_inf` from the loss scaler.
        """
        del gradient_clip_val, gradient_clip_algorithm
        limit = self.plan.recipe.optim.clip_norm
        weights = list(self.model.parameters())
        norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # of the whole gradient, the same on every rank
        self.grad_norm = norm.detach()
        self.left_out = (self.grad_norm * 0 != 0).float()  # inf and nan times 0 are nan
        if limit is not None:
            nn.utils.clip_grads_with_norm_(weights, limit, norm)
        if optimizer.defaults["fused"]:
            optimizer.found_inf = self.left_out  # type: ignore[attr-defined]  # see the source
        elif self.plan.precision != "fp16" and self.left_out:  # a CPU: nothing to wait for
            for weight in weights:
                weight.grad = None  # AdamW passes over such a weight

    def predict_logits(self, images_NCHW: Tensor, *, ema: bool) -> Tensor:
        """Logits (N, K) in fp32 of uint8 images, from the averaged or the raw weights."""
        model = self.ema_model if ema and self.ema_model is not None else self.model
        x_NCHW = normalise(images_NCHW, mean=self.card.mean, std=self.card.std)
        logits_NK: Tensor = model(self.prepare_images(x_NCHW))
        return logits_NK.float()

    def on_validation_epoch_start(self) -> None:
        """Start counting afresh."""
        self.val_scores.reset()
        if self.val_ema_scores is not None:
            self.val_ema_scores.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch for the raw and for the averaged weights; padding is not counted."""
        del batch_idx
        self.val_scores.update(self.predict_logits(batch.image_NCHW, ema=False), batch.label_N)
        if self.val_ema_scores is not None:
            logits_NK = self.predict_logits(batch.image_NCHW, ema=True)
            self.val_ema_scores.update(logits_NK, batch.label_N)

    def on_validation_epoch_end(self) -> None:
        """Sum over the ranks; callbacks read the row."""
        self.validation = self.compute_validation()
        self.validation_due = False

    def compute_validation(self) -> dict[str, float]:
        """The validation row; the same on every rank.

        Raises:
            DataError: Not every image was counted exactly once.
        """
        row: dict[str, float] = {}
        for prefix, scores in (("val", self.val_scores), ("val_ema", self.val_ema_scores)):
            if scores is None:
                continue
            result = scores.compute_summary()
            if result.images != self.plan.val_images:
                data, streams = self.plan.data_source, self.plan.recipe.data.mode == "stream"
                raise DataError(
                    f"validation counted {result.images} images instead of {self.plan.val_images}"
                    f" in {self.plan.recipe.data.val_path if streams else data}",
                    hint=f"go on with as many: data.val_images={result.images}"
                    if streams
                    else "check the data set: convnext data check DIR",
                )
            row |= {
                f"{prefix}/loss": result.loss,
                f"{prefix}/top1": result.top1,
                f"{prefix}/top5": result.top5,
            }
        return row

    def to_channels_last(self) -> None:
        """Put the convolutions of both weight sets into NHWC memory format; values stay."""
        for network in (self.model, self.ema_model):
            if network is not None:
                network.to(memory_format=torch.channels_last)

    def on_fit_start(self) -> None:
        """Let Lightning count on from the step of the checkpoint.

        Its own counters begin at zero in every process. Validation is due by its count of passes.
        """
        loop = self.trainer.fit_loop.epoch_loop
        loop.batch_progress.total.ready = self.step * self.plan.accumulate_steps
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self.step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model card and the step; Lightning's own loop positions are left out.

        They count within one process; `step` counts over all of them and says the same.
        """
        checkpoint.pop("loops", None)
        checkpoint[CHECKPOINT_KEY] = self.card.to_dict() | {
            "step": self.step,
            "validation_due": self.validation_due,
            # The row that comes next spans the checkpoint. Of all ranks: their number may change.
            "loss_sum": self.trainer.strategy.reduce(
                self.loss_sum.to(self.device, copy=True), reduce_op="sum"
            ),
            "loss_steps": int(self.loss_steps),
            "step_passes": self.step_passes,
            "bad": [list(bad) for bad in self.gather_bad()],
        }

    @property
    def step_passes(self) -> int:
        """Passes of a step over all ranks, whose losses are summed up."""
        return self.plan.accumulate_steps * self.plan.world_size

    def gather_bad(self) -> list[Unusable]:
        """Images that any rank could not use since the row before; every rank asks together."""
        parts = [self.bad] * self.plan.world_size
        if self.plan.world_size > 1:
            distributed.all_gather_object(parts, self.bad)
        return [bad for part in parts for bad in part]

    def check_fits(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse the checkpoint of another model.

        Raises:
            CheckpointError: It is of another model, or has other classes or weights.
        """
        theirs, ours = ModelCard.from_dict(checkpoint[CHECKPOINT_KEY]), self.card
        if (theirs.variant, theirs.num_classes) != (ours.variant, ours.num_classes):
            raise CheckpointError(
                f"the checkpoint is of {theirs.variant} with {theirs.num_classes} classes, and this"
                f" run trains {ours.variant} with {ours.num_classes}",
                hint="start a new run from its weights: init.weights=CHECKPOINT --name NAME"
                if theirs.variant == ours.variant
                else f"train the same model: model.name={theirs.variant}; or name a checkpoint of"
                f" {ours.variant}",
            )
        own = self.state_dict().keys()
        if strange := own ^ checkpoint["state_dict"].keys():
            name = min(strange)
            raise CheckpointError(
                "the checkpoint is of a run with other weights than this one:"
                f" {name} is {'missing there' if name in own else 'there alone'}",
                hint="go on with ema.decay and model.layer_scale_init as they were, or start a new"
                " run from its weights: init.weights=CHECKPOINT --name NAME",
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on at the step of a checkpoint that fits."""
        saved = checkpoint[CHECKPOINT_KEY]
        self.step = int(saved["step"])
        self.validation_due = bool(saved["validation_due"])
        # As if the steps before had had as many passes; checkpoints of before do not say it.
        passes = self.step_passes / saved.get("step_passes", self.step_passes)
        total = saved["loss_sum"].to(self.device, torch.float64) * passes
        self.loss_sum = total if self.global_rank == 0 else torch.zeros_like(total)
        if self.global_rank == 0:
            self.bad = [Unusable(*bad) for bad in saved.get("bad", [])]
        self.loss_steps = torch.tensor(float(saved["loss_steps"]), device=self.device)


def as_task(module: pl.LightningModule) -> Classifier:
    """The module of this project's trainer, which is always a `Classifier`."""
    assert isinstance(module, Classifier)
    return module
