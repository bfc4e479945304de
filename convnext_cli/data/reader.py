"""Samples of an indexed data set as tensors, and the loader that batches them.

```
StepSampler        Shares: (epoch, sample) of a pass, in the run's order, and its size
ImageReader        (epoch, sample) -> pread -> digest -> decode -> view      in worker processes
collate            Samples -> Batch, its pixels in memory that is used again (`slots`)
```

Legend: N = images of a pass, C = 3 channels, H and W = height and width.

Nothing depends on a worker's state: the epoch travels with the sample's id, and random choices
are drawn from (seed, epoch, sample). So any number of workers, started at any step, gives the same
batches bit for bit.

An image that cannot be used (its bytes are not those that were indexed, it cannot be decoded, its
shard is damaged) is quarantined: in training a neighbour stands in for it, the same one everywhere,
and the batch names it with the reason; in evaluation it ends the run.
"""

import atexit
import faulthandler
import os
import signal
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_bool
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from multiprocessing.sharedctypes import RawValue, Synchronized
from types import FrameType
from typing import Literal, NamedTuple, assert_never, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
from xxhash import xxh3_64_intdigest

from convnext_cli.data.augment import NO_CHOICES, Choices, View, view_bytes
from convnext_cli.data.card import DatasetCard, Shard, index_name, shards_location
from convnext_cli.data.fetch import Expected, Store
from convnext_cli.data.header import BadImage
from convnext_cli.data.index import ShardIndex, read_index
from convnext_cli.data.order import Order, evaluation_share, image_seed, own_global_random
from convnext_cli.data.slots import Slots
from convnext_cli.errors import HINT_NOTE, DataError, Hung, UserError
from convnext_cli.runs.interrupt import leave_to_main

PADDING = -1
"""Id and label of a place in a batch that holds no image; evaluation leaves it out."""

MAX_OPEN_SHARDS = 128
"""Shards that one process keeps open."""

MAX_READ_INDEXES = 512
"""Shards whose offsets, labels and digests one process keeps: 160 MB at 10,000 images each."""

_PREFETCH, _HELD = 2, 4
"""Batches that each worker has in hand, and that the main process holds."""

TELL_AND_END = signal.SIGUSR2
"""On this signal a worker writes its Python stacks to stderr and ends, whatever it waits for."""

_NEIGHBOURS, _SHARDS_AFTER = 8, 64
"""Samples next to a bad one, and shards after its own, that are tried in its place."""

BadImageRule = Literal["replace", "raise"]
Place = tuple[int, int]
"""(epoch, sample id)."""


class Unusable(NamedTuple):
    """An image that could not be used, and why."""

    sample: int
    """Its id; -1 in a stream, where images have only keys."""
    key: str
    reason: str


class Sample(NamedTuple):
    """One image as the loader's workers make it."""

    image_CHW: Tensor  # noqa: N815  # shape suffix
    label: int
    sample: int
    choices: Choices = NO_CHOICES
    bad: "tuple[Unusable, ...]" = ()


class Batch(NamedTuple):
    """The images of one pass, on the host."""

    image_NCHW: Tensor  # noqa: N815  # shape suffix
    """uint8."""
    label_N: Tensor  # noqa: N815  # shape suffix
    """int64; -1 where there is no image."""
    sample_N: Tensor  # noqa: N815  # shape suffix
    """int64 sample ids; -1 where there is no image."""
    choices: Choices
    """What is left to do to each image on the device, stacked; stays on the host."""
    bad: tuple[Unusable, ...]
    """Images that could not be used, for which neighbours stand in, image and label."""


class Share(NamedTuple):
    """What a loader process is asked for: a batch, its size, and the slot for its pixels."""

    places: list[Place]
    image_px: int | None = None
    """Side of the images; None: the view's own."""
    slot: int | None = None


class _OpenShard:
    """A file that is closed when nobody needs it any more."""

    def __init__(self, file: int) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)

    def read(self, *, offset: int, size: int) -> bytes:
        return os.pread(self._file, size, offset)


class _Columns(NamedTuple):
    """What reading needs of a shard's index: 32 bytes an image."""

    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int32]
    digests: NDArray[np.uint64]
    widths: NDArray[np.int32]
    heights: NDArray[np.int32]


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
        self.shard_store = replace(store, location=shards_location(card, store.location))
        self.view = view
        self.seed = seed
        self.on_bad: BadImageRule = on_bad
        self.shards: Sequence[Shard] = tuple(card.splits[split].shards)
        self.num_classes = len(card.classes)
        self._ends = np.cumsum([shard.images for shard in self.shards])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._read: OrderedDict[int, _Columns] = OrderedDict()

    @property
    def shard_images(self) -> tuple[int, ...]:
        """Images in each shard, for `Order`."""
        return tuple(shard.images for shard in self.shards)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, object]:
        """Open files stay in the process that opened them."""
        return {**self.__dict__, "_open": OrderedDict(), "_read": OrderedDict()}

    def __getitem__(self, place: Place) -> Sample:
        """Read, check, decode and view one image.

        Raises:
            DataError: The shard cannot be read or a label is not a class; with `raise`, a bad
                image; with `replace`, no usable one near it or in the shards that follow.
        """
        return self._make(place, view=self.view)

    def _make(self, place: Place, *, view: View) -> Sample:
        epoch, sample = place
        if sample == PADDING:
            image_px = view.image_px
            blank_CHW = torch.zeros((3, image_px, image_px), dtype=torch.uint8)
            return Sample(blank_CHW, PADDING, PADDING)
        bad: list[Unusable] = []
        for candidate in self._candidates(sample):
            # Keyed by the sample that was asked for: a stand-in does not repeat its own view.
            seed = image_seed(self.seed, epoch=epoch, sample=sample)
            try:
                data, label = self.read(candidate)
                size = self._known_size(candidate)
                image_CHW, choices = view_bytes(data, view=view, seed=seed, key="", size=size)
            except BadImage as error:
                key = self.key(candidate)
                match self.on_bad:
                    case "replace":
                        bad.append(Unusable(candidate, key, error.reason))
                    case "raise":
                        raise DataError(
                            f"{self.store.location}: sample {key}: {error.reason}",
                            hint="see all bad images: convnext data check DIR --deep",
                        ) from error
                    case _:
                        assert_never(self.on_bad)
            else:
                return Sample(image_CHW, label, sample, choices, tuple(bad))
        raise DataError(
            f"{self.store.location}: {len(bad)} samples from {self.key(sample)} on cannot be used: "
            f"{bad[0].reason}",
            hint="see what is wrong: convnext data check DIR --deep",
        )

    def __getitems__(self, share: Share) -> tuple[list[Sample], int | None]:
        """All samples of a batch, and the slot that `_Collate` puts their pixels in."""
        view = self.view if share.image_px is None else replace(self.view, image_px=share.image_px)
        return [self._make(place, view=view) for place in share.places], share.slot

    def _candidates(self, sample: int) -> Iterator[int]:
        """The sample, its neighbours, then one of each shard that follows: its own may be lost."""
        yield sample
        if self.on_bad == "raise":
            return
        for near in range(1, min(_NEIGHBOURS, len(self))):
            yield (sample + near) % len(self)
        number, row = self._locate(sample)
        for after in range(1, min(_SHARDS_AFTER, len(self.shards))):
            other = (number + after) % len(self.shards)
            images = self.shards[other].images
            yield int(self._ends[other]) - images + row % images

    def read(self, sample: int) -> tuple[bytes, int]:
        """The bytes of one image, as they were indexed, and its label.

        Raises:
            BadImage: The bytes are not those that were indexed.
            DataError: The shard cannot be read or the label is not a class.
        """
        number, row = self._locate(sample)
        columns = self._columns(number)
        label, size = int(columns.labels[row]), int(columns.sizes[row])
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"{self.shards[number].name}: sample {self.key(sample)} has label {label}, but the"
                f" data set has {self.num_classes} classes",
                hint="pack the data set again, or repair its labels",
            )
        try:
            data = self._shard(number).read(offset=int(columns.offsets[row]), size=size)
        except OSError as error:
            raise DataError(
                f"{self.shards[number].name}: {error.strerror or error}",
                hint="check the disk, then start the same command again: it goes on",
            ) from error
        if len(data) != size:
            raise BadImage("", "the shard ends inside it")
        if xxh3_64_intdigest(data) != int(columns.digests[row]):
            raise BadImage("", "its bytes are not those that were indexed (xxh3)")
        return data, label

    def key(self, sample: int) -> str:
        """The sample's name, as `shard/key`."""
        return self.names([sample])[0][0]

    def names(self, samples: Sequence[int]) -> list[tuple[str, int]]:
        """Key, as `shard/key`, and label of each sample; reads each index once."""
        indexes: dict[int, ShardIndex] = {}
        found = []
        for sample in samples:
            number, row = self._locate(sample)
            if number not in indexes:
                indexes[number] = self._index(number)
            index = indexes[number]
            name = f"{self.shards[number].name}/{index.key(row)}"
            found.append((name, int(index.labels[row])))
        return found

    def _locate(self, sample: int) -> tuple[int, int]:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        number = int(np.searchsorted(self._ends, sample, side="right"))
        return number, sample - int(self._ends[number]) + self.shards[number].images

    def _index(self, number: int) -> ShardIndex:
        shard = self.shards[number]
        expected = Expected(sha256=shard.index_sha256, version=shard.sha256)
        index = read_index(self.store.path(index_name(shard.name), expected=expected))
        if len(index.labels) != shard.images:
            raise DataError(
                f"{shard.name}: its index has {len(index.labels)} samples, dataset.json says "
                f"{shard.images}",
                hint="pack the data set again",
            )
        return index

    def _known_size(self, sample: int) -> tuple[int, int] | None:
        """Width and height of an image, where its header could be read."""
        number, row = self._locate(sample)
        columns = self._columns(number)
        width, height = int(columns.widths[row]), int(columns.heights[row])
        return (width, height) if width else None

    def _columns(self, number: int) -> _Columns:
        if number in self._read:
            self._read.move_to_end(number)
            return self._read[number]
        index = self._index(number)
        columns = _Columns(
            labels=index.labels,
            offsets=index.image_offset,
            sizes=index.image_bytes.astype(np.int32),
            digests=index.digest,
            widths=index.width,
            heights=index.height,
        )
        self._read[number] = columns
        if len(self._read) > MAX_READ_INDEXES:
            self._read.popitem(last=False)
        return columns

    def _shard(self, number: int) -> _OpenShard:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.shards[number]
        expected = Expected(num_bytes=shard.bytes, sha256=shard.sha256)
        opened = _OpenShard(self.shard_store.open(shard.name, expected=expected))
        self._open[number] = opened
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return opened


class StepSampler(Sampler[Share]):
    """What is asked for each pass: this rank's share of each step, cut into equal passes.

    One iteration is all steps that are left of the run, epoch after epoch, so that loading never
    pauses between epochs.

    Args:
        order: The run's order.
        rank: Local to this rank.
        world: Number of ranks.
        accumulate: Passes (micro-batches) in a step.
        first_step: Steps of the run that are taken already.
        total_steps: Steps of the whole run.
        on_step: Called with each step of the run before its passes are handed out.
        image_px_at: Side of the images of a step of the run, at most the view's; None: the view's.

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
        on_step: Callable[[int], None] | None = None,
        image_px_at: Callable[[int], int] | None = None,
    ) -> None:
        share = len(order.share(0, 0, rank=rank, world=world))
        if share % accumulate:
            raise ValueError(f"{share} images a rank do not divide into {accumulate} passes")
        self.order = order
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.steps = range(first_step, total_steps)
        self.on_step = on_step
        self.image_px_at = image_px_at
        self.batch = share // accumulate

    def __len__(self) -> int:
        """Passes that are left."""
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[Share]:
        for run_step in self.steps:
            if self.on_step is not None:
                self.on_step(run_step)
            image_px = None if self.image_px_at is None else self.image_px_at(run_step)
            epoch, step = self.order.locate(run_step)
            share = self.order.share(epoch, step, rank=self.rank, world=self.world)
            for ids in share.reshape(self.accumulate, -1):
                yield Share([(epoch, int(sample)) for sample in ids], image_px)


class EvaluationSampler(Sampler[Share]):
    """Every image once over all ranks, in equal batches, padded with `PADDING`."""

    def __init__(self, num_images: int, *, rank: int, world: int, batch: int) -> None:
        self.ids = evaluation_share(num_images, rank=rank, world=world, batch=batch)
        self.batch = batch

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Share]:
        for ids in self.ids:
            yield Share([(0, int(sample)) for sample in ids])


class _ShareSampler(Sampler[Share]):
    """The shares of another sampler, each with a slot that is free when it is asked for."""

    def __init__(self, sampler: StepSampler | EvaluationSampler, slots: Slots | None) -> None:
        self._sampler = sampler
        self._slots = slots

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Share]:
        for share in self._sampler:
            yield share._replace(slot=self._slots.take()) if self._slots else share


class _Collate:
    """`collate` for a loader whose batches have slots."""

    def __init__(self, slots: Slots | None) -> None:
        self._slots = slots

    def __call__(self, made: tuple[list[Sample], int | None]) -> Batch:
        samples, slot = made
        if self._slots is None or slot is None:
            return collate(samples)
        parcel = self._slots.fill(slot, [sample.image_CHW.permute(1, 2, 0) for sample in samples])
        # Where the batch arrives the parcel is a tensor.
        return _batch(samples, image_NCHW=cast("Tensor", parcel))


def collate(samples: list[Sample]) -> Batch:
    """Stack samples into a batch; in a worker, straight into shared memory."""
    # Pixel by pixel, as images come from the decoder: copied in one piece.
    image_NHWC = default_collate([sample.image_CHW.permute(1, 2, 0) for sample in samples])
    return _batch(samples, image_NCHW=image_NHWC.permute(0, 3, 1, 2))


def _batch(samples: list[Sample], *, image_NCHW: Tensor) -> Batch:  # shape suffix
    return Batch(
        image_NCHW=image_NCHW,
        label_N=torch.tensor([sample.label for sample in samples]),
        sample_N=torch.tensor([sample.sample for sample in samples]),
        choices=Choices(
            *(np.stack(rows) for rows in zip(*(s.choices for s in samples), strict=True))
        ),
        bad=tuple(chain.from_iterable(sample.bad for sample in samples)),
    )


def _unchanged(batch: Batch) -> Batch:
    return batch


@cache
def _leaving() -> "Synchronized[bool]":
    """Shared with the workers: whether this process is on its way out."""
    leaving = cast("Synchronized[bool]", RawValue(c_bool, False))  # noqa: FBT003  # its start value
    # Exit functions run last in, first out: before the one of multiprocessing, which terminates
    # the workers that are left and waits for them.
    atexit.register(setattr, leaving, "value", True)  # noqa: FBT003
    return leaving


def start_worker(worker: int, *, leaving: "Synchronized[bool]") -> None:
    """Let a worker outlive signals: it ends when the main process tells it to, or is gone.

    Batch systems send theirs to every process of a job, and a worker that died of one would break
    the pass after which the main process writes its checkpoint.
    """
    del worker
    own_global_random()

    def end_with_main(number: int, frame: FrameType | None) -> None:
        del number, frame
        if leaving.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, end_with_main)
    # In C, for a worker that waits for a lock runs no Python; then what the signal does by itself.
    faulthandler.register(TELL_AND_END, file=os.dup(2), chain=True)
    leave_to_main()


def from_worker(error: UserError) -> UserError:
    """The error as it was raised; a loader's worker sends its traceback in place of its message."""
    kind = type(error)
    text, mark, told = str(error).rpartition(f"{kind.__module__}.{kind.__name__}: ")
    if not mark or not text.startswith("Caught "):
        return error
    message, _, hint = told.strip().partition(f"\n{HINT_NOTE}")
    return kind(message, hint=hint or None)


def is_lost_worker(error: BaseException) -> bool:
    """Whether a loader tells that one of its processes was killed."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)


def make_lost_worker_error(error: BaseException, *, when: str, hint: str) -> Hung:
    """What is told of it."""
    crashed = "Segmentation fault" in str(error)
    cause = "" if crashed else ", as the system kills one where memory runs out"
    return Hung(f"a loader process ended unasked {when}{cause} ({error})", hint=hint)


def build_loader(
    dataset: ImageReader | IterableDataset[Batch],
    *,
    sampler: StepSampler | EvaluationSampler | None,
    num_workers: int,
    pin_memory: bool,
    persistent: bool = True,
) -> DataLoader[Batch]:
    """A stock DataLoader over a reader.

    Args:
        dataset: An `ImageReader`, or a stream that yields whole batches.
        sampler: What is asked for; None for a stream.
        num_workers: Processes; 0: everything happens in this one. Each runs one torch thread.
        pin_memory: For a GPU.
        persistent: Keep the workers between epochs.
    """
    slots = None
    if num_workers and sampler is not None and isinstance(dataset, ImageReader):
        # On their way to and from the workers, and as many as a training loop holds.
        slots = Slots(
            slots=num_workers * _PREFETCH + _HELD,
            images=sampler.batch,
            image_px=dataset.view.image_px,
        )
    loader: DataLoader[Batch] = DataLoader(
        dataset,  # type: ignore[arg-type]  # collate turns its samples into batches
        batch_sampler=_ShareSampler(sampler, slots) if sampler else None,  # type: ignore[arg-type]
        batch_size=1 if sampler else None,
        # A stream's batches are left as they are; the default would turn its arrays into tensors.
        collate_fn=_Collate(slots) if sampler else _unchanged,  # type: ignore[arg-type]  # as above
        num_workers=num_workers,
        prefetch_factor=_PREFETCH if num_workers else None,
        pin_memory=pin_memory,
        persistent_workers=persistent and num_workers > 0,
        # Python 3.14's own choice takes seconds and a copy of torch for each process, and torch
        # does not see at once that one is lost.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        worker_init_fn=partial(start_worker, leaving=_leaving()),
        # Its own generator: else every iterator moves the global random state on.
        generator=torch.Generator(),
    )
    return loader
