"""The order of the data over real loaders with real processes: what no topology may change."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from convnext_cli.data.augment import Choices, EvalView, TrainView
from convnext_cli.data.card import read_card
from convnext_cli.data.fetch import Store
from convnext_cli.data.mix import BatchMix
from convnext_cli.data.order import Order
from convnext_cli.data.reader import (
    Batch,
    EvaluationSampler,
    ImageReader,
    StepSampler,
    build_loader,
)

# More workers than this machine has cores, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

GLOBAL_IMAGES, LANES, TOTAL_STEPS = 16, 8, 5
WORLDS, WORKERS = (1, 2, 4, 8), (0, 1, 3, 4)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def reader_of(shards, *, split="train", augment_on="cpu"):
    view = (
        TrainView(image_px=16, erasing=0.5, augment_on=augment_on)
        if split == "train"
        else EvalView(image_px=16)
    )
    store = Store(location=str(shards))
    return ImageReader(
        read_card(shards), store=store, split=split, view=view, seed=3, on_bad="raise"
    )


def order_of(reader, kind):
    return Order(
        shard_images=reader.shard_images,
        seed=3,
        global_images=GLOBAL_IMAGES,
        lanes=LANES,
        kind=kind,
    )


def rank_batches(
    reader, kind, *, rank, world, workers, first_step, accumulate=1
) -> Iterator[Batch]:
    sampler = StepSampler(
        order_of(reader, kind),
        rank=rank,
        world=world,
        accumulate=accumulate,
        first_step=first_step,
        total_steps=TOTAL_STEPS,
    )
    yield from build_loader(reader, sampler=sampler, num_workers=workers, pin_memory=False)


def mixed(batch: Batch, *, step: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    mix = BatchMix(
        num_classes=3,
        seed=3,
        mean=MEAN,
        std=STD,
        mixup=0.8,
        cutmix=1.0,
        group_images=4,
        label_smoothing=0.1,
    )
    return mix(batch.image_NCHW, batch.label_N, batch.choices, step=step, first=first)


def step_digests(
    shards, kind, *, world, workers, first_step=0, accumulate=1, augment_on="cpu"
) -> list[str]:
    """One digest a step: ids, labels, the loader's pixels, and what the network would see."""
    reader = reader_of(shards, augment_on=augment_on)
    size = GLOBAL_IMAGES // world // accumulate
    streams = [
        rank_batches(
            reader,
            kind,
            rank=rank,
            world=world,
            workers=workers,
            first_step=first_step,
            accumulate=accumulate,
        )
        for rank in range(world)
    ]
    digests = []
    for step in range(first_step, TOTAL_STEPS):
        parts = []
        for rank, stream in enumerate(streams):
            for micro in range(accumulate):
                batch = next(stream)
                seen = mixed(batch, step=step, first=(rank * accumulate + micro) * size)
                parts.append((batch.sample_N, batch.label_N, batch.image_NCHW, *seen))
        whole = [torch.cat(fields) for fields in zip(*parts, strict=True)]
        digest = hashlib.sha256()
        for field in whole:
            digest.update(field.contiguous().numpy().tobytes())
        digests.append(digest.hexdigest())
    assert all(next(stream, None) is None for stream in streams)
    return digests


@pytest.fixture(scope="module")
def expected(tiny_shards):
    """The digests of one process without workers, by order."""
    return {
        kind: step_digests(tiny_shards, kind, world=1, workers=0) for kind in ("window", "full")
    }


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world", WORLDS)
def test_global_batches_are_the_same_to_the_bit_for_any_world_and_workers(
    world, workers, tiny_shards, expected
):
    digests = step_digests(tiny_shards, "window", world=world, workers=workers)

    assert digests == expected["window"]


@pytest.mark.parametrize(("world", "workers"), [(2, 3), (8, 1)])
def test_the_full_order_holds_the_same_promise(world, workers, tiny_shards, expected):
    digests = step_digests(tiny_shards, "full", world=world, workers=workers)

    assert digests == expected["full"]


def test_passes_of_a_step_do_not_change_what_the_network_sees(tiny_shards, expected):
    digests = step_digests(tiny_shards, "window", world=2, workers=1, accumulate=4)

    assert digests == expected["window"]


def test_augmentation_on_the_device_holds_the_same_promise(tiny_shards):
    alone = step_digests(tiny_shards, "window", world=1, workers=0, augment_on="device")
    spread = step_digests(tiny_shards, "window", world=4, workers=3, augment_on="device")

    assert spread == alone
    assert len(set(alone)) == TOTAL_STEPS


@pytest.mark.parametrize("first_step", range(1, TOTAL_STEPS))
def test_a_resume_at_any_step_equals_not_stopping_even_on_other_devices(
    first_step, tiny_shards, expected
):
    world, workers = (1, 2, 4, 8)[first_step % 4], (4, 0, 1)[first_step % 3]

    digests = step_digests(
        tiny_shards, "window", world=world, workers=workers, first_step=first_step
    )

    assert digests == expected["window"][first_step:]


@pytest.mark.parametrize("kind", ["window", "full"])
def test_an_epoch_uses_every_image_once_but_for_the_rest_which_differs(kind, tiny_shards):
    reader = reader_of(tiny_shards)
    steps = order_of(reader, kind).steps_per_epoch

    streams = [
        rank_batches(reader, kind, rank=rank, world=2, workers=3, first_step=0) for rank in (0, 1)
    ]
    ids = [torch.cat([batch.sample_N for batch in parts]) for parts in zip(*streams, strict=True)]
    epochs = [torch.cat(ids[n * steps : (n + 1) * steps]).tolist() for n in (0, 1)]

    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == steps * GLOBAL_IMAGES
    left = [set(range(len(reader))) - set(epoch) for epoch in epochs]
    assert all(len(rest) == len(reader) % GLOBAL_IMAGES for rest in left)
    assert left[0] != left[1]


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_evaluation_counts_every_image_once_for_any_world(world, workers, tiny_shards):
    reader = reader_of(tiny_shards, split="val")

    counted = []
    lengths = []
    for rank in range(world):
        sampler = EvaluationSampler(len(reader), rank=rank, world=world, batch=5)
        batches = list(build_loader(reader, sampler=sampler, num_workers=workers, pin_memory=False))
        lengths.append(len(batches))
        counted += [n for batch in batches for n in batch.sample_N.tolist() if n >= 0]

    assert sorted(counted) == list(range(len(reader)))
    assert len(set(lengths)) == 1


def test_choices_stay_on_the_host_as_arrays(tiny_shards):
    reader = reader_of(tiny_shards, augment_on="device")

    batch = next(rank_batches(reader, "full", rank=0, world=1, workers=1, first_step=0))

    assert isinstance(batch.choices, Choices)
    assert isinstance(batch.choices.ops, np.ndarray)
    assert batch.choices.ops.shape[:2] == (GLOBAL_IMAGES, 2)
    assert batch.choices.erased.shape == (GLOBAL_IMAGES, 6)
