"""Samples of an indexed data set as tensors, and the loader that batches them.

```
StepSampler        (epoch, sample) lists: one list a pass, in the run's order
ImageReader        (epoch, sample) -> pread -> decode -> view -> Sample      in worker processes
collate            Samples -> Batch
```

Legend: N = images of a pass, C = 3 channels, H and W = height and width.

Nothing depends on a worker's state: the epoch travels with the sample's id, and random choices
are drawn from (seed, epoch, sample). So any number of workers, started at any step, gives the same
batches bit for bit.
"""

import atexit
import os
import signal
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from ctypes import c_bool
from functools import cache, partial
from multiprocessing.sharedctypes import RawValue, Synchronized
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple, assert_never, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from convnext_cli.data.augment import View
from convnext_cli.data.card import DatasetCard, Shard, index_name
from convnext_cli.data.decode import BadImage, decode_rgb
from convnext_cli.data.fetch import Expected, Store
from convnext_cli.data.index import ShardIndex, read_index
from convnext_cli.data.order import Order, evaluation_share, image_rng
from convnext_cli.errors import DataError

PADDING = -1
"""Id and label of a place in a batch that holds no image; evaluation leaves it out."""

MAX_OPEN_SHARDS = 128
"""Shards that one process keeps open."""

_NEIGHBOURS = 64
"""Samples that are tried in place of a bad one."""

BadImageRule = Literal["replace", "raise"]
Place = tuple[int, int]
"""(epoch, sample id)."""


class Sample(NamedTuple):
    """One image as the loader's workers make it."""

    image_CHW: Tensor  # noqa: N815  # shape suffix
    label: int
    sample: int
    replaced: bool


class Batch(NamedTuple):
    """The images of one pass, on the host."""

    image_NCHW: Tensor  # noqa: N815  # shape suffix
    """uint8."""
    label_N: Tensor  # noqa: N815  # shape suffix
    """int64; -1 where there is no image."""
    sample_N: Tensor  # noqa: N815  # shape suffix
    """int64 sample ids; -1 where there is no image."""
    replaced_N: Tensor  # noqa: N815  # shape suffix
    """bool: this sample could not be read, and a neighbour stands in for it, image and label."""


class _OpenShard:
    """An open file and the columns of its index that reading needs."""

    def __init__(self, path: Path, index: ShardIndex) -> None:
        self.path = path
        self.labels: NDArray[np.integer] = np.asarray(index.labels)
        self.offsets: NDArray[np.integer] = np.asarray(index.image_offset)
        self.sizes: NDArray[np.integer] = np.asarray(index.image_bytes)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def read(self, row: int) -> bytes:
        return os.pread(self._file, int(self.sizes[row]), int(self.offsets[row]))


class ImageReader(Dataset[Sample]):
    """The images of one split, by (epoch, sample id); sample ids count through the shards.

    Args:
        card: The data set's card.
        store: Where its files are.
        split: Name of the split, such as train.
        view: What is made of each image.
        seed: The run's seed, for the random choices of the view.
        on_bad: replace: the next readable neighbour stands in for a bad image, the same one on
            every rank and worker, and the sample says so. raise: a bad image ends the run.

    Raises:
        DataError: There is no such split.
    """

    def __init__(
        self,
        card: DatasetCard,
        *,
        store: Store,
        split: str,
        view: View,
        seed: int,
        on_bad: BadImageRule,
    ) -> None:
        if split not in card.splits:
            raise DataError(
                f"{store.location}: no split named {split}, only {', '.join(card.splits)}",
                hint="pack the data set with this split, or name another",
            )
        self.store = store
        self.view = view
        self.seed = seed
        self.on_bad: BadImageRule = on_bad
        self.shards: Sequence[Shard] = tuple(card.splits[split].shards)
        self.num_classes = len(card.classes)
        self._ends = np.cumsum([shard.images for shard in self.shards])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    @property
    def shard_images(self) -> tuple[int, ...]:
        """Images in each shard, for `Order`."""
        return tuple(shard.images for shard in self.shards)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, object]:
        """Open files stay in the process that opened them."""
        return {**self.__dict__, "_open": OrderedDict()}

    def __getitem__(self, place: Place) -> Sample:
        """Read, decode and view one image.

        Raises:
            DataError: The shard cannot be read or a label is not a class; with `raise`, a bad
                image; with `replace`, no readable one among the next 64.
        """
        epoch, sample = place
        if sample == PADDING:
            image_px = self.view.image_px
            blank_CHW = torch.zeros((3, image_px, image_px), dtype=torch.uint8)
            return Sample(blank_CHW, PADDING, PADDING, replaced=False)
        candidates = [sample]
        if self.on_bad == "replace":
            candidates = [(sample + k) % len(self) for k in range(min(_NEIGHBOURS, len(self)))]
        for candidate in candidates:
            try:
                image_CHW, label = self.read(candidate)
            except BadImage as error:
                match self.on_bad:
                    case "replace":
                        continue
                    case "raise":
                        raise DataError(
                            f"{self.store.location}: sample {error}",
                            hint="see all bad images: convnext data check DIR",
                        ) from error
                    case _:
                        assert_never(self.on_bad)
            # Keyed by the sample that was asked for: a stand-in does not repeat its own view.
            view_CHW = self.view(image_CHW, image_rng(self.seed, epoch=epoch, sample=sample))
            return Sample(view_CHW, label, sample, replaced=candidate != sample)
        raise DataError(
            f"{self.store.location}: none of {len(candidates)} samples from {self.key(sample)} "
            "on can be read",
            hint="see what is wrong: convnext data check DIR",
        )

    def read(self, sample: int) -> tuple[Tensor, int]:
        """Pixels, uint8 of shape (3, H, W), and label of one sample; no view is taken.

        Raises:
            BadImage: The image cannot be decoded.
            DataError: The shard cannot be read or the label is not a class.
        """
        number, row = self._locate(sample)
        shard = self._shard(number)
        label = int(shard.labels[row])
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"{shard.path}: sample {self.key(sample)} has label {label}, but the data set has "
                f"{self.num_classes} classes",
                hint="pack the data set again, or repair its labels",
            )
        try:
            data = shard.read(row)
        except OSError as error:
            raise DataError(f"{shard.path}: {error.strerror or error}") from error
        if len(data) != shard.sizes[row]:
            raise BadImage(self.key(sample), "the shard ends inside it")
        try:
            return decode_rgb(data, key=""), label
        except BadImage as error:
            raise BadImage(self.key(sample), error.reason) from error

    def key(self, sample: int) -> str:
        """The sample's name, as `shard/key`."""
        number, row = self._locate(sample)
        return f"{self.shards[number].name}/{self._index(number).keys[row]}"

    def bad_reason(self, sample: int) -> str | None:
        """Why a sample cannot be used, for a report; None if it can."""
        try:
            self.read(sample)
        except BadImage as error:
            return error.reason
        return None

    def _locate(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        number = int(np.searchsorted(self._ends, sample, side="right"))
        return number, sample - int(self._ends[number]) + self.shards[number].images

    def _index(self, number: int) -> ShardIndex:
        shard = self.shards[number]
        index = read_index(self.store.path(index_name(shard.name), expected=Expected()))
        if len(index.labels) != shard.images:
            raise DataError(
                f"{shard.name}: its index has {len(index.labels)} samples, dataset.json says "
                f"{shard.images}",
                hint="pack the data set again",
            )
        return index

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        expected = Expected(num_bytes=shard.bytes, sha256=shard.sha256)
        opened = _OpenShard(self.store.path(shard.name, expected=expected), self._index(number))
        self._open[number] = opened
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return opened


class StepSampler(Sampler[list[Place]]):
    """One list of places a pass: this rank's share of each step, cut into equal passes.

    One iteration is all steps that are left of the run, epoch after epoch, so that loading never
    pauses between epochs.

    Args:
        order: The run's order.
        rank: Local to this rank.
        world: Number of ranks.
        accumulate: Passes (micro-batches) in a step.
        first_step: Steps of the run that are taken already.
        total_steps: Steps of the whole run.

    Raises:
        ValueError: The share does not divide into the passes, or the batch into the ranks.
    """

    def __init__(
        self,
        order: Order,
        *,
        rank: int,
        world: int,
        accumulate: int,
        first_step: int,
        total_steps: int,
    ) -> None:
        share = len(order.share(0, 0, rank=rank, world=world))
        if share % accumulate:
            raise ValueError(f"{share} images a rank do not divide into {accumulate} passes")
        self.order = order
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.steps = range(first_step, total_steps)

    def __len__(self) -> int:
        """Passes that are left."""
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[list[Place]]:
        for run_step in self.steps:
            epoch, step = divmod(run_step, self.order.steps_per_epoch)
            share = self.order.share(epoch, step, rank=self.rank, world=self.world)
            for ids in share.reshape(self.accumulate, -1):
                yield [(epoch, int(sample)) for sample in ids]


class EvaluationSampler(Sampler[list[Place]]):
    """Every image once over all ranks, in equal batches, padded with `PADDING`."""

    def __init__(self, num_images: int, *, rank: int, world: int, batch: int) -> None:
        self.ids = evaluation_share(num_images, rank=rank, world=world, batch=batch)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[list[Place]]:
        for ids in self.ids:
            yield [(0, int(sample)) for sample in ids]


def collate(samples: list[Sample]) -> Batch:
    """Stack samples into a batch; in a worker, straight into shared memory."""
    return Batch(*default_collate(samples))


@cache
def _leaving() -> "Synchronized[bool]":
    """Shared with the workers: whether this process is on its way out."""
    leaving = cast("Synchronized[bool]", RawValue(c_bool, False))  # noqa: FBT003  # its start value
    # Exit functions run last in, first out: before the one of multiprocessing, which terminates
    # the workers that are left and waits for them.
    atexit.register(setattr, leaving, "value", True)  # noqa: FBT003
    return leaving


def leave_signals_to_main(worker: int, *, leaving: "Synchronized[bool]") -> None:
    """Let a worker outlive signals: it ends when the main process tells it to, or is gone.

    Batch systems send theirs to every process of a job, and a worker that died of one would break
    the pass after which the main process writes its checkpoint.
    """
    del worker

    def end_with_main(number: int, frame: FrameType | None) -> None:
        del number, frame
        if leaving.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, end_with_main)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def from_worker(error: DataError) -> DataError:
    """The error as it was raised; a loader's worker sends its traceback in place of its message."""
    text, mark, message = str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")
    if not mark or not text.startswith("Caught "):
        return error
    return DataError(message.strip(), hint="see all bad images: convnext data check DIR")


def build_loader(
    dataset: ImageReader | IterableDataset[Batch],
    *,
    sampler: StepSampler | EvaluationSampler | None,
    num_workers: int,
    pin_memory: bool,
    persistent: bool = True,
    start_method: Literal["fork", "forkserver", "spawn"] | None = None,
) -> DataLoader[Batch]:
    """A stock DataLoader over a reader.

    Args:
        dataset: An `ImageReader`, or a stream that yields whole batches.
        sampler: Lists of places; None for a stream.
        num_workers: Processes; 0: everything happens in this one. Each runs one torch thread.
        pin_memory: For a GPU.
        persistent: Keep the workers between epochs.
        start_method: How workers start; None: as Python does by default.
    """
    loader: DataLoader[Batch] = DataLoader(
        dataset,  # type: ignore[arg-type]  # collate turns its samples into batches
        batch_sampler=sampler,
        batch_size=1 if sampler else None,
        collate_fn=collate if sampler else None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=persistent and num_workers > 0,
        worker_init_fn=partial(leave_signals_to_main, leaving=_leaving()),
        multiprocessing_context=start_method if num_workers > 0 else None,
        # Its own generator: else every iterator moves the global random state on.
        generator=torch.Generator(),
    )
    return loader
