import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from convnext_cli.data.augment import Choices, EvalView, TrainView
from convnext_cli.data.card import DatasetCard, Shard, Split, index_name
from convnext_cli.data.fetch import Store
from convnext_cli.data.index import read_index, scan_shard, write_index
from convnext_cli.data.order import Order
from convnext_cli.data.reader import (
    Batch,
    EvaluationSampler,
    ImageReader,
    StepSampler,
    build_loader,
    from_worker,
    make_lost_worker_error,
)
from convnext_cli.errors import DataError, WriteError

NUM_CLASSES = 5


def jpeg(number: int) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(sink, "JPEG")
    return sink.getvalue()


def write_shard(folder: Path, name: str, images: list[tuple[str, bytes, int]]) -> Shard:
    """A WebDataset shard and its index from (key, image, label)."""
    path = folder / name
    with tarfile.open(path, "w") as tar:
        for key, image, label in images:
            for extension, data in (("jpg", image), ("cls", str(max(0, label)).encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    labels = np.array([label for _, _, label in images], dtype=np.int32)
    write_index(replace(scan_shard(path).index, labels=labels), folder / index_name(name))
    data = path.read_bytes()
    return Shard(
        name=name, images=len(images), bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
    )


def write_dataset(folder: Path, shards: list[list[tuple[str, bytes, int]]]) -> DatasetCard:
    written = tuple(
        write_shard(folder, f"train-{number:06d}.tar", images)
        for number, images in enumerate(shards)
    )
    labels = [label for images in shards for _, _, label in images]
    split = Split(
        name="train",
        shards=written,
        class_images=tuple(labels.count(k) for k in range(NUM_CLASSES)),
    )
    return DatasetCard(
        classes=tuple(f"class {k}" for k in range(NUM_CLASSES)),
        splits={"train": split},
        options={},
    )


def good_images(first: int, count: int) -> list[tuple[str, bytes, int]]:
    return [(f"{n:04d}", jpeg(n), n % NUM_CLASSES) for n in range(first, first + count)]


def reader_of(folder, card, *, on_bad="replace", view=None) -> ImageReader:
    return ImageReader(
        card,
        store=Store(location=str(folder)),
        split="train",
        view=view or TrainView(image_px=16),
        seed=3,
        on_bad=on_bad,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    return folder, write_dataset(
        folder, [good_images(0, 20), good_images(20, 7), good_images(27, 14)]
    )


def train_batches(
    dataset,
    *,
    num_workers,
    rank=0,
    world=1,
    accumulate=1,
    steps=(0, 8),
    image_px_at=None,
    view=None,
):
    reader = reader_of(*dataset, view=view)
    order = Order(shard_images=reader.shard_images, seed=3, global_images=8, kind="window")
    sampler = StepSampler(
        order,
        rank=rank,
        world=world,
        accumulate=accumulate,
        first_step=steps[0],
        total_steps=steps[1],
        image_px_at=image_px_at,
    )
    loader = build_loader(reader, sampler=sampler, num_workers=num_workers, pin_memory=False)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for field, expected in zip(one[:3], other[:3], strict=True):
            assert torch.equal(field, expected)
        for array, known in zip(one.choices, other.choices, strict=True):
            assert np.array_equal(array, known)
        assert one.bad == other.bad


def joined(batches: list[Batch]) -> Batch:
    fields = list(zip(*batches, strict=True))
    return Batch(
        *(torch.cat(tensors) for tensors in fields[:3]),
        Choices(*(np.concatenate(arrays) for arrays in zip(*fields[3], strict=True))),
        sum(fields[4], ()),
    )


def test_a_batch_holds_pixels_labels_and_ids(dataset):
    batch = train_batches(dataset, num_workers=0)[0]

    assert (tuple(batch.image_NCHW.shape), batch.image_NCHW.dtype) == ((8, 3, 16, 16), torch.uint8)
    assert batch.label_N.tolist() == [n % NUM_CLASSES for n in batch.sample_N.tolist()]
    assert batch.bad == ()


def test_pixels_are_the_shards_own(dataset):
    reader = reader_of(*dataset, view=EvalView(image_px=24, crop="center", crop_frac=1.0))
    expected = np.asarray(Image.open(io.BytesIO(jpeg(26))))[:, 3:27]

    np.testing.assert_array_equal(reader[0, 26].image_CHW.permute(1, 2, 0).numpy(), expected)


def test_workers_change_nothing(dataset):
    assert_equal(train_batches(dataset, num_workers=2), train_batches(dataset, num_workers=0))


def test_ranks_together_read_the_batches_of_one(dataset):
    alone = train_batches(dataset, num_workers=0)
    ranks = [train_batches(dataset, num_workers=0, rank=rank, world=2) for rank in range(2)]

    assert_equal([joined(list(pair)) for pair in zip(*ranks, strict=True)], alone)


def test_passes_of_a_step_together_are_its_batch(dataset):
    whole = train_batches(dataset, num_workers=0)
    passes = train_batches(dataset, num_workers=0, accumulate=4)

    assert_equal([joined(passes[n : n + 4]) for n in range(0, len(passes), 4)], whole)


def test_a_start_in_the_middle_goes_on_where_the_run_was(dataset):
    whole = train_batches(dataset, num_workers=0)

    assert_equal(train_batches(dataset, num_workers=1, steps=(3, 8)), whole[3:])


def test_an_epoch_has_no_image_twice_and_the_next_one_other_crops(dataset):
    batches = train_batches(dataset, num_workers=0, steps=(0, 10))

    first, second = joined(batches[:5]), joined(batches[5:])
    assert len(set(first.sample_N.tolist())) == 40
    assert len(set(second.sample_N.tolist())) == 40
    both = set(first.sample_N.tolist()) & set(second.sample_N.tolist())
    one = next(iter(both))
    views = [epoch.image_NCHW[epoch.sample_N.tolist().index(one)] for epoch in (first, second)]
    assert not torch.equal(*views)


def grown_px(step: int) -> int:
    return 8 if step < 2 else 12 if step < 5 else 16


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_have_the_size_of_their_step_whatever_the_attempt_and_the_processes(
    dataset, num_workers
):
    whole = train_batches(dataset, num_workers=0, image_px_at=grown_px)

    again = train_batches(dataset, num_workers=num_workers, image_px_at=grown_px, steps=(3, 8))

    assert [batch.image_NCHW.shape[-2:] for batch in whole] == [
        (grown_px(step), grown_px(step)) for step in range(8)
    ]
    assert_equal(again, whole[3:])


def test_a_size_is_what_a_view_of_that_size_makes(dataset):
    grown = train_batches(dataset, num_workers=0, image_px_at=grown_px)

    for px in (8, 12, 16):
        view = TrainView(image_px=px)
        alone = train_batches(dataset, num_workers=0, view=view)
        steps = [step for step in range(8) if grown_px(step) == px]
        assert_equal([grown[step] for step in steps], [alone[step] for step in steps])


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (4, 2), (1, 4)])
def test_ranks_and_passes_of_a_step_have_its_size_and_its_pixels(dataset, world, accumulate):
    whole = train_batches(dataset, num_workers=0, image_px_at=grown_px)
    ranks = [
        train_batches(
            dataset,
            num_workers=0,
            rank=rank,
            world=world,
            accumulate=accumulate,
            image_px_at=grown_px,
        )
        for rank in range(world)
    ]

    for step, batch in enumerate(whole):
        passes = slice(step * accumulate, (step + 1) * accumulate)
        assert_equal([joined([p for rank in ranks for p in rank[passes]])], [batch])


def test_a_share_that_does_not_divide_into_the_passes_is_refused():
    order = Order(shard_images=(41,), seed=3, global_images=8)

    with pytest.raises(ValueError, match="4 images a rank do not divide into 3 passes"):
        StepSampler(order, rank=0, world=2, accumulate=3, first_step=0, total_steps=5)


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_reads_each_image_once_and_pads_with_nothing(dataset, world):
    batches = []
    for rank in range(world):
        reader = reader_of(*dataset, view=EvalView(image_px=16), on_bad="raise")
        sampler = EvaluationSampler(len(reader), rank=rank, world=world, batch=6)
        batches += list(build_loader(reader, sampler=sampler, num_workers=0, pin_memory=False))

    every = joined(batches)
    real = every.sample_N >= 0
    assert sorted(every.sample_N[real].tolist()) == list(range(41))
    assert {tuple(batch.image_NCHW.shape) for batch in batches} == {(6, 3, 16, 16)}
    assert every.label_N[~real].tolist() == [-1] * int((~real).sum())
    assert every.image_NCHW[~real].sum() == 0


@pytest.fixture
def damaged(tmp_path):
    images = good_images(0, 10)
    images[4] = ("0004", b"%!PS-Adobe-3.0", 4)
    images[5] = ("0005", jpeg(5)[:200], 0)
    return tmp_path, write_dataset(tmp_path, [images])


def test_a_bad_image_in_training_is_replaced_by_the_next_good_one_and_named(damaged):
    reader = reader_of(*damaged)

    sample = reader[0, 4]

    assert (sample.sample, sample.label) == (4, 6 % NUM_CLASSES)
    assert not torch.equal(sample.image_CHW, reader[0, 6].image_CHW)  # a view of its own
    assert [(bad.sample, bad.key) for bad in sample.bad] == [
        (4, "train-000000.tar/0004"),
        (5, "train-000000.tar/0005"),
    ]
    assert sample.bad[0].reason == "PostScript, not JPEG, PNG or WEBP"
    assert reader[0, 6].bad == ()


def test_a_flipped_bit_that_decodes_is_noticed_by_the_digest(tmp_path):
    card = write_dataset(tmp_path, [good_images(0, 6)])
    index = read_index(tmp_path / index_name("train-000000.tar"))
    with (tmp_path / "train-000000.tar").open("r+b") as shard:
        shard.seek(int(index.image_offset[2] + index.image_bytes[2] // 2))
        byte = shard.read(1)[0]
        shard.seek(-1, 1)
        shard.write(bytes([byte ^ 4]))

    sample = reader_of(tmp_path, card)[0, 2]

    assert [(bad.key, bad.reason) for bad in sample.bad] == [
        ("train-000000.tar/0002", "its bytes are not those that were indexed (xxh3)")
    ]
    assert sample.label == 3


def test_a_shard_that_is_cut_under_way_lends_images_of_other_shards(tmp_path):
    card = write_dataset(tmp_path, [good_images(0, 20), good_images(20, 20)])
    reader = reader_of(tmp_path, card)
    assert reader[0, 0].bad == ()
    with (tmp_path / "train-000000.tar").open("r+b") as shard:
        shard.truncate(1024)

    sample = reader[0, 3]

    assert len(sample.bad) == 8
    assert {bad.reason for bad in sample.bad} == {"the shard ends inside it"}
    assert sample.label == 23 % NUM_CLASSES


def test_keys_and_labels_of_samples_are_told_without_reading_the_images(dataset):
    reader = reader_of(*dataset)

    assert reader.names([21, 0, 40]) == [
        ("train-000001.tar/0021", 1),
        ("train-000000.tar/0000", 0),
        ("train-000002.tar/0040", 0),
    ]


def test_a_bad_image_in_evaluation_is_fatal_and_named(damaged):
    reader = reader_of(*damaged, on_bad="raise", view=EvalView(image_px=16))

    with pytest.raises(DataError, match=r"train-000000\.tar/0004: PostScript"):
        reader[0, 4]


@pytest.mark.parametrize("hint", ["choose another folder: data.cache_dir=DIR", None])
@pytest.mark.parametrize("kind", [DataError, WriteError])
def test_what_ends_a_loader_process_keeps_its_kind_its_sentence_and_its_hint(
    dataset, monkeypatch, kind, hint
):
    def refuse(*_: object) -> None:
        raise kind("the cache is full", hint=hint) from OSError("No space left on device")

    monkeypatch.setattr(ImageReader, "read", refuse)

    with pytest.raises(kind) as caught:
        train_batches(dataset, num_workers=1)

    error = from_worker(caught.value)
    assert (type(error), str(error), error.hint) == (kind, "the cache is full", hint)


def test_a_split_without_any_readable_image_is_refused(tmp_path):
    card = write_dataset(tmp_path, [[("a", b"", 0), ("b", b"", 1)]])

    with pytest.raises(DataError, match=r"2 samples from .* on cannot be used: empty"):
        reader_of(tmp_path, card)[0, 0]


@pytest.mark.parametrize("label", [-1, NUM_CLASSES])
def test_a_label_that_is_no_class_is_refused_with_its_key(tmp_path, label):
    card = write_dataset(tmp_path, [[("cat1", jpeg(0), label)]])

    with pytest.raises(DataError, match=f"cat1 has label {label}, .* has 5 classes"):
        reader_of(tmp_path, card)[0, 0]


def test_a_shard_that_is_gone_or_cut_is_refused_by_name(tmp_path):
    card = write_dataset(tmp_path, [good_images(0, 3), good_images(3, 3)])
    (tmp_path / "train-000000.tar").unlink()
    with (tmp_path / "train-000001.tar").open("r+b") as shard:
        shard.truncate(4096)

    with pytest.raises(DataError, match=r"train-000000\.tar: No such file"):
        reader_of(tmp_path, card)[0, 0]
    with pytest.raises(DataError, match=r"train-000001\.tar: 4,096 bytes, but"):
        reader_of(tmp_path, card)[0, 3]


def test_an_unknown_split_is_refused_with_those_there_are(dataset):
    folder, card = dataset

    with pytest.raises(DataError, match="no split named val, only train"):
        ImageReader(
            card,
            store=Store(location=str(folder)),
            split="val",
            view=EvalView(image_px=16),
            seed=0,
            on_bad="raise",
        )


def test_a_reader_crosses_processes_without_its_open_files(dataset):
    reader = reader_of(*dataset)
    expected = reader[1, 5]

    copy = pickle.loads(pickle.dumps(reader))

    assert torch.equal(copy[1, 5].image_CHW, expected.image_CHW)


def test_loading_leaves_the_global_random_state_alone(dataset):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)

    train_batches(dataset, num_workers=2)

    assert torch.equal(torch.rand(1), expected)


def test_workers_outlive_the_signals_of_a_batch_system(dataset):
    reader = reader_of(*dataset)
    order = Order(shard_images=reader.shard_images, seed=3, global_images=8)
    sampler = StepSampler(order, rank=0, world=1, accumulate=1, first_step=0, total_steps=8)
    batches = iter(build_loader(reader, sampler=sampler, num_workers=1, pin_memory=False))
    first = next(batches)

    for worker in batches._workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(worker.pid, number)
    time.sleep(0.2)

    assert_equal([first, *batches], train_batches(dataset, num_workers=0))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each Python has its own way")
def test_workers_are_forked_whatever_python_does_by_itself(dataset, monkeypatch):
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context",
                        multiprocessing.get_context("forkserver"))  # fmt: skip
    reader = reader_of(*dataset)
    sampler = EvaluationSampler(len(reader), rank=0, world=1, batch=4)

    batches = iter(build_loader(reader, sampler=sampler, num_workers=1, pin_memory=False))
    next(batches)

    assert [psutil.Process(worker.pid).ppid() for worker in batches._workers] == [os.getpid()]


@pytest.mark.parametrize(
    ("signal_name", "memory"), [("Killed", True), ("Segmentation fault", False)]
)
def test_memory_is_not_blamed_for_a_loader_process_that_crashed(signal_name, memory):
    error = RuntimeError(f"DataLoader worker (pid 9) is killed by signal: {signal_name}. ")

    told = str(make_lost_worker_error(error, when="after step 3", hint="again"))

    assert ("memory runs out" in told) is memory
    assert signal_name in told


def test_a_program_that_ends_in_the_middle_of_loading_does_not_hang(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import torch
from convnext_cli.data.reader import build_loader

class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(1)

if __name__ == "__main__":
    batches = iter(
        build_loader(
            Endless(),
            sampler=None,
            num_workers=1,
            pin_memory=False,
        )
    )
    next(batches)
""")

    ended = subprocess.run([sys.executable, script], timeout=60, capture_output=True)

    assert ended.returncode == 0, ended.stderr.decode()
