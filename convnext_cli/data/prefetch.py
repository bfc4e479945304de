"""Shards fetched ahead of the order, by one process of each node.

```
the training process --advance(step)--> shared number
this process         walks the steps ahead: which shards do this node's ranks need next?
                     --Store.path, a few at a time--> the node's cache
```

It only warms the cache. A loader process that needs a shard before it is there fetches it by
itself, or waits for the one that is fetching; so a failure here is no failure of the run, and
neither is the end of this process. It ends with the process that started it.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_longlong
from multiprocessing.sharedctypes import RawValue

import numpy as np

from convnext_cli.data.card import Shard
from convnext_cli.data.fetch import Expected, Store
from convnext_cli.data.order import Order
from convnext_cli.errors import UserError
from convnext_cli.runs.interrupt import leave_to_main

AHEAD_FRAC = 0.8
"""Share of a limited cache that may be fetched ahead: what is in use must stay."""
_THREADS = 4
_LOOK_SECONDS = 0.2
_PAUSE_SECONDS = 10.0


class Prefetcher:
    """The process that fetches ahead; build it in one process of each node.

    Args:
        store: Where the shards are, with its cache.
        shards: Of the training split, in its order.
        order: The run's order.
        ranks: Those of this node.
        world: Number of ranks.
        first_step: Steps of the run that are taken already.
        total_steps: Steps of the whole run.
    """

    def __init__(
        self,
        store: Store,
        *,
        shards: Sequence[Shard],
        order: Order,
        ranks: range,
        world: int,
        first_step: int,
        total_steps: int,
    ) -> None:
        self._step = RawValue(c_longlong, first_step)
        # A process of its own, not a fork: this one may hold a device and many threads.
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(
            target=_fetch_ahead,
            args=(store, tuple(shards), order, ranks, world, total_steps, self._step, os.getpid()),
            name="convnext-prefetch",
            daemon=True,
        )
        self.process.start()

    def advance(self, step: int) -> None:
        """Tell the newest step of the run that is being loaded."""
        self._step.value = step

    def close(self) -> None:
        """End the process; what it was fetching goes on from its part next time."""
        self.process.terminate()
        self.process.join()


def iter_needed(
    order: Order, *, ranks: range, world: int, first_step: int, total_steps: int
) -> Iterator[tuple[int, int]]:
    """(step, shard) in the order in which the ranks need shards; no shard twice in an epoch."""
    ends = np.cumsum(order.shard_images)
    seen: set[int] = set()
    epoch = -1
    for step in range(first_step, total_steps):
        in_epoch = order.locate(step)
        if in_epoch[0] != epoch:
            epoch, seen = in_epoch[0], set()
        shares = [order.share(*in_epoch, rank=rank, world=world) for rank in ranks]
        needed = np.unique(np.searchsorted(ends, np.concatenate(shares), side="right"))
        for shard in needed.tolist():
            if shard not in seen:
                seen.add(shard)
                yield step, shard


def _fetch_ahead(
    store: Store,
    shards: tuple[Shard, ...],
    order: Order,
    ranks: range,
    world: int,
    total_steps: int,
    step: "c_longlong",
    parent: int,
) -> None:
    leave_to_main()
    budget = None if store.cache_bytes is None else int(store.cache_bytes * AHEAD_FRAC)
    needed = iter_needed(
        order, ranks=ranks, world=world, first_step=step.value, total_steps=total_steps
    )
    places = threading.Semaphore(_THREADS)
    ahead: list[tuple[int, int]] = []  # (step, bytes) of what is fetched and not yet used up
    with ThreadPoolExecutor(_THREADS) as threads:
        for wanted_at, number in needed:
            size = shards[number].bytes
            while True:
                if os.getppid() != parent:
                    os._exit(0)
                ahead = [(at, held) for at, held in ahead if at >= step.value]
                over = budget is not None and sum(held for _, held in ahead) + size > budget
                if over:
                    time.sleep(_LOOK_SECONDS)
                elif places.acquire(timeout=_LOOK_SECONDS):
                    break
            ahead.append((wanted_at, size))
            threads.submit(_warm, store, shards[number], places)
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
    os._exit(0)


def _warm(store: Store, shard: Shard, places: threading.Semaphore) -> None:
    """Fetch one shard; what cannot be fetched now is left to whoever needs it."""
    try:
        store.path(shard.name, expected=Expected(num_bytes=shard.bytes, sha256=shard.sha256))
    except UserError:
        # Whoever needs the shard tells the user; asked again at once, a server would not recover.
        time.sleep(_PAUSE_SECONDS)
    finally:
        places.release()
