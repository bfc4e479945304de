"""The door of the data: a plan becomes a LightningDataModule and the on-device part of its batches.

One iteration of the training loader is the whole run, from the first step of this attempt to the
last step of the schedule: epochs are a matter of the order, not of the loop.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from convnext_cli.data.augment import EvalView, TrainView
from convnext_cli.data.card import read_card
from convnext_cli.data.fetch import Store
from convnext_cli.data.mix import BatchMix
from convnext_cli.data.order import Order
from convnext_cli.data.reader import (
    Batch,
    EvaluationSampler,
    ImageReader,
    StepSampler,
    build_loader,
)
from convnext_cli.data.stream import Stream, StreamReader
from convnext_cli.errors import DataError
from convnext_cli.plan.resolve import Plan
from convnext_cli.recipe.schema import Recipe


def build_mix(recipe: Recipe, *, num_classes: int) -> BatchMix:
    """What is done to each training batch on the device."""
    return BatchMix(
        num_classes=num_classes,
        mean=recipe.data.mean,
        std=recipe.data.std,
        erasing=recipe.augment.erasing,
        mixup=recipe.mix.mixup,
        cutmix=recipe.mix.cutmix,
        prob=recipe.mix.prob,
        switch_prob=recipe.mix.switch_prob,
        label_smoothing=recipe.mix.label_smoothing,
    )


def build_train_view(recipe: Recipe) -> TrainView:
    """What training makes of each image."""
    augment = recipe.augment
    return TrainView(
        image_px=recipe.data.image_px,
        crop_scale=augment.crop_scale,
        crop_ratio=augment.crop_ratio,
        interpolation=augment.interpolation,
        hflip=augment.hflip,
        rand_augment=augment.rand_augment,
        color_jitter=augment.color_jitter,
        mean=recipe.data.mean,
    )


def build_eval_view(recipe: Recipe) -> EvalView:
    """What evaluation makes of each image."""
    evaluate = recipe.evaluate
    return EvalView(
        image_px=recipe.data.image_px,
        crop=evaluate.crop,
        crop_frac=evaluate.crop_frac,
        interpolation=recipe.augment.interpolation,
    )


def default_cache_dir() -> Path:
    """Where shards from a URL are kept: `XDG_CACHE_HOME` or ~/.cache, then convnext/shards."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "convnext" / "shards"


def build_data(plan: Plan, *, first_step: int) -> "ImageData":
    """The loaders of a run that starts, or goes on, after `first_step` optimizer steps.

    Raises:
        DataError: The data set is not there or not what the plan was made for.
    """
    if plan.recipe.data.path is None:
        raise DataError(
            "the recipe names no data set to train on",
            hint="name one with --data DIR (convnext data pack SOURCE DIR makes it)",
        )
    match plan.recipe.data.mode:
        case "indexed":
            return IndexedData(plan, plan.recipe.data.path, first_step=first_step)
        case "stream":
            return StreamedData(plan, plan.recipe.data.path, first_step=first_step)


class IndexedData(pl.LightningDataModule):
    """Exact order, exact evaluation, exact resume, through the index beside the shards."""

    def __init__(self, plan: Plan, path: str, *, first_step: int) -> None:
        super().__init__()
        self.plan = plan
        self.first_step = first_step
        data = plan.recipe.data
        cache_dir = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
        self.store = Store(location=path, cache_dir=cache_dir)
        self.card = read_card(path)
        self.classes: tuple[str, ...] = tuple(self.card.classes)

    def train_dataloader(self) -> DataLoader[Batch]:
        """This rank's passes of all steps that are left."""
        plan = self.plan
        reader = ImageReader(
            self.card,
            store=self.store,
            split="train",
            view=build_train_view(plan.recipe),
            seed=plan.recipe.seed,
            on_bad="replace",
        )
        order = Order(
            shard_images=reader.shard_images,
            seed=plan.recipe.seed,
            global_images=plan.global_images,
            lanes=plan.recipe.data.lanes,
            kind=plan.recipe.data.order,
        )
        if plan.world_size not in order.worlds:
            raise DataError(
                f"{plan.world_size} devices cannot share {order.num_lanes} lanes of a window order",
                hint=f"use one of {', '.join(map(str, order.worlds))} devices, or data.order=full",
            )
        sampler = StepSampler(
            order,
            rank=_rank(self),
            world=plan.world_size,
            accumulate=plan.accumulate_steps,
            first_step=self.first_step,
            total_steps=plan.total_steps,
        )
        return build_loader(
            reader,
            sampler=sampler,
            num_workers=plan.workers,
            pin_memory=plan.cluster.device == "cuda",
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """This rank's share of the validation images, each image on one rank."""
        plan = self.plan
        if not plan.val_images:
            return []
        reader = ImageReader(
            self.card,
            store=self.store,
            split="val",
            view=build_eval_view(plan.recipe),
            seed=plan.recipe.seed,
            on_bad="raise",
        )
        sampler = EvaluationSampler(
            len(reader),
            rank=_rank(self),
            world=plan.world_size,
            batch=min(plan.eval_per_device_images, -(-len(reader) // plan.world_size)),
        )
        return build_loader(
            reader,
            sampler=sampler,
            num_workers=plan.workers,
            pin_memory=plan.cluster.device == "cuda",
        )


class StreamedData(pl.LightningDataModule):
    """Unindexed shards through the webdataset library; see `stream` for the weaker promise."""

    def __init__(self, plan: Plan, path: str, *, first_step: int) -> None:
        super().__init__()
        self.plan = plan
        self.path = path
        self.first_epoch = first_step // plan.steps_per_epoch
        self.num_passes = (plan.total_steps - first_step) * plan.accumulate_steps
        self.classes: tuple[str, ...] = ()

    def train_dataloader(self) -> "EpochChain":
        """Passes of all steps that are left; a resume begins its epoch again."""
        plan = self.plan
        reader = StreamReader(
            Stream(
                urls=self.path,
                num_classes=plan.num_classes,
                batch=plan.per_device_images,
                num_batches=plan.steps_per_epoch * plan.accumulate_steps,
                seed=plan.recipe.seed,
                rank=_rank(self),
                world=plan.world_size,
                allow_pipe=plan.recipe.data.allow_pipe,
            ),
            view=build_train_view(plan.recipe),
        )
        return EpochChain(
            reader,
            loader=self._loader(reader),
            first_epoch=self.first_epoch,
            num_passes=self.num_passes,
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """This rank's validation shards, once."""
        plan, data = self.plan, self.plan.recipe.data
        if not plan.val_images or data.val_path is None:
            return []
        return self._loader(
            StreamReader(
                Stream(
                    urls=data.val_path,
                    num_classes=plan.num_classes,
                    batch=plan.eval_per_device_images,
                    num_batches=None,
                    seed=plan.recipe.seed,
                    rank=_rank(self),
                    world=plan.world_size,
                    shuffle_images=0,
                    allow_pipe=data.allow_pipe,
                ),
                view=build_eval_view(plan.recipe),
            )
        )

    def _loader(self, reader: StreamReader) -> DataLoader[Batch]:
        return build_loader(
            reader,
            sampler=None,
            num_workers=self.plan.workers,
            pin_memory=self.plan.cluster.device == "cuda",
        )


class EpochChain:
    """One epoch of a stream after the other, up to a number of passes."""

    def __init__(
        self,
        reader: StreamReader,
        *,
        loader: DataLoader[Batch],
        first_epoch: int,
        num_passes: int,
    ) -> None:
        self.reader = reader
        self.loader = loader
        self.first_epoch = first_epoch
        self.num_passes = num_passes

    def __len__(self) -> int:
        return self.num_passes

    def __iter__(self) -> Iterator[Batch]:
        left, epoch = self.num_passes, self.first_epoch
        while left:
            self.reader.set_epoch(epoch)
            for batch in self.loader:
                yield batch
                left -= 1
                if not left:
                    return
            epoch += 1


def _rank(data: pl.LightningDataModule) -> int:
    assert data.trainer is not None  # Lightning asks for the loaders
    return data.trainer.global_rank


ImageData = IndexedData | StreamedData
"""The training and validation loaders of a plan, and the names of its classes."""
