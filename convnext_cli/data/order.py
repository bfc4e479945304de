"""Which sample is used when, and by whom: pure functions of (seed, epoch, step, rank).

```
shards      |aaaaaaaaaaaa|bbbbbbbb|cccccccccccc|        samples in the order of the data set
chunks      |aaaa aaaa aaaa|bbbb bbbb|cccc cccc cccc|   neighbours, never across two shards
permuted    |cccc aaaa bbbb cccc aaaa bbbb aaaa cccc|   a new permutation each epoch
lanes       |cccc aaaa bbbb cccc|aaaa bbbb aaaa cccc|   equal parts, read side by side
windows     | shuffled | shuffled| shuffled | shuffled|  inside each lane
batch       the next `global_images / num_lanes` samples of every lane, in lane order
share       a rank owns whole lanes: an equal, contiguous slice of the batch
```

There is no state: step 3,000 of epoch 7 costs as much as step 0 of epoch 0, so a resume is two
integers. The order does not depend on the number of ranks, loader processes or passes per step.

Every random choice of the data plane comes from `philox`: a counter-based generator keyed by the
seed and addressed by what the numbers are for, so that two uses never share a stream and no use
depends on how many numbers another one took. Orders use its raw 64-bit output alone, whose values
numpy guarantees for ever, and not numpy's distributions, which may change between its versions.

`ORDER_VERSION` is written beside a checkpoint: a change of anything here that moves a sample
raises it.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, assert_never

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 1

CHUNK_IMAGES = 64
"""Neighbours that stay together until the window shuffle: one read of a few MB."""

WINDOW_CHUNKS = 16
"""Chunks a lane shuffles at a time. 256 lanes x 16 chunks x 64 images are a pool of 262,144."""

OrderKind = Literal["full", "window"]
Purpose = Literal["chunks", "window", "permutation", "image", "batch", "stream", "init"]
_PURPOSES: dict[Purpose, int] = {
    "chunks": 1,
    "window": 2,
    "permutation": 3,
    "image": 4,
    "batch": 5,
    "stream": 6,
    "init": 7,
}

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


def image_rng(seed: int, *, epoch: int, sample: int) -> np.random.Philox:
    """The stream for the random choices of one image in one epoch, on any rank and worker."""
    return philox(seed, purpose="image", major=epoch, minor=sample)


def batch_rng(seed: int, *, step: int, micro: int = 0, rank: int = 0) -> np.random.Generator:
    """The generator for the random choices of one pass (micro-batch) of one step on one rank.

    Args:
        seed: The run's seed.
        step: Optimizer steps already taken in the run, not in the epoch.
        micro: Pass within the step.
        rank: Local to this rank; leave out for choices that all ranks share.
    """
    return np.random.Generator(
        philox(seed, purpose="batch", major=step, minor=(micro << 32) | rank)
    )


def _shuffled(count: int, stream: np.random.Philox) -> Ids:
    """A permutation of range(count) from raw bits alone."""
    raw = np.asarray(stream.random_raw(count), dtype=np.uint64)
    # "stable" decides ties by position: the same on every CPU, unlike the vectorised quicksort.
    return np.argsort(raw, kind="stable")


@lru_cache(maxsize=4)
def _permuted_chunks(shard_images: tuple[int, ...], seed: int, epoch: int) -> tuple[Ids, Ids]:
    """First samples of all chunks in the epoch's order, and the positions where each begins."""
    first = np.concatenate(([0], np.cumsum(shard_images)[:-1])).astype(np.int64)
    starts = np.concatenate(
        [np.arange(f, f + n, CHUNK_IMAGES) for f, n in zip(first, shard_images, strict=True)]
    ).astype(np.int64)
    ends = np.concatenate(
        [
            np.minimum(np.arange(f, f + n, CHUNK_IMAGES) + CHUNK_IMAGES, f + n)
            for f, n in zip(first, shard_images, strict=True)
        ]
    ).astype(np.int64)
    chosen = _shuffled(len(starts), philox(seed, purpose="chunks", major=epoch))
    lengths = (ends - starts)[chosen]
    return starts[chosen], np.cumsum(lengths) - lengths


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Ids:
    return _shuffled(count, philox(seed, purpose="permutation", major=epoch))


@lru_cache(maxsize=1024)
def _shuffled_window(seed: int, epoch: int, lane: int, window: int, size: int) -> Ids:
    minor = (lane << 32) | window
    return _shuffled(size, philox(seed, purpose="window", major=epoch, minor=minor))


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


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

    def batch(self, epoch: int, step: int) -> Ids:
        """Sample ids of one global batch, shape (global_images,); the same on every rank.

        Args:
            epoch: Counts from 0.
            step: Step within the epoch, 0 <= step < steps_per_epoch.
        """
        return self._slice(epoch, step, first=0, count=self.global_images)

    def share(self, epoch: int, step: int, *, rank: int, world: int) -> Ids:
        """Sample ids of one rank in one global batch, shape (global_images / world,).

        The shares of all ranks, one after the other, are the batch.

        Raises:
            ValueError: `world` does not divide the batch (window: the lanes); names those that do.
        """
        if world not in self.worlds or not 0 <= rank < world:
            raise ValueError(
                f"rank {rank} of {world} cannot share global batches of {self.global_images} "
                f"images in {self.num_lanes} lanes; world sizes that can: "
                f"{', '.join(map(str, self.worlds))}"
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
                return _permutation(self.num_images, self.seed, epoch)[at : at + count].copy()
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
