"""What the order of a large data set costs, and how well it mixes."""

import time
import tracemalloc
from dataclasses import dataclass

import numpy as np

from convnext_cli.data.order import Order, OrderKind, same_shard_rate


@dataclass(frozen=True)
class OrderReport:
    """What planning any step of a run costs one rank."""

    images: int
    shards: int
    global_images: int
    kind: OrderKind
    lanes: int
    world: int
    steps_per_epoch: int
    first_seconds: float
    """The share of a step in the middle of a later epoch, with nothing known before."""
    next_seconds: float
    """The share of the step after it."""
    peak_mib: float
    """Memory that both took at most."""
    same_shard_rate: float
    """Pairs of a batch from the same shard, against a uniform shuffle."""
    node_shards: int
    """Shards that one of eight nodes reads in an epoch, estimated from 64 steps."""


def measure_order(
    *, images: int, shards: int, global_images: int, kind: OrderKind, lanes: int, world: int
) -> OrderReport:
    """Time the order of a data set of that size; the data set itself is not needed."""
    sizes = np.full(shards, images // shards)
    sizes[: images % shards] += 1
    tracemalloc.start()
    begin = time.perf_counter()
    order = Order(
        shard_images=tuple(sizes.tolist()),
        seed=0,
        global_images=global_images,
        lanes=lanes,
        kind=kind,
    )
    middle = order.steps_per_epoch // 2
    order.share(7, middle, rank=world - 1, world=world)
    first = time.perf_counter() - begin
    order.share(7, middle + 1, rank=world - 1, world=world)
    both = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    steps = np.linspace(0, order.steps_per_epoch - 1, 64).astype(int).tolist()
    ends = np.cumsum(sizes)
    seen = [
        np.searchsorted(ends, order.batch(7, step)[: global_images // 8], side="right")
        for step in steps
    ]
    return OrderReport(
        images=images,
        shards=shards,
        global_images=global_images,
        kind=kind,
        lanes=order.num_lanes,
        world=world,
        steps_per_epoch=order.steps_per_epoch,
        first_seconds=first,
        next_seconds=both - first,
        peak_mib=peak / 2**20,
        same_shard_rate=same_shard_rate(order, epoch=7, steps=steps[::8]),
        node_shards=len(np.unique(np.concatenate(seen))),
    )
