"""Images per second and core: this project's loader against others, interleaved in one run.

```
packed data set --unpack--> class folders          what folder loaders read
                  one process a system, warm       loader_systems.py
round r           each system in turn, random order, loads the same number of images
ratio             of a round: CPU seconds an image of the peer over ours; the median of all rounds
```

Ratios are of CPU time, not of wall time, so that other work on the machine disturbs them little.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np
import torch

from convnext_cli.bench.loader_systems import POLICY, Cost, Setting, SystemName
from convnext_cli.bench.report import LoaderReport, Rate, Ratio, Stage
from convnext_cli.data.augment import TrainView
from convnext_cli.data.card import DatasetCard, read_card
from convnext_cli.data.decode import decode_region
from convnext_cli.data.fetch import Store
from convnext_cli.data.header import read_image_size
from convnext_cli.data.order import image_seed, own_global_random
from convnext_cli.data.randaugment import apply_ops_pillow, build_policy
from convnext_cli.data.reader import ImageReader
from convnext_cli.errors import DataError

_STAGE_IMAGES, _STAGE_REPEATS = 400, 5


class _Process:
    """A system in a process of its own."""

    def __init__(self, name: SystemName, setting: Setting, *, log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    *("-W", "ignore", "-m", "convnext_cli.bench.loader_systems"),
                    *(name, json.dumps(asdict(setting))),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Its workers follow it: they watch their parent.
        self._process.kill()
        self._process.communicate()

    def read(self) -> dict[str, float]:
        """The next answer.

        Raises:
            DataError: The process has ended.
        """
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        told = self.log.read_text().strip().splitlines() or ["without a word"]
        why = next((line for line in reversed(told) if "Error" in line), told[-1])
        raise DataError(
            f"{self.name} ended: {why.strip()}",
            hint="leave it out of --against",
        )

    def ask(self, images: int) -> Cost:
        """Have it load so many images."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{images}\n")
        self._process.stdin.flush()
        return Cost(**self.read())  # type: ignore[arg-type]  # images is a whole number


def compare_loaders(
    location: str,
    *,
    peers: Sequence[SystemName],
    image_px: int,
    batch: int,
    workers: int,
    images: int,
    rounds: int,
    on_progress: Callable[[str], None] = lambda _: None,
) -> LoaderReport:
    """Measure this project's loader against others on one packed data set.

    Args:
        location: A local folder.
        peers: Systems to compare with; one that cannot run is reported, not raised.
        image_px: Side of the images that are made.
        batch: Images in a batch.
        workers: Loader processes (threads, for DALI) of each system.
        images: Images that each system loads in a round, at least.
        rounds: How often.
        on_progress: Called with what happens now.

    Raises:
        DataError: The data set cannot be read, or this project's own loader does not run.
    """
    card = read_card(location)
    if "train" not in card.splits:
        raise DataError(
            f"{location}: there is no split named train",
            hint="pack a data set with a training part: convnext data pack SOURCE DIR",
        )
    ours: tuple[SystemName, ...] = ("convnext", "convnext-device")
    names = (*ours, *(peer for peer in peers if peer not in ours))
    shuffle = random.Random(0)  # the order of rounds
    costs: dict[SystemName, list[Cost]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    with (
        unpacked(card, location) as folder,
        tempfile.TemporaryDirectory() as logs,
        ExitStack() as running,
    ):
        setting = Setting(
            data=location, folder=str(folder), image_px=image_px, batch=batch, workers=workers
        )
        on_progress("stages")
        stages = measure_stages(card, location, image_px=image_px)
        processes: dict[SystemName, _Process] = {}
        for name in names:
            on_progress(f"warming up {name}")
            process = running.enter_context(_Process(name, setting, log=Path(logs) / name))
            try:
                process.read()
            except DataError as error:
                if name in ours:
                    raise
                failed[name] = str(error)
            else:
                processes[name] = process
        for number in range(rounds + 1):
            for name in shuffle.sample(list(processes), len(processes)):
                on_progress(f"round {number} of {rounds}: {name}")
                cost = processes[name].ask(images)
                if number:  # the first fills caches
                    costs[name].append(cost)
    measured = {name: found for name, found in costs.items() if found}
    split = card.splits["train"]
    return LoaderReport(
        images=split.images,
        mean_bytes=sum(shard.bytes for shard in split.shards) / split.images,
        image_px=image_px,
        batch=batch,
        workers=workers,
        rounds=rounds,
        rates=tuple(_rate(name, found) for name, found in measured.items()),
        ratios=tuple(
            _ratio(own, measured[own], peer, measured[peer])
            for own in ours
            for peer in measured
            if peer not in ours
        ),
        stages=stages,
        limit_images_per_core_second=1000 / (stages[0].milliseconds + stages[1].milliseconds),
        failed=failed,
    )


def _rate(name: str, costs: Sequence[Cost]) -> Rate:
    rates = [cost.images / cost.cpu_seconds for cost in costs]
    return Rate(
        system=name,
        images_per_core_second=statistics.median(rates),
        low=min(rates),
        high=max(rates),
        wall_images_per_second=statistics.median(c.images / c.wall_seconds for c in costs),
    )


def _ratio(own: str, ours: Sequence[Cost], peer: str, theirs: Sequence[Cost]) -> Ratio:
    ratios = [
        (their.cpu_seconds / their.images) / (our.cpu_seconds / our.images)
        for our, their in zip(ours, theirs, strict=True)
    ]
    return Ratio(own, peer, statistics.median(ratios), min(ratios), max(ratios))


@contextmanager
def unpacked(card: DatasetCard, location: str) -> Iterator[Path]:
    """The training images in class folders, in a temporary folder."""
    reader = _reader(card, location, image_px=8)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for sample in range(len(reader)):
            data, label = reader.read(sample)
            place = folder / f"{label:05d}"
            place.mkdir(exist_ok=True)
            (place / f"{sample:08d}.jpg").write_bytes(data)
        yield folder


def measure_stages(card: DatasetCard, location: str, *, image_px: int) -> tuple[Stage, ...]:
    """CPU time of each step of this project's loader, alone; the medians of some repeats."""
    reader = _reader(card, location, image_px=image_px)
    view = reader.view
    assert isinstance(view, TrainView)
    policy = build_policy(
        POLICY, image_px=image_px, mean=view.mean, interpolation=view.interpolation
    )
    own_global_random()  # as a loader process does
    samples = range(min(_STAGE_IMAGES, len(reader)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = np.zeros((_STAGE_REPEATS + 1, 5))  # the first warms up
    for repeat in range(len(seconds)):
        for sample in samples:
            clock = [time.process_time()]
            data, _ = reader.read(sample)
            clock.append(time.process_time())
            width, height = read_image_size(data, key="")
            draw = view.draw(height, width, seed=image_seed(0, epoch=repeat, sample=sample))
            drawn = time.process_time()
            region_CHW = decode_region(data, box=draw.box, key="")
            clock.append(time.process_time())
            view_CHW, _ = view.make(region_CHW, draw)
            clock.append(time.process_time())
            apply_ops_pillow(view_CHW, draw.ops, policy=policy)
            clock.append(time.process_time())
            steps = np.diff(clock)
            steps[1] -= drawn - clock[1]
            seconds[repeat] += [*steps, drawn - clock[1]]
    torch.set_num_threads(threads)
    milliseconds = np.median(seconds[1:], axis=0) * 1e3 / len(samples)
    names = ("read", "decode", "resize and flip", "RandAugment", "draw")
    return tuple(Stage(name, float(ms)) for name, ms in zip(names, milliseconds, strict=True))


def _reader(card: DatasetCard, location: str, *, image_px: int) -> ImageReader:
    view = TrainView(image_px=image_px, rand_augment=POLICY, augment_on="device")
    return ImageReader(
        card, store=Store(location=location), split="train", view=view, seed=0, on_bad="raise"
    )
