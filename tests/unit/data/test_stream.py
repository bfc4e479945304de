import io
import os
import pickle
import tarfile
import threading
from concurrent import futures

import numpy as np
import pytest
import torch
from PIL import Image

from convnext_cli.data.augment import EvalView, TrainView
from convnext_cli.data.build import EvenBatches
from convnext_cli.data.reader import build_loader
from convnext_cli.data.stream import Stream, StreamReader, list_shards
from convnext_cli.errors import DataError


def jpeg(number: int) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(sink, "JPEG")
    return sink.getvalue()


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Four shards of five images; image n has label n."""
    for shard in range(4):
        members = {}
        for n in range(shard * 5, shard * 5 + 5):
            members |= {f"{n:03d}.jpg": jpeg(n), f"{n:03d}.cls": str(n).encode()}
            members[f"{n:03d}.json"] = b"{}"
        write_tar(tmp_path / f"train-{shard}.tar", members)
    return str(tmp_path / "train-{0..3}.tar")


def stream_of(urls, *, view=None, **changes) -> StreamReader:
    settings = {"num_classes": 20, "batch": 4, "num_batches": 5, "seed": 0} | changes
    return StreamReader(Stream(urls=urls, **settings), view=view or TrainView(image_px=16))


def labels(reader, *, epoch=0, num_workers=0) -> list[int]:
    reader.set_epoch(epoch)
    loader = build_loader(reader, sampler=None, num_workers=num_workers, pin_memory=False)
    return [label for batch in loader for label in batch.label_N.tolist()]


def test_a_name_that_is_no_utf8_is_read(tmp_path):
    key = os.fsdecode(b"caf\xe9")
    write_tar(tmp_path / "s.tar", {f"{key}.jpg": jpeg(0), f"{key}.cls": b"7"})
    reader = stream_of(str(tmp_path / "s.tar"), view=EvalView(image_px=16), num_batches=None)

    assert labels(reader) == [7, -1, -1, -1]


def test_one_worker_reads_each_image_once_an_epoch_in_another_order(shards):
    reader = stream_of(shards)

    first, second = labels(reader, epoch=0), labels(reader, epoch=1)

    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert labels(reader, epoch=0) == first


def test_batches_are_those_of_the_indexed_reader(shards):
    batch = next(
        iter(build_loader(stream_of(shards), sampler=None, num_workers=0, pin_memory=False))
    )

    assert (tuple(batch.image_NCHW.shape), batch.image_NCHW.dtype) == ((4, 3, 16, 16), torch.uint8)
    assert batch.label_N.dtype == torch.int64
    assert batch.bad == ()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_share_the_shards_and_the_batches(shards, num_workers):
    reader = stream_of(shards, num_batches=7)

    read = labels(reader, num_workers=num_workers)

    assert len(read) == 28


def test_ranks_take_equally_many_batches_from_shards_of_their_own(shards):
    ranks = [labels(stream_of(shards, rank=rank, world=3)) for rank in range(3)]

    assert [len(read) for read in ranks] == [20, 20, 20]
    assert not set(ranks[0]) & set(ranks[1])


def test_evaluation_reads_each_image_once_in_order_and_pads(shards):
    reader = stream_of(shards, num_batches=None, batch=6, view=EvalView(image_px=16))

    assert labels(reader) == [*range(20), -1, -1, -1, -1]


def test_a_rank_that_is_through_with_its_shards_pads_until_all_are(shards):
    readers = [
        stream_of(shards, num_batches=None, rank=rank, world=3, view=EvalView(image_px=16))
        for rank in range(3)
    ]
    said = threading.Barrier(3)
    answers: list[list[bool]] = [[], [], []]

    def read(rank: int) -> list[int]:
        def is_any(own: bool) -> bool:
            answers[rank].append(own)
            said.wait(timeout=30)
            return any(theirs[len(answers[rank]) - 1] for theirs in answers)

        padding = readers[rank].make_padding()
        batches = EvenBatches(readers[rank], padding=padding, is_any=is_any)
        return [label for batch in batches for label in batch.label_N.tolist()]

    with futures.ThreadPoolExecutor() as pool:
        ranks = list(pool.map(read, range(3)))

    assert [len(read) for read in ranks] == [12, 12, 12]  # two shards of five, and one, and one
    assert sorted(label for read in ranks for label in read if label >= 0) == list(range(20))


def test_workers_that_stay_alive_hear_of_the_next_epoch(shards):
    reader = stream_of(shards)
    loader = build_loader(reader, sampler=None, num_workers=1, pin_memory=False)

    orders = []
    for epoch in range(2):
        reader.set_epoch(epoch)
        orders.append([label for batch in loader for label in batch.label_N.tolist()])

    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_a_second_lap_over_the_shards_makes_other_views(shards):
    reader = stream_of(shards, batch=20, num_batches=2, shuffle_images=0)

    first, second = reader
    order = [batch.label_N.argsort() for batch in (first, second)]
    assert torch.equal(first.label_N[order[0]], second.label_N[order[1]])
    assert not torch.equal(first.image_NCHW[order[0]], second.image_NCHW[order[1]])


def test_a_bad_image_is_left_out_and_named_with_the_next_one(tmp_path):
    members = {f"{n}.{e}": d for n in range(4) for e, d in (("jpg", jpeg(n)), ("cls", b"1"))}
    members["1.jpg"] = b"<html>"
    write_tar(tmp_path / "a.tar", members)

    reader = stream_of(str(tmp_path / "a.tar"), batch=3, num_batches=1, shuffle_images=0)

    bad = next(iter(reader)).bad
    assert [(one.key, one.reason) for one in bad] == [
        (f"{tmp_path}/a.tar/1", "text, not JPEG, PNG or WEBP")
    ]


def test_a_bad_image_in_evaluation_is_fatal_and_named(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.jpg": b"", "x.cls": b"0"})

    with pytest.raises(DataError, match=r"a\.tar/x: empty"):
        labels(stream_of(str(tmp_path / "a.tar"), num_batches=None))


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"a.jpg": jpeg(0), "a.json": b"{}", "b.jpg": jpeg(1)}, "t.tar/[ab]: no .cls"),
        ({"a.jpg": b"no image", "a.cls": b"0"}, "t.tar/a: "),
    ],
)
def test_shards_without_a_sample_that_can_be_used_are_not_read_for_ever(tmp_path, members, why):
    write_tar(tmp_path / "t.tar", members)

    with pytest.raises(DataError, match=f"no sample can be used, such as .*{why}"):
        labels(stream_of(str(tmp_path / "t.tar")))


def test_pickles_in_a_shard_are_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    members = {
        "x.jpg": jpeg(0),
        "x.cls": b"3",
        "x.pkl": pickle.dumps(Trap()),
        "x.pyd": b"",
        "x.json": b"{",
    }
    write_tar(tmp_path / "a.tar", members)

    assert labels(stream_of(str(tmp_path / "a.tar"), num_batches=None, batch=1)) == [3]


@pytest.mark.parametrize(
    ("label", "message"),
    [(b"20", "label 20, but the model has 20 classes"), (b"cat", "not a number")],
)
def test_a_label_that_is_no_class_is_refused_with_its_key(tmp_path, label, message):
    write_tar(tmp_path / "a.tar", {"x.jpg": jpeg(0), "x.cls": label})

    with pytest.raises(DataError, match=f"sample x: .*{message}"):
        labels(stream_of(str(tmp_path / "a.tar")))


def test_what_is_no_shard_is_refused_by_name(tmp_path):
    (tmp_path / "page.tar").write_bytes(b"<html>" * 1000)
    write_tar(tmp_path / "empty.tar", {})

    with pytest.raises(DataError, match=r"page\.tar: "):
        labels(stream_of(str(tmp_path / "page.tar")))
    with pytest.raises(DataError, match=r"empty\.tar: no samples"):
        labels(stream_of(str(tmp_path / "empty.tar")))
    with pytest.raises(DataError, match=r"gone\.tar: "):
        labels(stream_of(str(tmp_path / "gone.tar")))


def test_fewer_shards_than_ranks_are_refused(shards):
    with pytest.raises(DataError, match="4 shards cannot be split over 5 ranks"):
        stream_of(shards, world=5)


def test_a_pipe_needs_leave_because_it_runs_a_shell(shards):
    pipe = f"pipe:cat {shards.replace('{0..3}', '2')}"

    with pytest.raises(DataError, match="runs a shell command"):
        list_shards(pipe, allow_pipe=False)
    read = labels(stream_of(pipe, allow_pipe=True, num_batches=None, batch=5))

    assert read == [10, 11, 12, 13, 14]
