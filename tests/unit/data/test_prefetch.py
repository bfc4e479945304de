"""Fetching ahead of the order, in a process of its own."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from convnext_cli.data.card import Shard
from convnext_cli.data.fetch import Store
from convnext_cli.data.order import Order
from convnext_cli.data.prefetch import Prefetcher, iter_needed

IMAGES = (40,) * 12


def order_of(kind="window") -> Order:
    return Order(shard_images=IMAGES, seed=1, global_images=16, lanes=8, kind=kind)


def needed_of(order, *, ranks=range(1), world=1, first=0, total=60) -> list[tuple[int, int]]:
    return list(iter_needed(order, ranks=ranks, world=world, first_step=first, total_steps=total))


def test_a_shard_is_named_before_the_step_that_reads_it_and_once_an_epoch():
    order = order_of()
    ends = np.cumsum(IMAGES)

    needed = needed_of(order)

    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        of_epoch = [(at, shard) for at, shard in needed if at in steps]
        assert sorted(shard for _, shard in of_epoch) == list(range(12))
        for step in steps:
            ids = order.batch(epoch, step - steps[0])
            read = set(np.searchsorted(ends, ids, side="right").tolist())
            assert read <= {shard for at, shard in of_epoch if at <= step}


def test_a_node_fetches_only_what_its_ranks_read():
    order = Order(shard_images=(64,) * 64, seed=1, global_images=64, lanes=64, kind="window")

    first = {shard for _, shard in needed_of(order, ranks=range(8), world=64, total=64)}
    every = {shard for _, shard in needed_of(order, ranks=range(64), world=64, total=64)}

    assert len(every) == 64
    assert len(first) <= 32


def test_a_start_in_the_middle_fetches_what_is_left():
    order = order_of()

    assert needed_of(order, first=20)[0][0] == 20


def remote_shards(faulty_server) -> list[Shard]:
    shards = []
    for number in range(len(IMAGES)):
        data = bytes([number]) * 5000
        faulty_server.files[f"{number}.tar"] = data
        digest = hashlib.sha256(data).hexdigest()
        shards.append(Shard(name=f"{number}.tar", images=40, bytes=5000, sha256=digest))
    return shards


def start(faulty_server, tmp_path, *, total=30, **changes) -> Prefetcher:
    store = Store(location=faulty_server.url, cache_dir=tmp_path / "cache", **changes)
    shards = remote_shards(faulty_server)
    return Prefetcher(
        store,
        shards=shards,
        order=order_of(),
        ranks=range(1),
        world=1,
        first_step=0,
        total_steps=total,
    )


def whole_files(tmp_path) -> list:
    folder = tmp_path / "cache"
    return list(folder.glob("*.tar")) if folder.exists() else []


def wait_until(condition) -> None:
    until = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_shards_are_there_before_anybody_asks(faulty_server, tmp_path):
    prefetcher = start(faulty_server, tmp_path)

    wait_until(lambda: len(whole_files(tmp_path)) == 12)
    prefetcher.close()

    assert not prefetcher.process.is_alive()


def test_a_limited_cache_is_not_filled_further_than_it_can_hold(faulty_server, tmp_path):
    prefetcher = start(faulty_server, tmp_path, cache_bytes=20_000)
    wait_until(lambda: len(whole_files(tmp_path)) == 3)
    time.sleep(1)
    waiting = len(whole_files(tmp_path))

    prefetcher.advance(29)
    wait_until(lambda: len(faulty_server.gets) > 3)
    prefetcher.close()

    assert waiting == 3  # 80% of the cache


def test_a_shard_that_cannot_be_had_does_not_hold_up_the_others(faulty_server, tmp_path):
    faulty_server.always["4.tar"] = "403"

    prefetcher = start(faulty_server, tmp_path)

    wait_until(lambda: len(whole_files(tmp_path)) == 11)
    assert prefetcher.process.is_alive()
    prefetcher.close()


PARENT = """
import sys, time
from convnext_cli.data.card import Shard
from convnext_cli.data.fetch import Path, Store
from convnext_cli.data.order import Order
from convnext_cli.data.prefetch import Prefetcher

if __name__ == "__main__":
    prefetcher = Prefetcher(
        Store(location=sys.argv[1], cache_dir=Path(sys.argv[2]), attempts=1000),
        shards=[Shard(name="0.tar", images=40, bytes=5000, sha256="0" * 64)],
        order=Order(shard_images=(40,), seed=1, global_images=16),
        ranks=range(1), world=1, first_step=0, total_steps=30,
    )
    print(prefetcher.process.pid, flush=True)
    time.sleep(60)
"""


def test_the_process_ends_with_the_one_that_started_it(faulty_server, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, script, faulty_server.url, tmp_path / "cache"],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())

    parent.send_signal(signal.SIGKILL)
    parent.wait()

    def is_gone() -> bool:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return True
        with Path(f"/proc/{child}/stat").open() as status:
            return status.read().split(") ")[1][0] == "Z"

    wait_until(is_gone)
    parent.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_the_signals_of_a_batch_system_do_not_end_it(faulty_server, tmp_path, number):
    prefetcher = start(faulty_server, tmp_path)
    wait_until(lambda: whole_files(tmp_path))

    os.kill(prefetcher.process.pid, number)

    wait_until(lambda: len(whole_files(tmp_path)) == 12)
    prefetcher.close()
