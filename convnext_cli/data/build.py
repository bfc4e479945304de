"""The door of the data: a plan becomes a LightningDataModule and the on-device part of its batches.

One iteration of the training loader is the whole run, from the first step of this attempt to the
last step of the schedule: epochs are a matter of the order, not of the loop.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import distributed
from torch.utils.data import DataLoader

from convnext_cli.catalog.models import find_variant
from convnext_cli.data.augment import AugmentPlace, EvalView, TrainView
from convnext_cli.data.card import DatasetCard, read_card, require_path, shards_location
from convnext_cli.data.fetch import Expected, Store, default_cache_dir, is_url
from convnext_cli.data.mix import BatchMix
from convnext_cli.data.order import ORDER_VERSION, Order, Skip
from convnext_cli.data.prefetch import Prefetcher
from convnext_cli.data.randaugment import build_policy
from convnext_cli.data.reader import (
    Batch,
    EvaluationSampler,
    ImageReader,
    StepSampler,
    build_loader,
)
from convnext_cli.data.stream import Stream, StreamReader
from convnext_cli.errors import DataError, RecipeError
from convnext_cli.plan.resolve import Plan
from convnext_cli.recipe.schema import Recipe


def build_mix(recipe: Recipe, *, num_classes: int) -> BatchMix:
    """What is done to each training batch on the device."""
    return BatchMix(
        num_classes=num_classes,
        seed=recipe.seed,
        mean=recipe.data.mean,
        std=recipe.data.std,
        interpolation=recipe.augment.interpolation,
        mixup=recipe.mix.mixup,
        cutmix=recipe.mix.cutmix,
        prob=recipe.mix.prob,
        switch_prob=recipe.mix.switch_prob,
        group_images=recipe.mix.group_images,
        label_smoothing=recipe.mix.label_smoothing,
    )


def build_batch_mix(plan: Plan) -> BatchMix:
    """The same, in the form that a plan's network takes.

    ConvNeXt begins with a convolution, for which autocast would round the images in any case;
    models of timm may begin with something else.
    """
    rounded = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    own = find_variant(plan.recipe.model.name).family != "timm"
    return replace(
        build_mix(plan.recipe, num_classes=plan.num_classes),
        dtype=rounded[plan.precision] if own else torch.float32,
        channels_last=plan.channels_last,
        # on a CPU it gains nothing that is worth the time to compile it
        compiled=plan.compile and plan.cluster.device == "cuda",
    )


def build_train_view(recipe: Recipe, *, augment_on: AugmentPlace = "cpu") -> TrainView:
    """What training makes of each image; RandAugment here, or left for the device.

    Raises:
        RecipeError: The policy of RandAugment is not understood.
    """
    augment = recipe.augment
    if augment.rand_augment is not None:
        try:
            build_policy(
                augment.rand_augment,
                image_px=recipe.data.image_px,
                mean=recipe.data.mean,
                interpolation=augment.interpolation,
            )
        except ValueError as error:
            raise RecipeError(
                f"augment.rand_augment: {error}",
                hint="take the paper's: augment.rand_augment=rand-m9-mstd0.5-inc1",
            ) from error
    return TrainView(
        image_px=recipe.data.image_px,
        crop_scale=augment.crop_scale,
        crop_ratio=augment.crop_ratio,
        interpolation=augment.interpolation,
        hflip=augment.hflip,
        rand_augment=augment.rand_augment,
        augment_on=augment_on,
        erasing=augment.erasing,
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


def build_data(plan: Plan, *, first_step: int, skips: tuple[Skip, ...] = ()) -> "ImageData":
    """The loaders of a run that starts, or goes on, after `first_step` optimizer steps.

    Args:
        plan: What is trained on what.
        first_step: Steps that are taken.
        skips: Images that the run leaves out; a stream has no such places, and shuffles on.

    Raises:
        DataError: The data set is not there or not what the plan was made for.
    """
    path = require_path(plan.recipe.data.path)
    match plan.recipe.data.mode:
        case "indexed":
            return IndexedData(plan, path, first_step=first_step, skips=skips)
        case "stream":
            return StreamedData(plan, path, first_step=first_step)


def check_shards(card: DatasetCard, store: Store) -> None:
    """Look whether all shards of a local data set are there, before anything is spent.

    Raises:
        DataError: One is missing or has another size.
    """
    location = shards_location(card, store.location)
    if is_url(location):
        return
    shards = replace(store, location=location)
    for split in card.splits.values():
        for shard in split.shards:
            shards.path(shard.name, expected=Expected(num_bytes=shard.bytes))


class DeviceData(pl.LightningDataModule):
    """Batches are copied to a GPU on a stream of their own, while it is at the step before."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: torch.cuda.Stream | None = None

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """The batch with its tensors on the device; the host waits for nothing."""
        if device.type != "cuda":
            here: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
            return here
        if self._copies is None:
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copies):
            moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        training = torch.cuda.current_stream(device)
        training.wait_stream(self._copies)
        for tensor in (moved.image_NCHW, moved.label_N, moved.sample_N):
            tensor.record_stream(training)  # its memory is not used again before training is done
        return moved


class IndexedData(DeviceData):
    """Exact order, exact evaluation, exact resume, through the index beside the shards."""

    def __init__(
        self, plan: Plan, path: str, *, first_step: int, skips: tuple[Skip, ...] = ()
    ) -> None:
        super().__init__()
        self.plan = plan
        self.first_step = first_step
        self.skips = skips
        data = plan.recipe.data
        self.store = Store(
            location=path,
            cache_dir=Path(data.cache_dir) if data.cache_dir else default_cache_dir(),
            cache_bytes=None if data.cache_gb is None else int(data.cache_gb * 1e9),
        )
        self.view = build_train_view(plan.recipe, augment_on=plan.augment_on)
        self.card = read_card(path)
        self.classes: tuple[str, ...] = tuple(self.card.classes)
        self.prefetcher: Prefetcher | None = None
        _, order = self._build_order()
        if plan.world_size not in order.worlds:
            raise DataError(
                f"{plan.world_size} devices cannot share {order.num_lanes} lanes of a window order",
                hint=f"use one of {', '.join(map(str, order.worlds))} devices, or data.order=full",
            )
        check_shards(self.card, self.store)

    def state_dict(self) -> dict[str, Any]:
        """What the order of the images depends on, but for the recipe (`fit` holds it against)."""
        return {"fingerprint": self.card.fingerprint, "order_version": ORDER_VERSION}

    def _build_order(self) -> tuple[ImageReader, Order]:
        plan = self.plan
        reader = ImageReader(
            self.card,
            store=self.store,
            split="train",
            view=self.view,
            seed=plan.recipe.seed,
            on_bad="replace",
        )
        order = Order(
            shard_images=reader.shard_images,
            seed=plan.recipe.seed,
            global_images=plan.global_images,
            lanes=plan.recipe.data.lanes,
            kind=plan.recipe.data.order,
            skips=self.skips,
        )
        return reader, order

    def names_at(self, run_step: int) -> list[str]:
        """The keys, as `shard/key`, of the images that a step of the run takes, on all ranks."""
        reader, order = self._build_order()
        ids = order.batch(*order.locate(run_step))
        return [key for key, _ in reader.names(ids.tolist())]

    def train_dataloader(self) -> DataLoader[Batch]:
        """This rank's passes of all steps that are left."""
        plan = self.plan
        reader, order = self._build_order()
        sampler = StepSampler(
            order,
            rank=_rank(self),
            world=plan.world_size,
            accumulate=plan.accumulate_steps,
            first_step=self.first_step,
            total_steps=plan.total_steps,
            on_step=self._start_prefetching(reader, order),
            image_px_at=plan.image_px_at,
        )
        return build_loader(
            reader,
            sampler=sampler,
            num_workers=plan.workers,
            pin_memory=plan.cluster.device == "cuda",
        )

    def _start_prefetching(self, reader: ImageReader, order: Order) -> Callable[[int], None] | None:
        """Have one process of this node fetch shards ahead; returns whom to tell of each step."""
        plan, store = self.plan, reader.shard_store
        if not is_url(store.location) or _rank(self) % plan.cluster.devices_per_node:
            return None
        first = _rank(self)
        self.prefetcher = Prefetcher(
            store,
            shards=reader.shards,
            order=order,
            ranks=range(first, first + plan.cluster.devices_per_node),
            world=plan.world_size,
            first_step=self.first_step,
            total_steps=plan.total_steps,
        )
        return self.prefetcher.advance

    def teardown(self, stage: str) -> None:
        """End the process that fetches ahead."""
        del stage
        if self.prefetcher is not None:
            self.prefetcher.close()
            self.prefetcher = None

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


class StreamedData(DeviceData):
    """Unindexed shards through the webdataset library; see `stream` for the weaker promise."""

    def __init__(self, plan: Plan, path: str, *, first_step: int) -> None:
        super().__init__()
        self.plan = plan
        self.path = path
        self.view = build_train_view(plan.recipe, augment_on=plan.augment_on)
        self.first_epoch = first_step // plan.steps_per_epoch
        self.num_passes = (plan.total_steps - first_step) * plan.accumulate_steps
        self.classes: tuple[str, ...] = ()

    def names_at(self, run_step: int) -> list[str]:
        """Nothing: a stream does not know which images a step takes."""
        del run_step
        return []

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
            view=self.view,
        )
        return EpochChain(
            reader,
            loader=self._loader(reader),
            first_epoch=self.first_epoch,
            num_passes=self.num_passes,
        )

    def val_dataloader(self) -> "EvenBatches | list[EvenBatches]":
        """This rank's validation shards, once."""
        plan, data = self.plan, self.plan.recipe.data
        if not plan.val_images or data.val_path is None:
            return []
        reader = StreamReader(
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
        is_any = _build_question() if plan.world_size > 1 else bool
        return EvenBatches(self._loader(reader), padding=reader.make_padding(), is_any=is_any)

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


class EvenBatches:
    """As many batches on every rank, padded where a rank is through: ranks act together.

    Args:
        loader: The batches of this rank.
        padding: A batch without an image.
        is_any: Whether a rank says yes; every rank asks at the same time.
    """

    def __init__(
        self, loader: Iterable[Batch], *, padding: Batch, is_any: Callable[[bool], bool]
    ) -> None:
        self.loader = loader
        self.padding = padding
        self.is_any = is_any

    def __iter__(self) -> Iterator[Batch]:
        for batch in chain(self.loader, repeat(None)):
            if not self.is_any(batch is not None):
                return
            yield self.padding if batch is None else batch


def _build_question() -> Callable[[bool], bool]:
    """Ask all ranks over the hosts' network, so that nobody waits for a device."""
    group: Any = distributed.new_group(backend="gloo")

    def is_any(own: bool) -> bool:  # noqa: FBT001  # what `bool` is where there is one rank
        said = torch.tensor(int(own))
        distributed.all_reduce(said, op=distributed.ReduceOp.MAX, group=group)
        return bool(said)

    return is_any


def _rank(data: pl.LightningDataModule) -> int:
    assert data.trainer is not None  # Lightning asks for the loaders
    return data.trainer.global_rank


ImageData = IndexedData | StreamedData
"""The training and validation loaders of a plan, and the names of its classes."""
