"""Which sample is used when, and by whom: pure functions of (seed, epoch, step, rank).

```
shards      |aaaaaaaaaaaa|bbbbbbbb|cccccccccccc|...     permuted anew each epoch, then cut into
blocks      |a b c ...               |d e f ...  |      blocks of 16
chunks      |aaaa aaaa aaaa|bbbb bbbb|cccc cccc cccc|   64 neighbours, never across two shards
permuted    |cccc aaaa bbbb cccc aaaa bbbb aaaa cccc|   the chunks of each block
lanes       |cccc aaaa bbbb cccc|aaaa bbbb aaaa cccc|   equal parts, read side by side
windows     | shuffled | shuffled| shuffled | shuffled|  inside each lane
batch       the next `global_images / num_lanes` samples of every lane, in lane order
share       a rank owns whole lanes: an equal, contiguous slice of the batch
```

Lanes lie side by side over all blocks, so a batch is drawn from nearly all shards at once
(`same_shard_rate`), while one lane, and with it the node that owns the lane, sees few of them: of
eight nodes each reads an eighth of the shards in an epoch. Permuting all chunks at once mixes no
better (ImageNet-1K, 4096 images a step: 1.21 times the rate of a uniform shuffle, against 1.22)
and makes every node read every shard.

There is no state: step 3,000 of epoch 7 costs as much as step 0 of epoch 0, so a resume is two
integers. The order does not depend on the number of ranks, loader processes or passes per step.

Every random choice of the data plane but those about one image (`image_seed`) comes from `philox`:
a counter-based generator keyed by the seed and addressed by what the numbers are for, so that two
uses never share a stream and no use depends on how many numbers another one took. Orders use its
raw 64-bit output alone, whose values numpy guarantees for ever, and not numpy's distributions,
which may change between its versions.

`ORDER_VERSION` is written beside a checkpoint: a change of anything here that moves a sample
raises it.
"""

import math
import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, assert_never

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_intdigest

ORDER_VERSION = 2

CHUNK_IMAGES = 64
"""Neighbours that stay together until the window shuffle: one read of a few MB."""

WINDOW_CHUNKS = 16
"""Chunks a lane shuffles at a time. 256 lanes x 16 chunks x 64 images are a pool of 262,144."""

BLOCK_SHARDS = 16
"""Shards whose chunks are permuted together; fewer than 8 mix measurably worse."""

_PIECE = 1 << 20

OrderKind = Literal["full", "window"]
Purpose = Literal[
    "chunks", "window", "permutation", "image", "batch", "stream", "shards", "mix", "noise"
]
_PURPOSES: dict[Purpose, int] = {
    "chunks": 1,
    "window": 2,
    "permutation": 3,
    "image": 4,
    "batch": 5,
    "stream": 6,
    "shards": 8,  # 7 was another purpose once
    "mix": 9,
    "noise": 10,
}

_ADDRESS = struct.Struct("<QQQQ")

Ids = NDArray[np.int64]


def philox(seed: int, *, purpose: Purpose, major: int = 0, minor: int = 0) -> np.random.Philox:
    """The random stream at an address; depends on the arguments alone.

    Args:
        seed: The run's seed, 0 <= seed < 2^64, as the other integers.
        purpose: What the numbers are for; streams of two purposes are independent.
        major: First part of the address, such as the epoch.
        minor: Second part of the address, such as the sample.
    """
    return np.random.Philox(
        key=np.array([seed, major], dtype=np.uint64),
        counter=np.array([0, 0, minor, _PURPOSES[purpose]], dtype=np.uint64),
    )


def image_seed(seed: int, *, epoch: int, sample: int) -> int:
    """A 128-bit seed for the random choices of one image in one epoch, on any rank and worker.

    A hash and not `philox`, which costs more than all that is drawn from it for an image.
    """
    return xxh3_128_intdigest(_ADDRESS.pack(_PURPOSES["image"], seed, epoch, sample))


def mix_rng(seed: int, *, step: int, group: int) -> np.random.Generator:
    """The generator for what a group of images of one step shares, on any rank.

    Args:
        seed: The run's seed.
        step: Optimizer steps already taken in the run, not in the epoch.
        group: Counts through the global batch.
    """
    return np.random.Generator(philox(seed, purpose="mix", major=step, minor=group))


def pass_rng(seed: int, *, step: int, micro: int, rank: int) -> np.random.Generator:
    """The generator for the network's own choices (drop path) in one pass on one rank."""
    return np.random.Generator(
        philox(seed, purpose="batch", major=step, minor=(micro << 32) | rank)
    )


_global_random_is_ours = False


def own_global_random() -> None:
    """In a loader process, where nobody else draws from `random`, leave it as it is."""
    global _global_random_is_ours  # noqa: PLW0603  # it describes the process
    _global_random_is_ours = True


@contextmanager
def seeded_random(seed: int) -> Iterator[None]:
    """Inside, Python's `random` is seeded; after it, as it was.

    timm's crop and augmentations draw from it.
    """
    if _global_random_is_ours:
        random.seed(seed)
        yield
        return
    before = random.getstate()
    try:
        random.seed(seed)
        yield
    finally:
        random.setstate(before)


def _shuffled(count: int, stream: np.random.Philox) -> Ids:
    """A permutation of range(count) from raw bits alone.

    Each number is sorted by random bits above its own: no two keys are equal, so every sorting
    algorithm gives the same, and the fastest may be used, in place.
    """
    bits = np.uint64((count - 1).bit_length())
    keys = np.asarray(stream.random_raw(count), dtype=np.uint64)
    keys >>= bits
    keys <<= bits
    for start in range(0, count, _PIECE):
        stop = min(count, start + _PIECE)
        keys[start:stop] |= np.arange(start, stop, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    return keys.view(np.int64)


@lru_cache(maxsize=4)
def _permuted_chunks(shard_images: tuple[int, ...], seed: int, epoch: int) -> tuple[Ids, Ids]:
    """First samples of all chunks in the epoch's order, and the positions where each begins."""
    images = np.array(shard_images, dtype=np.int64)
    shard_begins = np.cumsum(images) - images
    chunks = -(-images // CHUNK_IMAGES)
    shard = np.repeat(np.arange(len(images)), chunks)
    within = np.arange(len(shard)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
    starts = shard_begins[shard] + within * CHUNK_IMAGES
    lengths = np.minimum(CHUNK_IMAGES, images[shard] - within * CHUNK_IMAGES)
    place = np.empty_like(images)
    place[_shuffled(len(images), philox(seed, purpose="shards", major=epoch))] = np.arange(
        len(images)
    )
    raw = np.asarray(
        philox(seed, purpose="chunks", major=epoch).random_raw(len(shard)), dtype=np.uint64
    )
    chosen = np.lexsort((raw, place[shard] // BLOCK_SHARDS))
    return starts[chosen], np.cumsum(lengths[chosen]) - lengths[chosen]


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64 | np.uint32]:
    shuffled = _shuffled(count, philox(seed, purpose="permutation", major=epoch))
    return shuffled.astype(np.uint32) if count < 1 << 32 else shuffled


@lru_cache(maxsize=1024)
def _shuffled_window(seed: int, epoch: int, lane: int, window: int, size: int) -> Ids:
    minor = (lane << 32) | window
    return _shuffled(size, philox(seed, purpose="window", major=epoch, minor=minor))


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


class Skip(NamedTuple):
    """Images that a run left out after it went back to an older checkpoint."""

    step: int
    """From this step of the run on ..."""
    length: int
    """... it takes the images of this many steps later."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a whole training run; the same object on every rank.

    Sample ids count through the shards: shard 0 holds 0 .. shard_images[0] - 1, and so on.

    Raises:
        ValueError: Fewer images than a global batch, or a number below 1.
    """

    shard_images: tuple[int, ...]
    """Images in each shard; only `window` cares where shards begin."""

    seed: int

    global_images: int
    """Images per optimizer step over all ranks."""

    lanes: int = 256
    """The most lanes; a global batch that is not a multiple of it uses fewer (`num_lanes`)."""

    kind: OrderKind = "window"
    """full: one permutation an epoch, for local disks. window: as drawn in the module."""

    skips: tuple[Skip, ...] = ()

    def __post_init__(self) -> None:
        if self.global_images < 1 or self.lanes < 1 or self.seed < 0:
            raise ValueError(
                f"global_images={self.global_images} and lanes={self.lanes} must be at least 1, "
                f"seed={self.seed} at least 0"
            )
        if self.num_images < self.global_images:
            raise ValueError(
                f"{self.num_images} training images are fewer than one global batch of "
                f"{self.global_images}: no step could be taken"
            )

    @cached_property
    def num_images(self) -> int:
        """Images of the data set."""
        return sum(self.shard_images)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; the rest waits, other samples each epoch."""
        return self.num_images // self.global_images

    @property
    def dropped_images(self) -> int:
        """Images that an epoch leaves out because they fill no global batch."""
        return self.num_images % self.global_images

    @cached_property
    def num_lanes(self) -> int:
        """Lanes in use: a divisor of the global batch, not above `lanes`.

        The one that most world sizes divide, of those the largest: 256 for 4096 images, 64 for 64,
        200 for 1000.
        """
        fitting = [d for d in divisors(self.global_images) if d <= self.lanes]
        return max(fitting, key=lambda lanes: (len(divisors(lanes)), lanes))

    @cached_property
    def worlds(self) -> list[int]:
        """World sizes that can share the batches, ascending."""
        match self.kind:
            case "window":
                return divisors(self.num_lanes)
            case "full":
                return divisors(self.global_images)
            case _:
                assert_never(self.kind)

    def locate(self, run_step: int) -> tuple[int, int]:
        """Epoch, and step in it, whose images a step of the run takes; past `skips`."""
        skipped = sum(skip.length for skip in self.skips if skip.step <= run_step)
        return divmod(run_step + skipped, self.steps_per_epoch)

    def batch(self, epoch: int, step: int) -> Ids:
        """Sample ids of one global batch, shape (global_images,); the same on every rank.

        Args:
            epoch: Counts from 0.
            step: Step within the epoch, 0 <= step < steps_per_epoch.
        """
        return self._slice(epoch, step, first=0, count=self.global_images)

    def check_world(self, world: int) -> None:
        """Make sure that so many ranks can share the batches.

        Raises:
            ValueError: `world` does not divide the batch (window: the lanes); names those that do.
        """
        if world not in self.worlds:
            raise ValueError(
                f"a world of {world} cannot share global batches of {self.global_images} "
                f"images in {self.num_lanes} lanes; world sizes that can: "
                f"{', '.join(map(str, self.worlds))}"
            )

    def share(self, epoch: int, step: int, *, rank: int, world: int) -> Ids:
        """Sample ids of one rank in one global batch, shape (global_images / world,).

        The shares of all ranks, one after the other, are the batch.

        Raises:
            ValueError: What `check_world` refuses, or there is no such rank.
        """
        self.check_world(world)
        if not 0 <= rank < world:
            ranks = f"0 to {world - 1}" if world > 1 else "0 alone"
            raise ValueError(
                f"there is no rank {rank} in a world of {world}: ranks count from 0, here {ranks}"
            )
        count = self.global_images // world
        return self._slice(epoch, step, first=rank * count, count=count)

    def _slice(self, epoch: int, step: int, *, first: int, count: int) -> Ids:
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise ValueError(
                f"step {step} of epoch {epoch}: epochs have {self.steps_per_epoch} steps"
            )
        match self.kind:
            case "full":
                at = step * self.global_images + first
                ids = _permutation(self.num_images, self.seed, epoch)[at : at + count]
                return ids.astype(np.int64)
            case "window":
                lane_step = self.global_images // self.num_lanes
                lanes = range(first // lane_step, (first + count) // lane_step)
                positions = [self._lane_positions(epoch, step, lane=lane) for lane in lanes]
                return self._ids_at(epoch, np.concatenate(positions))
            case _:
                assert_never(self.kind)

    def _lane_positions(self, epoch: int, step: int, *, lane: int) -> Ids:
        """Places in the permuted sequence that a lane gives to a step."""
        lane_step = self.global_images // self.num_lanes
        lane_images = self.steps_per_epoch * lane_step
        window_images = CHUNK_IMAGES * WINDOW_CHUNKS
        wanted = range(step * lane_step, (step + 1) * lane_step)
        parts = []
        for window in range(wanted.start // window_images, (wanted.stop - 1) // window_images + 1):
            start = window * window_images
            size = min(window_images, lane_images - start)
            shuffled = _shuffled_window(self.seed, epoch, lane, window, size)
            inside = shuffled[max(0, wanted.start - start) : wanted.stop - start]
            parts.append(inside + (lane * lane_images + start))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _ids_at(self, epoch: int, positions: Ids) -> Ids:
        first_ids, begins = _permuted_chunks(self.shard_images, self.seed, epoch)
        chunk = np.searchsorted(begins, positions, side="right") - 1
        ids: Ids = first_ids[chunk] + (positions - begins[chunk])
        return ids


def same_shard_rate(order: Order, *, epoch: int, steps: Sequence[int]) -> float:
    """How often two images of a batch share a shard, against a uniform shuffle (1.0).

    What it measures matters where shards are sorted, by class or by place: a stream that fills a
    buffer from a few shards at a time has 12 to 66 in its place.
    """
    ends = np.cumsum(order.shard_images)
    pairs = order.global_images * (order.global_images - 1)
    images = np.array(order.shard_images, dtype=np.float64)
    uniform = float((images * (images - 1)).sum()) / (order.num_images * (order.num_images - 1))
    if not pairs or not uniform:
        return 1.0
    rates = []
    for step in steps:
        shard = np.searchsorted(ends, order.batch(epoch, step), side="right")
        counts = np.bincount(shard)
        rates.append(float((counts * (counts - 1)).sum()) / pairs)
    return float(np.mean(rates)) / uniform


def evaluation_share(num_images: int, *, rank: int, world: int, batch: int) -> Ids:
    """Sample ids that one rank evaluates, shape (num_batches, batch), padded with -1.

    Every rank has the same number of equal batches, and every image is in exactly one of them.

    Args:
        num_images: Images of the split.
        rank: 0 <= rank < world.
        world: Number of ranks.
        batch: Images per pass on each rank.
    """
    if num_images < 1 or batch < 1 or not 0 <= rank < world:
        raise ValueError(f"{num_images} images, rank {rank} of {world}, batch {batch}")
    per_rank = -(-num_images // world)
    num_batches = -(-per_rank // batch)
    ids = np.full(num_batches * batch, -1, dtype=np.int64)
    own = np.arange(rank * per_rank, min((rank + 1) * per_rank, num_images), dtype=np.int64)
    ids[: len(own)] = own
    return ids.reshape(num_batches, batch)
