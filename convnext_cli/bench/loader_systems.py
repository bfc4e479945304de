"""Loaders that are compared: each an endless stream of training batches of the same images.

| system | what it is |
|---|---|
| `convnext` | this project, the whole published augmentation on the CPU |
| `convnext-device` | this project, RandAugment left to the device |
| `timm` | timm's `create_dataset` and `create_loader` on class folders, with RandAugment |
| `timm-unfetched` | the same without its prefetcher: the workers normalise |
| `timm-uint8` | the same, only what its prefetcher is fed: on a GPU the rest happens there |
| `timm-plain` | `timm-uint8` without RandAugment |
| `torchvision` | `ImageFolder` and the transforms of its reference, in Pillow, with RandAugment |
| `webdataset` | `WebDataset` with `decode("pil")` and timm's transform, with RandAugment |
| `dali` | NVIDIA DALI on the CPU: its webdataset reader, cubic resize and RandAugment |

All crop, resize with an antialiased cubic filter, and flip. `timm`, `timm-unfetched` and
torchvision normalise as well, which is what these loaders give on a CPU; the others hand over
uint8. Erasing, mixup and cutmix are left out everywhere: every system can do them on the device.

Run as a module it is the process of one system: it reads numbers of images from stdin and answers
each with a JSON line of what that many cost. CPU seconds are those of the process and all its
workers, from full queues to full queues.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import psutil
import torch
import webdataset
from timm.data import auto_augment, create_dataset, create_loader, create_transform
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from convnext_cli.data.augment import TrainView
from convnext_cli.data.card import read_card
from convnext_cli.data.fetch import Store
from convnext_cli.data.order import Order
from convnext_cli.data.reader import ImageReader, StepSampler, build_loader

SystemName = Literal[
    "convnext",
    "convnext-device",
    "timm",
    "timm-unfetched",
    "timm-uint8",
    "timm-plain",
    "torchvision",
    "webdataset",
    "dali",
]
SYSTEMS: tuple[SystemName, ...] = get_args(SystemName)

POLICY = "rand-m9-mstd0.5-inc1"
_SETTLED_SECONDS = 0.3
_ENDLESS = 1 << 40


@dataclass(frozen=True)
class Setting:
    """What every system is given."""

    data: str
    """Packed data set: a local folder."""
    folder: str
    """The same images in class folders."""
    image_px: int
    batch: int
    workers: int


@dataclass(frozen=True)
class Cost:
    """What some images cost a system."""

    images: int
    cpu_seconds: float
    wall_seconds: float


def iter_batches(name: SystemName, setting: Setting) -> Iterator[int]:
    """The number of images of each batch that a system makes, for ever."""
    builders: dict[SystemName, Callable[[Setting], Iterator[int]]] = {
        "convnext": partial(_iter_convnext, augment_on="cpu"),
        "convnext-device": partial(_iter_convnext, augment_on="device"),
        "timm": partial(_iter_timm, policy=POLICY, form="fetched"),
        "timm-unfetched": partial(_iter_timm, policy=POLICY, form="unfetched"),
        "timm-uint8": partial(_iter_timm, policy=POLICY, form="uint8"),
        "timm-plain": partial(_iter_timm, policy=None, form="uint8"),
        "torchvision": _iter_torchvision,
        "webdataset": _iter_webdataset,
        "dali": _iter_dali,
    }
    return builders[name](setting)


def _iter_convnext(setting: Setting, *, augment_on: Literal["cpu", "device"]) -> Iterator[int]:
    card = read_card(setting.data)
    view = TrainView(image_px=setting.image_px, rand_augment=POLICY, augment_on=augment_on)
    reader = ImageReader(
        card,
        store=Store(location=setting.data),
        split="train",
        view=view,
        seed=0,
        on_bad="replace",
    )
    order = Order(
        shard_images=reader.shard_images, seed=0, global_images=setting.batch, kind="full"
    )
    sampler = StepSampler(order, rank=0, world=1, accumulate=1, first_step=0, total_steps=_ENDLESS)
    loader = build_loader(reader, sampler=sampler, num_workers=setting.workers, pin_memory=False)
    for batch in loader:
        yield len(batch.image_NCHW)


def _iter_timm(
    setting: Setting, *, policy: str | None, form: Literal["fetched", "unfetched", "uint8"]
) -> Iterator[int]:
    dataset = create_dataset("", root=setting.folder, split="train", is_training=True)
    _guard_posterize()
    fetcher = create_loader(
        dataset,
        input_size=(3, setting.image_px, setting.image_px),
        batch_size=setting.batch,
        is_training=True,
        auto_augment=policy,
        color_jitter=None,
        interpolation="bicubic",
        num_workers=setting.workers,
        persistent_workers=setting.workers > 0,
        use_prefetcher=form != "unfetched",
        device=torch.device("cpu"),
    )
    for _ in count():
        for images, _ in fetcher.loader if form == "uint8" else fetcher:
            yield len(images)


def _iter_torchvision(setting: Setting) -> Iterator[int]:
    cubic = InterpolationMode.BICUBIC
    view = v2.Compose(
        [
            v2.RandomResizedCrop(setting.image_px, interpolation=cubic, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9, interpolation=cubic),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    loader = torch.utils.data.DataLoader(
        ImageFolder(setting.folder, view),
        batch_size=setting.batch,
        shuffle=True,
        drop_last=True,
        num_workers=setting.workers,
        persistent_workers=setting.workers > 0,
    )
    for _ in count():
        for images, _ in loader:
            yield len(images)


def _iter_webdataset(setting: Setting) -> Iterator[int]:
    _guard_posterize()
    view = create_transform(
        setting.image_px,
        is_training=True,
        use_prefetcher=True,
        auto_augment=POLICY,
        color_jitter=None,
        interpolation="bicubic",
    )
    shards = [str(path) for path in sorted(Path(setting.data).glob("train*.tar"))]
    dataset = (
        webdataset.WebDataset(
            shards, resampled=True, nodesplitter=webdataset.split_by_node, shardshuffle=False
        )
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp", "cls")
        .map_tuple(view, int)
        .batched(setting.batch, collation_fn=_collate_arrays)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=setting.workers)
    for images, _ in loader:
        yield len(images)


def _iter_dali(setting: Setting) -> Iterator[int]:
    dali = import_module("nvidia.dali")
    fn, types = dali.fn, dali.types
    rand_augment = import_module("nvidia.dali.auto_aug.rand_augment").rand_augment

    shards = [str(path) for path in sorted(Path(setting.data).glob("train*.tar"))]

    @dali.pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]  # as is DALI
    def pipeline() -> Any:  # noqa: ANN401  # its graph nodes have no public type
        encoded, label = fn.readers.webdataset(
            paths=shards,
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=1000,
            missing_component_behavior="error",
        )
        images = fn.decoders.image_random_crop(
            encoded,
            device="cpu",
            output_type=types.RGB,
            random_area=[0.08, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
        )
        images = fn.resize(
            images,
            size=[setting.image_px, setting.image_px],
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )
        images = fn.flip(images, horizontal=fn.random.coin_flip())
        shape = [setting.image_px, setting.image_px]
        images = rand_augment(images, n=2, m=9, shape=shape, fill_value=128)
        return fn.transpose(images, perm=[2, 0, 1]), label

    built = pipeline(
        batch_size=setting.batch, num_threads=max(1, setting.workers), device_id=None, seed=0
    )
    built.build()
    for _ in count():
        images, _ = built.run()
        yield len(images)


def _guard_posterize() -> None:
    """Timm asks for 0 bits at the highest magnitude, which Pillow 13 refuses: keep one."""
    posterize = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = lambda image, bits, **settings: posterize(
            image, max(1, bits), **settings
        )


def _collate_arrays(samples: list[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(np.stack([np.asarray(image) for image, _ in samples]))
    return images, torch.tensor([label for _, label in samples])


def _tree_cpu_seconds() -> float:
    """CPU time of this process and all below it, so far."""
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def _settle() -> float:
    """Wait until the queues are full and nothing works any more; the CPU time then."""
    before = _tree_cpu_seconds()
    while True:
        time.sleep(_SETTLED_SECONDS)
        now = _tree_cpu_seconds()
        if now - before < 0.05 * _SETTLED_SECONDS:
            return now
        before = now


def measure(batches: Iterator[int], *, images: int) -> Cost:
    """What the next images cost, from full queues to full queues."""
    before, begin, made = _settle(), time.perf_counter(), 0
    while made < images:
        made += next(batches)
    wall = time.perf_counter() - begin
    # A few images may take less than a tick, which is as fine as the system counts.
    spent = max(_settle() - before, 1 / os.sysconf("SC_CLK_TCK"))
    return Cost(images=made, cpu_seconds=spent, wall_seconds=wall)


def main() -> None:
    """Serve one system: name and setting from the command line, numbers of images from stdin."""
    name, setting = sys.argv[1], Setting(**json.loads(sys.argv[2]))
    torch.set_num_threads(1)
    assert name in SYSTEMS
    batches = iter_batches(name, setting)
    next(batches)
    _answer({"ready": True})
    for line in sys.stdin:
        _answer(asdict(measure(batches, images=int(line))))


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
