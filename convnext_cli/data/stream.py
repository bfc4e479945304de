"""Plain WebDataset streaming, for shards that have no index.

```
shard URLs --shuffle--> split by rank, then worker --> tar members --> samples
           --shuffle buffer--> decode --> view --> Batch
```

The promise is weaker than the indexed reader's:

- the order depends on the number of ranks and workers, and shuffling reaches no further than the
  buffer of a worker;
- a rank that runs out of its shards reads them again, so that all ranks take the same number of
  steps: in an epoch some images may come twice and some not at all;
- a resume starts at the beginning of an epoch, and knows its shards by their names alone;
- in evaluation a rank that is through with its shards pads until all are;
- damage inside a shard is noticed only where the tar format shows it.

What stays: shard order and random choices change every epoch and follow from the seed; nothing is
unpickled and only images and class numbers are read; a bad image is left out in training and named
with the one that takes its place, and is fatal in evaluation.
"""

import random
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Any

import fsspec
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle as shuffle_buffer
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from convnext_cli.data.augment import View, view_bytes
from convnext_cli.data.header import BadImage
from convnext_cli.data.index import IMAGE_EXTENSIONS
from convnext_cli.data.order import image_seed, philox
from convnext_cli.data.reader import PADDING, Batch, Sample, Unusable, collate
from convnext_cli.errors import DataError

LABEL_EXTENSION = "cls"

WEAKER_PROMISE = (
    "data.mode=stream: the order depends on devices and workers, an epoch may repeat or miss"
    " images, and a resume begins its epoch again; convnext data index makes the same shards exact"
)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What is streamed, to whom, in which batches."""

    urls: str | Sequence[str]
    """Shards: paths or URLs, with braces such as `train-{000..127}.tar`; or a list of them."""

    num_classes: int

    batch: int
    """Images per pass on each rank."""

    num_batches: int | None
    """Passes of each rank in an epoch, going round its shards as often as needed; None: every
    image of the rank's shards once, the last batch padded (evaluation)."""

    seed: int

    rank: int = 0

    world: int = 1

    shuffle_images: int = 5000
    """Size of each worker's shuffle buffer; 0: the order of the shards (evaluation)."""

    allow_pipe: bool = False
    """Allow `pipe:` URLs, which run a shell command."""


class StreamReader(IterableDataset[Batch]):
    """Batches from unindexed shards; build its loader without a sampler.

    Raises:
        DataError: No shards, fewer than ranks, or a `pipe:` URL without leave.
    """

    def __init__(self, stream: Stream, *, view: View) -> None:
        super().__init__()
        self.stream = stream
        self.view = view
        self.urls = list_shards(stream.urls, allow_pipe=stream.allow_pipe)
        if len(self.urls) < stream.world:
            raise DataError(
                f"{stream.urls}: {len(self.urls)} shards cannot be split over {stream.world} ranks",
                hint="use as many shards as ranks or more, or index the data set",
            )
        # Shared memory, because workers that stay alive have a copy of this object.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # torch leaves it so

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration reads; reaches workers that are running."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        if self.stream.num_batches is None:
            raise TypeError("the length of an unindexed stream is not known")
        return self.stream.num_batches

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch = int(self._epoch)
        samples = self._samples(epoch, worker=number, num_workers=num_workers)
        # The loader takes batches from the workers in turn.
        if self.stream.num_batches is None:
            yield from self._padded(samples)
            return
        own_batches = len(range(number, self.stream.num_batches, num_workers))
        for _ in range(own_batches):
            yield collate([next(samples) for _ in range(self.stream.batch)])

    def _padded(self, samples: Iterator[Sample]) -> Iterator[Batch]:
        waiting: list[Sample] = []
        for sample in samples:
            waiting.append(sample)
            if len(waiting) == self.stream.batch:
                yield collate(waiting)
                waiting = []
        if waiting:
            yield self._pad(waiting)

    def make_padding(self) -> Batch:
        """A batch without an image, for a rank that is through with its shards."""
        return self._pad([])

    def _pad(self, samples: list[Sample]) -> Batch:
        px = self.view.image_px
        padding = Sample(torch.zeros((3, px, px), dtype=torch.uint8), PADDING, PADDING)
        return collate(samples + [padding] * (self.stream.batch - len(samples)))

    def _samples(self, epoch: int, *, worker: int, num_workers: int) -> Iterator[Sample]:
        """Decoded samples of one worker; endless in training."""
        stream = self.stream
        urls = list(self.urls)
        training = stream.num_batches is not None
        if training:
            # Before the split, so that ranks and workers see other shards each epoch.
            seed = int(philox(stream.seed, purpose="stream", major=epoch).random_raw())
            random.Random(seed).shuffle(urls)
        own = urls[stream.rank :: stream.world]
        own = own[worker % len(own) :: num_workers] if training else own[worker::num_workers]
        bad: list[Unusable] = []
        for lap in range(1 << 62 if training else 1):
            address = (lap << 48) | (stream.rank << 24) | (worker + 1)
            raw = philox(stream.seed, purpose="stream", major=epoch, minor=address)
            members = iter_samples(own)
            if stream.shuffle_images and training:
                rng = random.Random(int(raw.random_raw()))
                initial = min(stream.shuffle_images, 1000)
                members = shuffle_buffer(stream.shuffle_images, initial=initial, rng=rng)(members)
            used = False
            for member in members:
                try:
                    sample = self._sample(member, epoch=epoch, lap=lap)
                except BadImage as error:
                    name = f"{member['__url__']}/{error.key}"
                    if not training:
                        raise DataError(
                            f"sample {name}: {error.reason}",
                            hint="repair the shard, or leave the image out of it",
                        ) from error
                    bad.append(Unusable(PADDING, name, error.reason))
                else:
                    used = True
                    yield sample._replace(bad=tuple(bad))
                    bad = []
            if training and not used:  # nor would they be in another lap
                why = "no samples with an image and a .cls"
                if bad:
                    why = f"no sample can be used, such as {bad[0].key}: {bad[0].reason}"
                raise DataError(f"{', '.join(own[:3])}: {why}", hint="look inside: tar tf SHARD")

    def _sample(self, member: dict[str, Any], *, epoch: int, lap: int) -> Sample:
        key = str(member["__key__"])
        data = next((member[ext] for ext in IMAGE_EXTENSIONS if ext in member), None)
        if data is None or LABEL_EXTENSION not in member:
            raise BadImage(key, "no image" if data is None else "no .cls")
        number = _number(f"{member['__url__']}/{key}")
        label = _label(member[LABEL_EXTENSION], key=key, num_classes=self.stream.num_classes)
        # A second lap over the shards counts as another epoch: other crops.
        seed = image_seed(self.stream.seed, epoch=(lap << 32) | epoch, sample=number)
        image_CHW, choices = view_bytes(data, view=self.view, seed=seed, key=key)
        return Sample(image_CHW, label, number, choices)


def list_shards(urls: str | Sequence[str], *, allow_pipe: bool) -> list[str]:
    """Expand braces; every shard once, in order.

    Raises:
        DataError: None are named, or a `pipe:` URL without leave.
    """
    given = [urls] if isinstance(urls, str) else list(urls)
    shards = [shard for url in given for shard in expand_urls(url)]
    if not shards:
        raise DataError("no shards are named", hint="such as data.path=shards/{000..127}.tar")
    pipes = [shard for shard in shards if shard.startswith("pipe:")]
    if pipes and not allow_pipe:
        raise DataError(
            f"{pipes[0]}: a pipe: URL runs a shell command",
            hint="if you trust it: data.allow_pipe=true",
        )
    return shards


def iter_samples(urls: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Samples of shards as {extension: bytes}, images and class numbers only.

    Raises:
        DataError: A shard cannot be opened or is no tar file.
    """
    for url in urls:
        try:
            with closing(_open(url)) as source:
                members = tar_file_expander(
                    iter([{"url": url, "stream": source}]), select_files=_is_wanted
                )
                yield from group_by_keys(members)
        except (OSError, tarfile.TarError, ValueError, ImportError) as error:
            reason = str(error.args[0]) if error.args else type(error).__name__
            raise DataError(f"{url}: {reason}", hint="check the shard: tar tf SHARD") from error


def _open(url: str) -> Any:  # noqa: ANN401  # a binary file of whatever library
    if url.startswith("pipe:"):
        return gopen(url)
    return fsspec.open(url, "rb").open()


def _is_wanted(name: str) -> bool:
    extension = PurePosixPath(name).name.partition(".")[2].lower()
    return extension in IMAGE_EXTENSIONS or extension == LABEL_EXTENSION


def _number(name: str) -> int:
    """A 63-bit number for a sample that has only a name, which may be bytes that are no UTF-8."""
    digest = blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _label(data: bytes, *, key: str, num_classes: int) -> int:
    try:
        label = int(data.decode("ascii").strip())
    except ValueError as error:
        raise DataError(
            f"sample {key}: its .cls holds {data[:20]!r}, not a number",
            hint="a .cls file holds the class's number as text; pack the data set again",
        ) from error
    if not 0 <= label < num_classes:
        raise DataError(
            f"sample {key}: label {label}, but the model has {num_classes} classes",
            hint=f"model.num_classes={label + 1} or more",
        )
    return label
