"""Whole training steps on images that are on the device: this project's, timm's, torchvision's.

A step is augmentation on the device, forward, backward, AdamW and averaged weights, with the
numbers of one plan. Each system does it as its own trainer does, at its best settings: NHWC on a
GPU, fused AdamW, autocast, and compiled where that is asked.

Shapes: N images, C channels, H height, W width, K classes.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import cycle
from typing import Any, Literal, Protocol, assert_never

import numpy as np
import timm
import torch
import torchvision
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import record_function
from torchvision.transforms import v2

from convnext_cli.bench.operators import MIXING_RANGE, NETWORK_RANGE
from convnext_cli.bench.roofline import AUTOCAST, FP32, NARROW, OpList, Widths
from convnext_cli.catalog.models import find_variant
from convnext_cli.data.augment import Choices, draw_erased
from convnext_cli.data.build import build_batch_mix
from convnext_cli.data.mix import BatchMix
from convnext_cli.data.order import seeded_random
from convnext_cli.data.reader import Batch
from convnext_cli.errors import PlanError
from convnext_cli.models.build import build_model
from convnext_cli.models.convnext import ConvNeXt
from convnext_cli.models.fp8 import use_fp8
from convnext_cli.optim.ema import make_averaged
from convnext_cli.plan.resolve import Plan
from convnext_cli.training.fit import make_card
from convnext_cli.training.kernels import resolve_ways
from convnext_cli.training.strategy import compile_network
from convnext_cli.training.task import Classifier

StepSystem = Literal[
    "convnext",
    "convnext-compile",
    "timm",
    "timm-max-autotune",
    "timm-max-autotune-no-cudagraphs",
    "timm-eager",
    "torchvision",
]

_RESIDENT_BATCHES = 4
"""Different batches that are on the device; enough that no cache holds them."""
_TORCHVISION_EMA_STEPS = 32
"""Source: pytorch/vision references/classification/train.py --model-ema-steps."""


class TrainingStep(Protocol):
    """A system that is ready to take steps."""

    def __call__(self) -> Tensor:
        """One optimizer step on the next batch; the loss, still on the device."""


def build_step(name: StepSystem, plan: Plan) -> TrainingStep:
    """A system with fresh weights on the plan's device.

    Raises:
        PlanError: The system does not have the architecture.
    """
    match name:
        case "convnext":
            return OwnStep(plan)
        case "convnext-compile":
            return OwnStep(dataclasses.replace(plan, kernels="compile"))
        case "timm":
            return TimmStep(plan, mode="default" if plan.compile else None)
        case "timm-max-autotune" | "timm-max-autotune-no-cudagraphs":
            return TimmStep(plan, mode=name.removeprefix("timm-"))
        case "timm-eager":
            return TimmStep(plan, mode=None)
        case "torchvision":
            return TorchvisionStep(plan)
        case _:
            assert_never(name)


def find_op_list(name: StepSystem, plan: Plan) -> tuple[OpList, Widths]:
    """The operator list of the roofline that a system is built of, and the bytes of its values."""
    compiles = name.startswith("timm-max-autotune") or (plan.compile and name != "timm-eager")
    ops: OpList = "compiler" if compiles else "eager"
    if name == "convnext" and plan.kernels in {"auto", "fused"}:
        ops = "fused"
    if plan.precision == "fp32":
        return ops, FP32
    return ops, NARROW if name.startswith("convnext") else AUTOCAST


class OwnStep:
    """This project's LightningModule, driven as Lightning drives it."""

    def __init__(self, plan: Plan) -> None:
        model = build_model(plan)
        classes = tuple(str(number) for number in range(plan.num_classes))
        averaged = None if plan.recipe.ema.decay is None else make_averaged(model)
        mix = _MarkedMix(**vars(build_batch_mix(plan)))
        card = make_card(plan, classes=classes)
        self.task = _MarkedTask(model, averaged=averaged, plan=plan, mix=mix, card=card)
        if plan.fp8_layers:
            use_fp8(model)
        self.task.to(_device(plan)).train()
        if plan.channels_last:
            self.task.to_channels_last()
        self.ways = resolve_ways(plan, model) or []
        if self.ways:
            assert isinstance(model, ConvNeXt)
            model.use_ways(self.ways)
        if plan.compile:
            compile_network(model, cuda_graphs=plan.cuda_graphs)
        self.optimizer: Any = self.task.configure_optimizers()
        self._batches = cycle(_make_batches(plan))
        self._precision = _autocast(plan)
        self._loss = torch.zeros(())

    def __call__(self) -> Tensor:
        """One optimizer step on the next batch."""
        batch = next(self._batches)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            with record_function(NETWORK_RANGE):
                with self._precision():
                    loss = self.task.training_step(batch, 0)
                assert isinstance(loss, Tensor)
                loss.backward()  # type: ignore[no-untyped-call]
            self.task.configure_gradient_clipping(self.optimizer)
            self._loss = loss.detach()
            return loss

        self.task.optimizer_step(0, 0, self.optimizer, closure)
        return self._loss


class _MarkedMix(BatchMix):
    """The mixing, as a range of its own in a trace."""

    def __call__(
        self, images_NCHW: Tensor, labels_N: Tensor, choices: Choices, *, step: int, first: int
    ) -> tuple[Tensor, Tensor]:
        with record_function(MIXING_RANGE):
            return super().__call__(images_NCHW, labels_N, choices, step=step, first=first)


class _MarkedTask(Classifier):
    """The module, whose last copy before the network belongs to that range."""

    def prepare_images(self, images_NCHW: Tensor) -> Tensor:
        with record_function(MIXING_RANGE):
            return super().prepare_images(images_NCHW)


class TimmStep:
    """timm's train.py: its model, mixing, erasing, parameter groups, loss and averaged weights.

    Source: huggingface/pytorch-image-models 1.0.31 train.py, timm/data/loader.py.
    """

    def __init__(self, plan: Plan, *, mode: str | None) -> None:
        recipe, device = plan.recipe, _device(plan)
        name = find_variant(recipe.model.name).timm_name
        if name is None:
            raise PlanError(f"timm has no {recipe.model.name}", hint="leave timm out of --against")
        model = timm.create_model(
            name, num_classes=plan.num_classes, drop_path_rate=recipe.model.drop_path
        )
        self._format = torch.channels_last if plan.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(device, memory_format=self._format).train()
        self.ema = None
        if recipe.ema.decay is not None:
            self.ema = ModelEmaV3(self.model, decay=recipe.ema.decay)
        self.optimizer = torch.optim.AdamW(
            param_groups_weight_decay(self.model, recipe.optim.weight_decay),
            lr=1e-5,
            fused=plan.cluster.device == "cuda",
        )
        self._forward: Callable[[Tensor], Tensor] = self.model
        if mode is not None:
            self._forward = torch.compile(self.model, mode=mode)
        mix = recipe.mix
        self._mix = None
        if mix.mixup is not None or mix.cutmix is not None:
            self._mix = Mixup(
                mixup_alpha=mix.mixup or 0.0,
                cutmix_alpha=mix.cutmix or 0.0,
                label_smoothing=mix.label_smoothing,
                num_classes=plan.num_classes,
            )
        self._erase = RandomErasing(recipe.augment.erasing or 0.0, mode="pixel", device=device.type)
        scale = torch.tensor(255.0, device=device)
        self._mean_C11 = torch.tensor(recipe.data.mean, device=device).view(3, 1, 1) * scale
        self._std_C11 = torch.tensor(recipe.data.std, device=device).view(3, 1, 1) * scale
        self._loss_of = SoftTargetCrossEntropy() if self._mix else nn.CrossEntropyLoss()
        self._batches = cycle(_make_batches(plan))
        self._precision = _autocast(plan)

    def __call__(self) -> Tensor:
        """One optimizer step on the next batch."""
        batch = next(self._batches)
        target = batch.label_N
        with record_function(MIXING_RANGE):
            x_NCHW = batch.image_NCHW.float().sub_(self._mean_C11).div_(self._std_C11)
            x_NCHW = self._erase(x_NCHW)
            if self._mix is not None:
                x_NCHW, target = self._mix(x_NCHW, target)
            x_NCHW = x_NCHW.contiguous(memory_format=self._format)
        with self._precision():
            loss: Tensor = self._loss_of(self._forward(x_NCHW), target)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        return loss.detach()


class TorchvisionStep:
    """torchvision's reference trainer: its model, mixing and averaged weights (every 32 steps).

    It erases in its loader's processes, which are not measured here, so this step erases nothing.

    Source: pytorch/vision 0.26 references/classification/train.py.
    """

    def __init__(self, plan: Plan) -> None:
        recipe, device = plan.recipe, _device(plan)
        name = find_variant(recipe.model.name).torchvision_name
        if name is None:
            raise PlanError(
                f"torchvision has no {recipe.model.name}",
                hint="leave torchvision out of --against",
            )
        model = torchvision.models.get_model(
            name,
            num_classes=plan.num_classes,
            stochastic_depth_prob=recipe.model.drop_path,
        )
        self._format = torch.channels_last if plan.channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(device, memory_format=self._format).train()
        self.averaged = AveragedModel(
            self.model,
            multi_avg_fn=get_ema_multi_avg_fn(recipe.ema.decay or 0.0),  # type: ignore[no-untyped-call]
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=1e-5,
            weight_decay=recipe.optim.weight_decay,
            fused=plan.cluster.device == "cuda",
        )
        self._forward: Callable[[Tensor], Tensor] = self.model
        if plan.compile:
            self._forward = torch.compile(self.model)
        kinds = ((v2.MixUp, recipe.mix.mixup), (v2.CutMix, recipe.mix.cutmix))
        mixes = [
            kind(alpha=alpha, num_classes=plan.num_classes)
            for kind, alpha in kinds
            if alpha is not None
        ]
        self._mix = v2.RandomChoice(mixes) if mixes else None
        self._smoothing = recipe.mix.label_smoothing
        self._mean_C11 = torch.tensor(recipe.data.mean, device=device).view(3, 1, 1)
        self._std_C11 = torch.tensor(recipe.data.std, device=device).view(3, 1, 1)
        self._batches = cycle(_make_batches(plan))
        self._precision = _autocast(plan)
        self._step = 0

    def __call__(self) -> Tensor:
        """One optimizer step on the next batch."""
        batch = next(self._batches)
        target = batch.label_N
        with record_function(MIXING_RANGE):
            x_NCHW = (batch.image_NCHW.float() / 255 - self._mean_C11) / self._std_C11
            if self._mix is not None:
                x_NCHW, target = self._mix(x_NCHW, target)
            x_NCHW = x_NCHW.contiguous(memory_format=self._format)
        with self._precision():
            logits_NK = self._forward(x_NCHW)
            loss = functional.cross_entropy(logits_NK, target, label_smoothing=self._smoothing)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self._step % _TORCHVISION_EMA_STEPS == 0:
            self.averaged.update_parameters(self.model)
        self._step += 1
        return loss.detach()


def _device(plan: Plan) -> torch.device:
    return torch.device(plan.cluster.device)


def _autocast(plan: Plan) -> Callable[[], AbstractContextManager[None]]:
    def enter() -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = torch.autocast(
            plan.cluster.device, dtype=torch.bfloat16, enabled=plan.precision == "bf16"
        )
        return context

    return enter


def _make_batches(plan: Plan) -> list[Batch]:
    """Batches of noise on the device; random boxes are erased as the recipe says."""
    device, images = _device(plan), plan.per_device_images
    image_px = plan.recipe.data.image_px
    prob = plan.recipe.augment.erasing or 0.0
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(_RESIDENT_BATCHES):
        shape = (images, 3, image_px, image_px)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, plan.num_classes, (images,), generator=generator)
        with seeded_random(number):
            erased = np.stack([draw_erased(image_px, prob=prob) for _ in range(images)])
        ops = np.zeros((images, 0, 0), dtype=np.float32)  # RandAugment is done by the loader
        batches.append(
            Batch(
                pixels.to(device),
                labels.to(device),
                torch.arange(images),
                Choices(ops, erased),
                (),
            )
        )
    return batches
