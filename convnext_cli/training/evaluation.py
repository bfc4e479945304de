"""`evaluate`: a loaded model over one split of a data set; every image counted exactly once.

Shapes: N images, K classes. Ranks share the images; what they count is summed, and padding is not
counted, so the scores do not depend on the batch size or on the number of ranks.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from convnext_cli.data.augment import EvalView
from convnext_cli.data.card import DatasetCard, read_card
from convnext_cli.data.fetch import Store, default_cache_dir
from convnext_cli.data.mix import normalise
from convnext_cli.data.reader import (
    PADDING,
    Batch,
    EvaluationSampler,
    ImageReader,
    build_loader,
    from_worker,
    is_lost_worker,
    make_lost_worker_error,
)
from convnext_cli.errors import DataError, DeviceError, UserError, quote_path
from convnext_cli.plan.cluster import Cluster
from convnext_cli.recipe.schema import Precision
from convnext_cli.training.devices import check_devices, lightning_precision, quiet_lightning
from convnext_cli.training.diagnosis import Diagnosis, Diagnostics
from convnext_cli.training.loading import LoadedModel
from convnext_cli.training.report import WORST_PAIRS, ClassRow, PairRow, Report
from convnext_cli.training.scores import Scores, Summary
from convnext_cli.training.strategy import build_strategy, find_environment
from convnext_cli.training.watch import is_lost_peer, make_lost_peer_error

Listener = Callable[[int, int], None]
"""Called with (batches done, batches in all) of this rank."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSetup:
    """Where and how to evaluate; nothing here changes the scores but the precision."""

    cluster: Cluster
    precision: Precision
    per_device_images: int
    workers: int


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What one pass over the images gave, over all ranks."""

    summary: Summary
    diagnosis: Diagnosis
    images_per_second: float
    """Over all devices, from the second batch on: the first one pays for the start."""


def open_split(path: str, split: str) -> DatasetCard:
    """The card of a data set that has images in this split.

    Raises:
        DataError: There is no data set or no such split, or it is empty.
    """
    card = read_card(path)
    if split not in card.splits or card.splits[split].images == 0:
        filled = [name for name, part in card.splits.items() if part.images]
        raise DataError(
            f"{path}: there are no images in a split named {split}, only in: {', '.join(filled)}",
            hint=f"name another one: --split {filled[0]}" if filled else "pack the data set again",
        )
    return card


def check_classes(model: LoadedModel, card: DatasetCard, *, data: str) -> None:
    """Refuse a data set whose labels do not mean what the model's outputs mean.

    Raises:
        DataError: Another number of classes, other classes, or the same in another order.
    """
    num_classes = len(card.classes)
    if model.num_classes != num_classes:
        raise DataError(
            f"{model.path} tells {model.num_classes:,} classes apart, but {data} has"
            f" {num_classes:,}",
            hint=_classes_hint(model, num_classes, data=data),
        )
    theirs = model.likely_classes
    if not theirs or card.classes == theirs:
        return
    if set(card.classes) == set(theirs):
        label = next(k for k, name in enumerate(theirs) if name != card.classes[k])
        raise DataError(
            f"{data} has the classes of {model.path} in another order: label {label} is"
            f" {card.classes[label]}, the model was trained with {theirs[label]}",
            hint="pack the data set again with the classes in the order of the model's training",
        )
    if not model.classes:
        return  # own classes under other names, as far as anyone can tell
    strange = next(name for name in card.classes if name not in model.classes)
    raise DataError(
        f"{data} has other classes than {model.path}: {strange} is none of the model's",
        hint=f"train the model on them: {_finetune(model, data)}",
    )


def _classes_hint(model: LoadedModel, num_classes: int, *, data: str) -> str:
    if (model.num_classes, num_classes) == (21_841, 1_000):
        return (
            "take the rows of the 1,000 classes from its head: convnext weights convert"
            f" {quote_path(model.path)} --map-head --to official --out mapped.pth"
        )
    return f"train a head for them: {_finetune(model, data)}"


def _finetune(model: LoadedModel, data: str) -> str:
    return f"convnext finetune --from {quote_path(model.path)} --data {quote_path(data)}"


def evaluate_model(
    model: LoadedModel,
    *,
    data: str,
    split: str,
    setup: EvaluationSetup,
    listener: Listener | None = None,
) -> Report:
    """Evaluate on all devices together; the result is the same on every rank.

    Raises:
        DeviceError: This machine does not have what is asked, or no room for a batch.
        DataError: The data set is not there, does not fit the model, or has a bad image.
        Hung: Another rank or a loader process was lost, or the ranks did not meet.
        UserError: Some outputs were not finite.
    """
    check_devices(setup.cluster, precision=setup.precision)
    quiet_lightning()
    card = open_split(data, split)
    check_classes(model, card, data=data)
    images = SplitData(card, path=data, split=split, view=model.preprocessing.view, setup=setup)
    task = Evaluator(model, channels_last=setup.cluster.device == "cuda", listener=listener)
    trainer = pl.Trainer(
        accelerator="gpu" if setup.cluster.device == "cuda" else "cpu",
        devices=setup.cluster.devices_per_node,
        num_nodes=setup.cluster.num_nodes,
        strategy=build_strategy(setup.cluster),
        plugins=[find_environment()],
        precision=lightning_precision(setup.precision),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        benchmark=setup.cluster.device == "cuda",  # every batch has the same shape
    )
    try:
        trainer.test(task, datamodule=images, verbose=False)
    except UserError as error:
        raise from_worker(error) from error
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"a device has no room for batches of {setup.per_device_images} images"
            f" ({str(error).split(' GPU ')[0]})",
            hint=f"take smaller ones, which change no score: --batch"
            f" {max(1, setup.per_device_images // 2)}",
        ) from error
    except RuntimeError as error:
        when = "in the evaluation"
        if is_lost_worker(error):
            hint = f"begin again with fewer: --workers {setup.workers // 2}"
            raise make_lost_worker_error(error, when=when, hint=hint) from error
        if is_lost_peer(error):
            hint = "run the same command again"
            raise make_lost_peer_error(error, when=when, hint=hint) from error
        raise
    assert task.counted is not None
    counted, expected = task.counted.summary.images, card.splits[split].images
    if counted != expected:
        raise DataError(
            f"{data}: {counted} images were counted, but {split} has {expected}",
            hint=f"check the data set: convnext data check {quote_path(data)}",
        )
    return make_report(
        model, task.counted, classes=card.classes, data=data, split=split, precision=setup.precision
    )


def make_report(
    model: LoadedModel,
    counted: Counted,
    *,
    classes: Sequence[str],
    data: str,
    split: str,
    precision: Precision,
) -> Report:
    """The counts with the names of classes."""
    summary, diagnosis, view = counted.summary, counted.diagnosis, model.preprocessing
    return Report(
        model=model.name,
        checkpoint=model.path,
        weights=model.source,
        parameters=model.num_parameters,
        image_px=view.image_px,
        crop=view.crop,
        crop_frac=view.crop_frac,
        interpolation=view.interpolation,
        view_reason=view.reason,
        data=data,
        split=split,
        precision=precision,
        images=summary.images,
        top1=summary.top1,
        top5=summary.top5,
        loss=summary.loss,
        ece=diagnosis.ece,
        images_per_second=counted.images_per_second,
        worst_pairs=tuple(
            PairRow(
                name=classes[pair.label],
                taken_for=classes[pair.predicted],
                images=pair.images,
                share=pair.images / diagnosis.classes[pair.label].images,
            )
            for pair in diagnosis.confused[:WORST_PAIRS]
        ),
        per_class=tuple(
            ClassRow(
                label=row.label,
                name=classes[row.label],
                images=row.images,
                correct=row.correct,
                top1=row.top1,
            )
            for row in diagnosis.classes
        ),
    )


class DealtSampler(EvaluationSampler):
    """The batches of one process, dealt to the ranks like cards; a rank that lacks one pads.

    An image is in the same place of the same batch for any number of ranks, and rounding depends
    on the place: so the scores agree to the last bits of their sums.
    """

    def __init__(self, num_images: int, *, rank: int, world: int, batch: int) -> None:
        super().__init__(num_images, rank=0, world=1, batch=batch)
        absent = -len(self.ids) % world
        padded = np.pad(self.ids, ((0, absent), (0, 0)), constant_values=PADDING)
        self.ids = padded[rank::world]


class SplitData(pl.LightningDataModule):
    """Each rank's share of one split, in equal padded batches."""

    def __init__(
        self,
        card: DatasetCard,
        *,
        path: str,
        split: str,
        view: EvalView,
        setup: EvaluationSetup,
    ) -> None:
        super().__init__()
        self.reader = ImageReader(
            card,
            store=Store(location=path, cache_dir=default_cache_dir()),
            split=split,
            view=view,
            seed=0,
            on_bad="raise",
        )
        self.setup_ = setup

    def test_dataloader(self) -> DataLoader[Batch]:
        """The batches of this rank."""
        assert self.trainer is not None  # Lightning asks for the loader
        sampler = DealtSampler(
            len(self.reader),
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            batch=min(self.setup_.per_device_images, len(self.reader)),
        )
        return build_loader(
            self.reader,
            sampler=sampler,
            num_workers=self.setup_.workers,
            pin_memory=self.setup_.cluster.device == "cuda",
            persistent=False,
        )


class Evaluator(pl.LightningModule):
    """Counts what a network makes of each batch."""

    def __init__(
        self, model: LoadedModel, *, channels_last: bool, listener: Listener | None
    ) -> None:
        super().__init__()
        self.network = model.network
        self.preprocessing = model.preprocessing
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.scores = Scores(model.num_classes)
        self.diagnostics = Diagnostics(model.num_classes)
        self.listener = listener
        self.counted: Counted | None = None
        self._started = 0.0
        self._images_before = torch.zeros((), dtype=torch.int64)

    def on_test_start(self) -> None:
        """Put the network into its memory format."""
        self.network.to(memory_format=self.memory_format)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch."""
        if batch_idx == 0:
            self._started = time.monotonic()
        x_NCHW = normalise(
            batch.image_NCHW, mean=self.preprocessing.mean, std=self.preprocessing.std
        )
        logits_NK: Tensor = self.network(x_NCHW.contiguous(memory_format=self.memory_format))
        self.scores.update(logits_NK.float(), batch.label_N)
        self.diagnostics.update(logits_NK.float(), batch.label_N)
        batches = sum(self.trainer.num_test_batches)
        if batch_idx == 0 and batches > 1:
            self._images_before = self.scores.images.clone()
            self._wait()
            self._started = time.monotonic()
        if self.listener is not None:
            self.listener(batch_idx + 1, int(batches))

    def on_test_epoch_end(self) -> None:
        """Sum over the ranks."""
        self._wait()
        seconds = torch.tensor(time.monotonic() - self._started, device=self.device)
        timed = self.scores.images - self._images_before.to(self.device)
        slowest = self.trainer.strategy.reduce(seconds, reduce_op="max")
        images = self.trainer.strategy.reduce(timed, reduce_op="sum")
        self.counted = Counted(
            summary=self.scores.compute_summary(),
            diagnosis=self.diagnostics.compute_diagnosis(),
            images_per_second=float(images) / max(float(slowest), 1e-9),
        )

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
