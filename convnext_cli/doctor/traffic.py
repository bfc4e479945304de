"""What moves between nodes and from storage: a measured all-reduce, and images that are read."""

import os
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from convnext_cli.data.augment import EvalView
from convnext_cli.data.card import read_card
from convnext_cli.data.decode import decode_rgb
from convnext_cli.data.fetch import Store
from convnext_cli.data.header import BadImage
from convnext_cli.data.reader import ImageReader
from convnext_cli.doctor.findings import Finding
from convnext_cli.errors import UserError
from convnext_cli.plan.cluster import adopt_step

_TIMEOUT = timedelta(seconds=120)
_LOOK_TIMEOUT = timedelta(minutes=30)
"""For the slowest node to look at itself and to read images, which may have to be fetched."""
_ROUNDS = 5
_SIZES = {"gloo": (1 << 20, 16 << 20), "nccl": (1 << 20, 64 << 20, 256 << 20)}
_SLOWEST = {"gloo": 50e6, "nccl": 5e9}
"""Bytes a second below which the exchange of gradients is likely what a step waits for."""


def join_ranks(*, local_rank: int) -> distributed.ProcessGroup:
    """Open the process group that the launcher describes, torchrun or a plain srun.

    Returns:
        Another one over the hosts' network, whose ranks wait until the slowest has looked.

    Raises:
        RuntimeError: The ranks do not reach each other.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    adopt_step()
    distributed.init_process_group(backend, timeout=_TIMEOUT)
    group = distributed.new_group(backend="gloo", timeout=_LOOK_TIMEOUT)
    assert isinstance(group, distributed.ProcessGroup)
    return group


def make_unreached(error: RuntimeError) -> Finding:
    """What is said where the ranks do not reach each other."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return Finding(
        "all-reduce",
        "problem",
        f"the ranks do not reach each other: {str(error).splitlines()[0][:200]}",
        f"see that every node reaches {place}, whatever its firewall; export GLOO_SOCKET_IFNAME and"
        " NCCL_SOCKET_IFNAME with the interface of the network between them",
    )


def measure_all_reduce() -> Finding:
    """Exchange tensors between all ranks; every rank calls it.

    The rate is the bus bandwidth, 2 (n - 1) / n x bytes / seconds, which does not depend on the
    number of ranks where the network is good.
    """
    backend = distributed.get_backend()
    device = "cuda" if backend == "nccl" else "cpu"
    ranks = distributed.get_world_size()
    rates = []
    for size in _SIZES[backend]:
        values = torch.zeros(size // 4, device=device)
        seconds = statistics.median(
            _time(lambda values=values: distributed.all_reduce(values), device=device)  # type: ignore[misc]
            for _ in range(_ROUNDS + 1)
        )
        rates.append((size, seconds, 2 * (ranks - 1) / ranks * size / seconds))
    return judge_all_reduce(rates, ranks=ranks, backend=backend)


def judge_all_reduce(rates: list[tuple[int, float, float]], *, ranks: int, backend: str) -> Finding:
    """A finding of (bytes, seconds, bytes a second) by size."""
    shown = ", ".join(
        f"{size >> 20} MiB in {seconds * 1e3:.1f} ms ({rate / 1e9:.2f} GB/s)"
        for size, seconds, rate in rates
    )
    found = f"{ranks} ranks over {backend}: {shown}"
    if rates[-1][2] < _SLOWEST[backend]:
        advice = "export NCCL_DEBUG=INFO shows which network is taken; NCCL_SOCKET_IFNAME chooses"
        if backend == "gloo":
            advice = "export GLOO_SOCKET_IFNAME with the name of the fast network's interface"
        return Finding("all-reduce", "warning", found, advice)
    return Finding("all-reduce", "ok", found)


def _time(work: Callable[[], object], *, device: str) -> float:
    distributed.barrier()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def read_shards(location: str, *, cache_dir: Path, images: int) -> list[Finding]:
    """Read, check and decode images spread over the shards of each split."""
    try:
        card = read_card(location)
        store = Store(location=location, cache_dir=cache_dir)
        return [
            _read_split(
                ImageReader(
                    card,
                    store=store,
                    split=split,
                    view=EvalView(image_px=224),
                    seed=0,
                    on_bad="raise",
                ),
                split=split,
                images=images,
            )
            for split in card.splits
        ]
    except UserError as error:
        return [Finding("shards", "problem", str(error), error.hint or "")]


def _read_split(reader: ImageReader, *, split: str, images: int) -> Finding:
    samples = range(0, len(reader), max(1, len(reader) // images))[:images]
    started, volume = time.perf_counter(), 0
    bad: list[str] = []
    for sample in samples:
        try:
            data, _ = reader.read(sample)
            volume += len(data)
            decode_rgb(data, key=reader.key(sample))
        except BadImage as error:
            bad.append(f"{reader.key(sample)}: {error}")
    seconds = time.perf_counter() - started
    found = (
        f"{split}: {len(samples)} of {len(reader):,} images read and decoded on one core,"
        f" {len(samples) / seconds:.0f} images/s, {volume / seconds / 1e6:.0f} MB/s"
    )
    if bad:
        told = f"{found}; {len(bad)} cannot be used, the first {bad[0]}"
        return Finding("shards", "problem", told, "read them all: convnext data check DIR")
    return Finding("shards", "ok", found)
