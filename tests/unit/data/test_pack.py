"""Sources become shards: which ones, what is in them, and what happens when something is wrong."""

import csv
import errno
import gc
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from convnext_cli.data import pack as pack_module
from convnext_cli.data.card import index_name, read_card
from convnext_cli.data.decode import decode_rgb
from convnext_cli.data.header import MAX_PIXELS
from convnext_cli.data.index import read_index, scan_shard
from convnext_cli.data.pack import PackOptions, Unreadable, is_complete, make_jpeg, pack
from convnext_cli.data.sources import list_source
from convnext_cli.errors import DataError, StorageError

WNIDS = ("n01440764", "n01443537", "n02084071")


def picture(seed: int, *, size=(12, 10), mode="RGB") -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def jpeg(seed: int, **options) -> bytes:
    return encode(picture(seed, **options))


def write_folders(root: Path, counts: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for image in range(count):
            (root / name / f"{image:03d}.jpg").write_bytes(jpeg(1000 * number + image))
    return root


def tar_bytes(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextmanager
def files_left_open() -> Iterator[None]:
    """The webdataset library leaves shards for the garbage collector to close."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def read_samples(folder: Path, split: str) -> list[dict]:
    """Samples of a split as the webdataset library reads them."""
    urls = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
    with files_left_open():
        return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def labels_by_source(folder: Path, split: str) -> dict[str, int]:
    return {
        json.loads(sample["json"])["source"]: int(sample["cls"])
        for sample in read_samples(folder, split)
    }


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_folders(tmp_path / "images" / "train", {"b": 7, "a": 6})
    write_folders(tmp_path / "images" / "val", {"a": 2, "b": 3})
    return tmp_path / "images"


# What comes out


def test_class_folders_become_shards_with_sorted_classes(folders, tmp_path):
    out = tmp_path / "out"

    packed = pack(folders, out, options=PackOptions(images_per_shard=5))

    assert packed.kind == "folders"
    assert packed.card == read_card(out)
    assert packed.card.classes == ("a", "b")
    train, val = packed.card.splits["train"], packed.card.splits["val"]
    assert (train.images, train.class_images) == (13, (6, 7))
    assert (val.images, val.class_images) == (5, (2, 3))
    assert [shard.images for shard in train.shards] == [5, 5, 3]
    for shard in (*train.shards, *val.shards):
        assert hashlib.sha256((out / shard.name).read_bytes()).hexdigest() == shard.sha256
        assert (out / shard.name).stat().st_size == shard.bytes
    assert sorted(path.name for path in out.iterdir()) == [
        "dataset.json",
        *(f"train-00000{n}.{end}" for n in range(3) for end in ("index.npz", "tar")),
        "val-000000.index.npz",
        "val-000000.tar",
    ]


def test_webdataset_reads_image_label_and_origin_of_every_sample(folders, tmp_path):
    out = tmp_path / "out"
    pack(folders, out, options=PackOptions(images_per_shard=5))

    samples = read_samples(out, "train") + read_samples(out, "val")

    seen = {}
    for sample in samples:
        about = json.loads(sample["json"])
        seen[about["source"]] = int(sample["cls"])
        assert sample["jpg"] == (folders / about["source"]).read_bytes()
        assert about["class"] == "ab"[int(sample["cls"])]
        assert (about["width"], about["height"]) == (12, 10)
    assert seen == {
        str(path.relative_to(folders)): "ab".index(path.parent.name)
        for path in folders.rglob("*.jpg")
    }


def test_tar_lists_the_members_side_by_side_without_time_or_user(folders, tmp_path):
    pack(folders, tmp_path / "out")

    done = subprocess.run(
        ["tar", "tvf", str(tmp_path / "out" / "val-000000.tar"), "--numeric-owner", "--utc"],
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stderr) == (0, "")
    names = [line.split()[-1] for line in done.stdout.splitlines()]
    assert len(names) == 15
    assert [name.rpartition(".")[2] for name in names] == ["jpg", "cls", "json"] * 5
    assert all(line.startswith("-r--r--r-- 0/0") for line in done.stdout.splitlines())
    assert all("1970-01-01" in line for line in done.stdout.splitlines())


def test_timm_reads_the_shards(folders, tmp_path):
    from timm.data import create_dataset

    out = tmp_path / "out"
    pack(folders, out, options=PackOptions(images_per_shard=5))

    part = {"name": "val", "num_samples": 5, "filenames": ["val-000000.tar"], "shard_lengths": [5]}
    (out / "_info.json").write_text(json.dumps({"splits": {"val": part}}))
    dataset = create_dataset("wds/tiny", root=str(out), split="val", is_training=False)
    with files_left_open():
        read = [(image.size, label) for image, label in dataset]

    assert sorted(label for _, label in read) == [0, 0, 1, 1, 1]
    assert {size for size, _ in read} == {(12, 10)}


def test_the_index_agrees_with_a_scan_and_knows_the_sizes(folders, tmp_path):
    (folders / "train" / "a" / "wide.jpg").write_bytes(jpeg(5, size=(40, 20)))
    pack(folders, tmp_path / "out")

    shard = tmp_path / "out" / "train-000000.tar"
    index, scanned = read_index(shard.with_name(index_name(shard.name))), scan_shard(shard).index

    assert list(index.keys) == list(scanned.keys)
    assert np.array_equal(index.image_offset, scanned.image_offset)
    sizes = dict(zip(index.keys, zip(index.width, index.height, strict=True), strict=True))
    assert sizes.pop("train/a/wide") == (40, 20)
    assert set(sizes.values()) == {(12, 10)}


# Determinism


def test_one_worker_and_two_write_the_same_bytes(folders, tmp_path):
    options = PackOptions(images_per_shard=4)

    pack(folders, tmp_path / "one", options=options, workers=1)
    pack(folders, tmp_path / "two", options=options, workers=2)

    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_copy_of_the_source_elsewhere_gives_the_same_bytes(tmp_path):
    for place in ("here", "there"):
        write_folders(tmp_path / place, {"a": 5, "b": 5})
        pack(tmp_path / place, tmp_path / f"out-{place}")

    assert content(tmp_path / "out-here") == content(tmp_path / "out-there")


def test_images_of_all_classes_are_shuffled_and_the_seed_chooses_how(tmp_path):
    write_folders(tmp_path / "images", {"a": 40, "b": 40})

    order = {}
    for seed in (0, 1):
        out = tmp_path / f"out-{seed}"
        pack(tmp_path / "images", out, options=PackOptions(seed=seed))
        order[seed] = scan_shard(out / "train-000000.tar").index

    assert 10 < order[0].labels[:40].sum() < 30
    assert list(order[0].keys) != list(order[1].keys)
    assert sorted(order[0].keys) == sorted(order[1].keys)


def test_a_share_for_validation_stays_the_same_when_images_are_added(tmp_path):
    options = PackOptions(val_fraction=0.3)
    images = write_folders(tmp_path / "images", {"a": 60, "b": 60})
    pack(images, tmp_path / "before", options=options)
    for number in range(60, 90):
        (images / "a" / f"{number:03d}.jpg").write_bytes(jpeg(number))
    pack(images, tmp_path / "after", options=options)

    before = labels_by_source(tmp_path / "before", "val")
    after = labels_by_source(tmp_path / "after", "val")

    assert 20 < len(before) < 52
    assert before.items() <= after.items()
    assert not before.keys() & labels_by_source(tmp_path / "after", "train").keys()


def test_a_share_for_validation_leaves_every_class_an_image_to_train_on(tmp_path):
    images = write_folders(tmp_path / "images", {f"c{n:02d}": 2 for n in range(20)})

    packed = pack(images, tmp_path / "out", options=PackOptions(val_fraction=0.9))

    assert min(packed.card.splits["train"].class_images) == 1


# Sources


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"),
        ("train", "valid"),
        ("train", "validation"),
        ("train", "test"),
        ("Training", "Testing"),
    ],
)
def test_the_parts_have_several_names(tmp_path, train, val):
    write_folders(tmp_path / "images" / train, {"a": 2, "b": 2})
    write_folders(tmp_path / "images" / val, {"a": 1, "b": 1})

    packed = pack(tmp_path / "images", tmp_path / "out")

    assert packed.card.splits["val"].class_images == (1, 1)


def test_a_second_held_out_folder_is_left_and_said(folders, tmp_path):
    write_folders(folders / "test", {"a": 1, "b": 1})

    packed = pack(folders, tmp_path / "out")

    assert packed.card.splits["val"].images == 5
    assert packed.notes == ("not packed: test (only train and val are)",)


def test_a_folder_of_something_else_beside_the_parts_is_no_class(folders, tmp_path):
    write_folders(folders / "annotations", {"xml": 1})

    packed = pack(folders, tmp_path / "out")

    assert packed.card.classes == ("a", "b")
    assert packed.notes == ("not packed: annotations (only train and val are)",)


def test_a_class_without_an_image_is_left_out_and_said(folders, tmp_path):
    (folders / "train" / "c").mkdir()

    packed = pack(folders, tmp_path / "out")

    assert packed.card.classes == ("a", "b")
    assert packed.notes == ("classes without an image, left out: train/c",)


def test_a_folder_with_a_dot_is_left_out_and_said_where_it_holds_images(tmp_path):
    odd = write_folders(tmp_path / "odd", {"a": 2, "b": 2, ".hidden": 1, "a/.old/deep": 1})
    for name in (".git", "b/.cache"):
        (odd / name).mkdir()
        (odd / name / "HEAD").write_text("no image")
    (odd / ".DS_Store").touch()

    packed = pack(odd, tmp_path / "out")

    assert packed.card.classes == ("a", "b")
    assert packed.unreadable == 2
    with (tmp_path / "out" / "unreadable.csv").open() as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == {".hidden", "a/.old"}
    assert "begins with a dot" in reasons[".hidden"]


def test_a_folder_with_a_dot_beside_train_and_val_is_said_too(folders, tmp_path):
    write_folders(folders, {".extra/c": 1})

    assert pack(folders, tmp_path / "out").unreadable == 1


def test_classes_that_are_called_train_and_boat_are_classes(tmp_path):
    write_folders(tmp_path / "images", {"train": 2, "boat": 2})

    assert pack(tmp_path / "images", tmp_path / "out").card.classes == ("boat", "train")


def test_a_folder_of_folders_called_train_beside_classes_is_said_to_be_one(tmp_path):
    images = write_folders(tmp_path / "images", {"train/a": 1, "train/b": 1, "boat": 1})

    packed = pack(images, tmp_path / "out")

    assert packed.card.classes == ("boat", "train")
    assert packed.notes == (
        "train is packed as a class; if its folders are the classes:"
        f" convnext data pack {images / 'train'} OUT",
    )


def test_parts_inside_the_classes_are_said_to_be_packed_for_training(tmp_path):
    images = write_folders(
        tmp_path / "images", {"a/train": 2, "a/val": 1, "b/train": 2, "b/val": 1}
    )

    packed = pack(images, tmp_path / "out")

    assert packed.card.splits["train"].class_images == (3, 3)
    assert packed.notes == (
        "packed for training: a/val and 1 more, for a part lies above its classes, as in val/a",
    )


@pytest.mark.parametrize(
    ("images", "hint"),
    [
        ({"train/a": 1, "train/b": 1, "annotations": 0}, "data pack .*/images/train OUT"),
        ({"photos/a": 1, "photos/b": 1}, "data pack .*/images/photos OUT"),
        ({"train/a": 1}, "give images of 2 or more classes"),
    ],
)
def test_a_single_class_whose_folders_are_the_classes_is_named(tmp_path, images, hint):
    write_folders(tmp_path / "images", images)

    with pytest.raises(DataError, match="holds 1 class") as caught:
        pack(tmp_path / "images", tmp_path / "out")

    assert re.search(hint, caught.value.hint)


def test_images_in_folders_below_a_class_belong_to_it(tmp_path):
    write_folders(tmp_path / "images", {"a": 1, "b/2024/may": 2})

    packed = pack(tmp_path / "images", tmp_path / "out")

    assert packed.card.classes == ("a", "b")
    assert packed.card.splits["train"].class_images == (1, 2)


def test_a_link_in_a_circle_does_not_go_round(tmp_path):
    images = write_folders(tmp_path / "images", {"a": 1, "b": 1})
    (images / "a" / "again").symlink_to(images / "a")
    (images / "a" / "all").symlink_to(images)

    assert pack(images, tmp_path / "out").card.splits["train"].class_images == (1, 1)


@pytest.mark.parametrize("table", [False, True])
def test_a_link_that_leads_to_itself_is_left_out(tmp_path, table):
    images = write_folders(tmp_path / "images", {"a": 1, "b": 1})
    (images / "a" / "self.jpg").symlink_to("self.jpg")
    (images / "one").symlink_to("other")
    (images / "other").symlink_to("one")
    files = sorted(path.relative_to(images) for path in images.glob("*/*"))
    (images / "t.csv").write_text("".join(f"{file},{file.parent}\n" for file in files))

    packed = pack(images / "t.csv" if table else images, tmp_path / "out")

    assert packed.card.splits["train"].class_images == (1, 1)
    left_out = (tmp_path / "out" / "unreadable.csv").read_text()
    assert "a/self.jpg,too many levels of symbolic links\n" in left_out
    assert table or "other,outside the class folders\n" in left_out


def test_a_pipe_or_a_socket_with_the_name_of_an_image_is_left_out(tmp_path, monkeypatch):
    images = write_folders(tmp_path / "images", {"a": 1, "b": 1})
    os.mkfifo(images / "a" / "pipe.jpg")
    monkeypatch.chdir(images / "a")  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")

        assert pack(images, tmp_path / "out").unreadable == 2

    assert 'a/pipe.jpg,"not a regular' in (tmp_path / "out" / "unreadable.csv").read_text()


def write_table(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_table_with_a_header_names_and_splits(folders, tmp_path):
    table = write_table(
        folders / "table.csv",
        [
            "id,label,path,split",
            "1,dog,train/a/000.jpg,train",
            "2,cat,train/b/000.jpg,train",
            "3,cat,val/b/001.jpg,validation",
        ],
    )

    packed = pack(table, tmp_path / "out")

    assert (packed.kind, packed.card.classes) == ("csv", ("cat", "dog"))
    train = {"train/a/000.jpg": 1, "train/b/000.jpg": 0}
    assert labels_by_source(tmp_path / "out", "train") == train
    assert labels_by_source(tmp_path / "out", "val") == {"val/b/001.jpg": 0}


def test_a_table_may_have_spaces_before_quotes_and_commas_at_the_ends_of_lines(folders, tmp_path):
    rows = ["path, label", '"train/a/000.jpg", "big, dog",', "train/b/000.jpg, cat"]

    packed = pack(write_table(folders / "table.csv", rows), tmp_path / "out")

    assert (packed.card.classes, packed.unreadable) == (("big, dog", "cat"), 0)


@pytest.mark.parametrize("point", ["", ".0"])
def test_a_table_of_numbers_keeps_them_as_labels(folders, tmp_path, point):
    rows = [f"train/a/000.jpg,3{point}", f"{folders}/train/b/001.jpg,1{point}"]
    table = write_table(folders / "t.csv", rows)

    packed = pack(table, tmp_path / "out")

    assert packed.card.classes == ("0", "1", "2", "3")
    assert packed.card.splits["train"].class_images == (0, 1, 0, 1)
    assert packed.notes == ("2 of the labels 0..3 have no images",)


def test_a_path_from_the_home_folder_is_found(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folders))
    table = write_table(tmp_path / "t.csv", ["~/train/a/000.jpg,a", "~/train/b/000.jpg,b"])

    assert pack(table, tmp_path / "out").card.splits["train"].images == 2


def test_a_word_among_numbers_makes_all_labels_names_and_is_said(folders, tmp_path):
    rows = ["train/a/000.jpg,10", "train/a/001.jpg,2", "train/b/000.jpg,nan"]

    packed = pack(write_table(folders / "t.csv", rows), tmp_path / "out")

    assert packed.card.classes == ("10", "2", "nan")
    assert packed.notes == ("labels are names in the order of text, because 'nan' is no number",)


def test_a_folder_among_the_paths_of_a_table_is_left_out(folders, tmp_path):
    rows = ["train/a/000.jpg,a", "train/b/000.jpg,b", ".,a", "/,a"]

    packed = pack(write_table(folders / "t.csv", rows), tmp_path / "out")

    assert packed.unreadable == 2
    assert "is a directory" in (tmp_path / "out" / "unreadable.csv").read_text()


def test_images_with_several_labels_are_said(folders, tmp_path):
    rows = ["train/a/000.jpg,a", "train/b/000.jpg,b", "train/a/000.jpg,b"]

    packed = pack(write_table(folders / "t.csv", rows), tmp_path / "out")

    assert packed.notes == ("1 images come with several labels, such as train/a/000.jpg",)


def test_the_same_path_twice_gives_two_samples(folders, tmp_path):
    table = write_table(folders / "t.csv", ["train/a/000.jpg,a"] * 2 + ["train/b/000.jpg,b"])

    pack(table, tmp_path / "out")

    keys = scan_shard(tmp_path / "out" / "train-000000.tar").index.keys
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([""], "is empty"),
        (["path,label"], "has a header and nothing below it"),
        (["path,label", "a.jpg,x", "https://host/b.jpg,y"], "line 3: https://host/b.jpg is an ad"),
        (["a.jpg,x", "b.jpg,y"], r"none of its 2 images is there, such as /.*/a\.jpg"),
        (["path,label", "a\0.jpg,x", "b.jpg,y"], "line 2: the path holds a NUL character"),
        (["a.jpg,x,val", "a.jpg,y,val"], "has images for validation alone"),
        (
            ["path,label", "a.jpg,x", '"b.jpg,y', *["c.jpg,z"] * 99],
            "line 3: '.{80,90}' is not path",
        ),
        (["a.jpg"], "line 1: 'a.jpg' is not path,label"),
        (["path,label", "a.jpg,x", "b.jpg,crane, bird"], "line 3: .* more cells than the 2 of"),
        (["a.jpg,x", "b.jpg,y,val", "c.jpg,y,val,z"], "line 3: .* more cells than the 3 of"),
        (["id,label", "a.jpg,0", "b.jpg,1"], "'id,label' is neither an image nor a header"),
        (["path,label", f"{'a' * 200_000}.jpg,x"], "line 2 cannot be read: field larger"),
        (["path,label", "a.jpg,x", "b.jpg,"], "line 3: 'b.jpg,' is not path,label"),
        (["a.jpg,0", "b.jpg,-1"], "the label -1 is not in"),
        (["a.jpg,0", "b.jpg,0"], r"holds 1 class \(0\)"),
        (["path,label,split", "a.jpg,x,train", "b.jpg,y,later"], "line 3: the split is 'later'"),
        (["a.jpg,x,train", "b.jpg,y,val", "c.jpg,y,"], "line 3: the split is ''"),
        (
            ["a.jpg,x,train", "b.jpg,y,train", "c.jpg,z,val"],
            "the training part lacks 1 of the classes of the validation part: z",
        ),
        (["a.jpg,0,train", "b.jpg,1,train", "c.jpg,2,val"], "of the validation part: 2"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, rows, sentence):
    table = write_table(tmp_path / "t.csv", rows)

    with pytest.raises(DataError, match=sentence) as caught:
        pack(table, tmp_path / "out")

    assert caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """ImageNet's download in small: a tar of class tars, and a val tar without labels."""
    folder = tmp_path / "imagenet"
    folder.mkdir()
    tars = {}
    for number, wnid in enumerate(reversed(WNIDS)):
        images = {f"{wnid}_{image}.JPEG": jpeg(100 * number + image) for image in range(3)}
        tars[f"{wnid}.tar"] = tar_bytes(images)
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(tars))
    val = {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(900 + number) for number in (2, 1, 3, 4)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val))
    return folder


def test_a_damaged_tar_of_a_class_is_named(tmp_path):
    good, bad = (tar_bytes({"x.JPEG": jpeg(seed)}) for seed in (1, 2))
    tars = {"n01440764.tar": good, "n01443537.tar": b"?" + bad[1:]}
    (tmp_path / "train.tar").write_bytes(tar_bytes(tars))

    with pytest.raises(DataError, match=r"train\.tar \(n01443537\.tar in it\): the header at byte"):
        pack(tmp_path / "train.tar", tmp_path / "out")


VAL_WNIDS = (WNIDS[2], WNIDS[0], WNIDS[1], WNIDS[0])


def test_imagenets_tar_of_tars_is_read_in_place(imagenet, tmp_path):
    packed = pack(imagenet, tmp_path / "out")

    assert (packed.kind, packed.card.classes) == ("imagenet", WNIDS)
    assert packed.card.splits["train"].class_images == (3, 3, 3)
    assert "val" not in packed.card.splits
    assert "--val-labels" in packed.notes[0]
    samples = read_samples(tmp_path / "out", "train")
    found = {json.loads(sample["json"])["source"]: sample["jpg"] for sample in samples}
    assert found["n01440764/n01440764_2.JPEG"] == jpeg(202)


@pytest.mark.parametrize(
    "lines",
    [
        list(VAL_WNIDS),
        [f"ILSVRC2012_val_{n:08d}.JPEG {wnid}" for n, wnid in enumerate(VAL_WNIDS, start=1)],
        [f"ILSVRC2012_val_{n:08d}.JPEG {WNIDS.index(w)}" for n, w in enumerate(VAL_WNIDS, 1)],
        ["ImageId,PredictionString"]
        + [f"ILSVRC2012_val_{n:08d},{w} 1 2 3 4" for n, w in enumerate(VAL_WNIDS, start=1)],
    ],
    ids=["wnids", "names and wnids", "names and labels", "a table with boxes"],
)
def test_imagenets_validation_images_get_the_labels_of_a_file(imagenet, tmp_path, lines):
    labels = write_table(tmp_path / "labels.txt", lines)

    pack(imagenet / "ILSVRC2012_img_train.tar", tmp_path / "out", val_labels=labels)

    found = labels_by_source(tmp_path / "out", "val")
    assert found == {
        f"val/{wnid}/ILSVRC2012_val_{n:08d}.JPEG": WNIDS.index(wnid)
        for n, wnid in enumerate(VAL_WNIDS, start=1)
    }


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["490", "361", "171", "822"], "bare numbers: the devkit's numbers are ILSVRC ids"),
        ([WNIDS[0]], "has 1 lines for 4 images"),
        ([f"ILSVRC2012_val_{n:08d}.JPEG {n % 4}" for n in range(1, 5)], "holds the label 3, but"),
        (["ILSVRC2012_val_00000001.JPEG n01440764"], "no label for 3 of 4 images"),
        (["n99999999"] * 4, "names n99999999, which is no class"),
    ],
)
def test_labels_that_do_not_fit_the_validation_images_are_refused(
    imagenet, tmp_path, lines, sentence
):
    labels = write_table(tmp_path / "labels.txt", lines)

    with pytest.raises(DataError, match=sentence) as caught:
        pack(imagenet, tmp_path / "out", val_labels=labels)

    assert caught.value.hint


def test_validation_images_in_no_class_folders_get_the_labels_of_a_file(folders, tmp_path):
    flat = tmp_path / "CLS-LOC"
    shutil.copytree(folders / "train", flat / "train")
    write_folders(flat, {"val": 3})
    (flat / "val" / "notes.txt").write_text("no image")
    labels = tmp_path / "solution.csv"
    labels.write_text("ImageId,PredictionString\n000,b 1 2 3 4\n001,a 1 2 3 4\n002,b 1 2 3 4\n")

    packed = pack(flat, tmp_path / "out", val_labels=labels)

    assert packed.card.splits["val"].class_images == (1, 2)
    assert packed.unreadable == 1
    assert labels_by_source(tmp_path / "out", "val")["val/a/001.jpg"] == 0
    with pytest.raises(DataError, match="holds no class folders, only files") as caught:
        pack(flat, tmp_path / "other")
    assert "--val-labels FILE" in caught.value.hint


def test_imagenets_validation_tar_is_not_a_source_of_its_own(imagenet, tmp_path):
    val = imagenet / "ILSVRC2012_img_val.tar"

    with pytest.raises(DataError, match="is packed together with") as caught:
        pack(val, tmp_path / "out")
    assert f"convnext data pack {imagenet} OUT --val-labels FILE" in caught.value.hint

    (imagenet / "ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(DataError, match=r"but not ILSVRC2012_img_train\.tar"):
        pack(val, tmp_path / "out")


def test_a_folder_of_class_tars_is_read(tmp_path):
    folder = tmp_path / "winter21_whole"
    folder.mkdir()
    for number, wnid in enumerate(WNIDS):
        images = {f"{wnid}_{image}.JPEG": jpeg(10 * number + image) for image in range(number + 1)}
        (folder / f"{wnid}.tar").write_bytes(tar_bytes(images))

    packed = pack(folder, tmp_path / "out")

    assert (packed.kind, packed.card.classes) == ("class_tars", WNIDS)
    assert packed.card.splits["train"].class_images == (1, 2, 3)


@pytest.mark.parametrize("label", ["0.cls", "0.json", "0.txt"])
@pytest.mark.parametrize("first", ["image", "label"])
def test_shards_of_others_are_not_taken_for_class_tars(tmp_path, label, first):
    for name in ("00000.tar", "00001.tar"):
        shard = {"0.jpg": jpeg(1), label: b"3"}
        if first == "label":
            shard = dict(reversed(shard.items()))
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / name).write_bytes(tar_bytes(shard))

    with pytest.raises(DataError, match="holds WebDataset shards, not class tars") as refused:
        pack(tmp_path / "shards", tmp_path / "out")

    assert f"convnext data index {tmp_path / 'shards'} --out OUT" in str(refused.value.hint)


def test_a_text_about_the_images_makes_no_shard_of_a_class_tar(tmp_path):
    (tmp_path / "tars").mkdir()
    for name in ("cat.tar", "dog.tar"):
        members = {"1.jpg": jpeg(1), "README": b"", "README.txt": b"", "metadata.json": b"{}"}
        (tmp_path / "tars" / name).write_bytes(tar_bytes(members))

    packed = pack(tmp_path / "tars", tmp_path / "out")

    assert packed.card.splits["train"].class_images == (1, 1)


# Images


def test_a_jpeg_in_colour_or_gray_stays_byte_for_byte():
    for mode in ("RGB", "L"):
        data = jpeg(1, mode=mode)
        assert make_jpeg(data) == (data, 12, 10)


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "L"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("WEBP", "RGB"),
        ("BMP", "RGB"),
        ("GIF", "P"),
        ("TIFF", "RGB"),
        ("TIFF", "CMYK"),
        ("JPEG", "CMYK"),
    ],
)
def test_other_formats_become_jpegs_that_look_the_same(form, mode):
    ramp = np.linspace(20, 230, 24 * 24).reshape(24, 24).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp.T, ramp[::-1]], axis=2)).convert(mode)

    lossless = {"lossless": True} if form == "WEBP" else {}
    data, width, height = make_jpeg(encode(image, form, **lossless))

    with Image.open(io.BytesIO(data)) as packed:
        assert (packed.format, packed.size) == ("JPEG", (24, 24))
        assert packed.mode in ("RGB", "L")
    assert (width, height) == (24, 24)
    pixels = decode_rgb(data, key="x").permute(1, 2, 0).numpy().astype(int)
    wanted = np.asarray(image.convert("RGB")).astype(int)
    allowed = 40 if mode in ("1", "P") else 8
    assert np.abs(pixels - wanted).mean() < allowed / 4


def test_16_bit_gray_is_scaled_and_not_cut_off():
    values = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)

    data, _, _ = make_jpeg(encode(Image.fromarray(values), "PNG"))

    with Image.open(io.BytesIO(data)) as packed:
        assert np.abs(np.asarray(packed).astype(int) - (values >> 8)).max() <= 6


def test_a_tiny_colour_image_survives_with_its_colours():
    image = picture(3, size=(8, 8))

    data, _, _ = make_jpeg(encode(image, "PNG"))

    with Image.open(io.BytesIO(data)) as packed:
        error = np.abs(np.asarray(packed).astype(int) - np.asarray(image).astype(int))
    assert error.mean() < 4


def test_only_larger_images_are_made_smaller():
    small, large = jpeg(1, size=(60, 40)), jpeg(2, size=(90, 61))

    assert make_jpeg(small, resize_short=40) == (small, 60, 40)
    data, width, height = make_jpeg(large, resize_short=40)

    assert (width, height) == (59, 40)
    with Image.open(io.BytesIO(data)) as packed:
        assert packed.size == (59, 40)


BOMB = encode(Image.new("1", (9000, 9000)), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am text", "not an image of a known format"),
        (b"<html>404</html>", "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image of a known"),
        (jpeg(1, size=(64, 64))[:800], "damaged data .*truncated"),
        (jpeg(1, size=(64, 64))[:-2] + bytes(50), "damaged data .*truncated"),
        (encode(picture(1, size=(64, 64)), "PNG")[:3000], "damaged"),
        (BOMB, "9000 x 9000 are more than 64,000,000 pixels"),
        (encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "not whole numbers"),
        (encode(Image.fromarray(np.full((4, 4), 255, np.int32)), "TIFF"), "what is white"),
    ],
)
def test_what_is_no_image_is_told_apart(data, reason):
    with pytest.raises(Unreadable, match=reason):
        make_jpeg(data)


def test_the_limit_of_pixels_is_the_readers():
    assert pack_module.MAX_PIXELS == MAX_PIXELS


def test_unreadable_images_are_left_out_and_listed(folders, tmp_path):
    a = folders / "train" / "a"
    (a / "cut.jpg").write_bytes(jpeg(1, size=(64, 64))[:700])
    (a / "empty.jpg").touch()
    (a / "text.png").write_text("no image")
    (a / "notes.txt").write_text("no image, and not called one")
    (a / "gone.jpg").symlink_to(tmp_path / "absent.jpg")
    (a / ".DS_Store").write_text("litter")

    packed = pack(folders, tmp_path / "out")

    assert packed.card.splits["train"].class_images == (6, 7)
    assert packed.unreadable == 5
    with (tmp_path / "out" / "unreadable.csv").open() as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == {
        f"train/a/{name}" for name in ("cut.jpg", "empty.jpg", "text.png", "notes.txt", "gone.jpg")
    }
    assert "truncated" in reasons["train/a/cut.jpg"]
    assert reasons["train/a/empty.jpg"] == "empty file"
    assert reasons["train/a/gone.jpg"] == "no such file or directory"


def test_a_source_without_a_readable_image_is_refused_with_the_reason(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.jpg").write_text("no image")

    with pytest.raises(DataError, match=r"none of the training images .* a/0\.jpg: not an image"):
        pack(tmp_path / "images", tmp_path / "out")

    assert not (tmp_path / "out" / "dataset.json").exists()


# Names


def test_keys_are_ascii_unique_and_without_dots(tmp_path):
    names = ["x.y.jpg", "x_y.png", "gr\u00fc\u00dfe 1.jpg", "n" * 200 + ".jpg", "-.jpg"]
    images = tmp_path / "images"
    for folder in ("a.b", "c"):
        (images / folder).mkdir(parents=True)
        for number, name in enumerate(names):
            (images / folder / name).write_bytes(jpeg(number))

    pack(images, tmp_path / "out")

    keys = list(scan_shard(tmp_path / "out" / "train-000000.tar").index.keys)
    assert len(set(keys)) == 2 * len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_/-]+", key) for key in keys)
    assert len(read_samples(tmp_path / "out", "train")) == len(keys)


def test_names_that_are_no_text_are_packed(tmp_path):
    images = os.fsencode(tmp_path) + b"/images"
    for folder in (b"/caf\xe9", b"/caf\xe8", b"/b"):
        os.makedirs(images + folder)  # noqa: PTH103  # a name of bytes
        Path(os.fsdecode(images + folder + b"/\xff.jpg")).write_bytes(jpeg(1))

    packed = pack(tmp_path / "images", tmp_path / "out")

    assert packed.card.splits["train"].class_images == (1, 1, 1)
    assert packed.card.classes == ("b", r"caf\xe8", r"caf\xe9")


# Going on, and being in the way


SLOW = """
import sys, time
from pathlib import Path
import convnext_cli.data.pack as pack
whole = pack.make_jpeg
def slow(*arguments, **options):
    time.sleep(0.02)
    return whole(*arguments, **options)
pack.make_jpeg = slow
pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), options=pack.PackOptions(images_per_shard=8))
"""


@pytest.mark.timeout(120)
def test_after_a_kill_the_same_call_gives_the_bytes_of_an_undisturbed_one(tmp_path):
    images = write_folders(tmp_path / "images", {"a": 30, "b": 30})
    options = PackOptions(images_per_shard=8)
    pack(images, tmp_path / "whole", options=options)
    out = tmp_path / "killed"

    process = subprocess.Popen([sys.executable, "-c", SLOW, str(images), str(out)])
    give_up = time.monotonic() + 60
    while not (out / "train-000003.tar").exists() and time.monotonic() < give_up:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "dataset.json").exists()
    kept = (out / "train-000001.tar").stat().st_mtime_ns
    (out / ".train-000005.tar.1.tmp").write_text("half a shard")

    packed = pack(images, out, options=options)

    assert packed.reused_shards >= 3
    assert (out / "train-000001.tar").stat().st_mtime_ns == kept
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.timeout(120)
def test_killed_with_its_workers_it_leaves_no_process_behind(tmp_path):
    images = write_folders(tmp_path / "images", {"a": 300, "b": 300})
    script = (
        "import sys; from pathlib import Path; from convnext_cli.data.pack import *\n"
        "if __name__ == '__main__':\n"
        "    pack(Path(sys.argv[1]), Path(sys.argv[2]), workers=2,\n"
        "         options=PackOptions(images_per_shard=10))\n"
    )
    (tmp_path / "script.py").write_text(script)
    out = tmp_path / "out"

    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(images), str(out)],
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(pack_module.__file__).parents[2])},
    )
    give_up = time.monotonic() + 60
    while not list(out.glob("train-*.tar")) and time.monotonic() < give_up:
        time.sleep(0.005)
    process.kill()
    process.wait()

    while time.monotonic() < give_up:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("workers outlived their parent")


def test_a_finished_data_set_is_not_packed_again(folders, tmp_path):
    out = tmp_path / "out"
    pack(folders, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}

    packed = pack(folders, out, workers=2)

    assert packed.reused_shards == 2
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert is_complete(out)


def test_a_source_that_changed_since_it_was_packed_is_told(folders, tmp_path):
    pack(folders, tmp_path / "out")
    shutil.copytree(folders, tmp_path / "copy")

    assert pack(tmp_path / "copy", tmp_path / "out").notes == ()

    changed = folders / "train" / "a" / "001.jpg"
    os.utime(changed, (time.time() + 60,) * 2)
    (note,) = pack(folders, tmp_path / "out").notes
    assert note.startswith(f"{changed} is newer than what is packed")


def test_other_options_or_another_source_in_the_same_folder_are_refused(folders, tmp_path):
    out = tmp_path / "out"
    pack(folders, out)
    with pytest.raises(DataError, match="from another source or with other options"):
        pack(folders, out, options=PackOptions(seed=1))

    (folders / "train" / "a" / "more.jpg").write_bytes(jpeg(77))
    with pytest.raises(DataError, match="from another source or with other options") as caught:
        pack(folders, out)

    assert f"rm -r {out}" in caught.value.hint


def test_an_unfinished_data_set_of_another_source_is_refused(folders, tmp_path):
    out = tmp_path / "out"
    (out / "pack-state").mkdir(parents=True)
    (out / "pack-state" / "plan.json").write_text('{"source": "other"}')

    with pytest.raises(DataError, match="holds an unfinished data set from another source"):
        pack(folders, out)


def test_a_folder_with_strange_files_is_not_written_into(folders, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")

    with pytest.raises(DataError, match=r"is not empty: it holds thesis\.txt"):
        pack(folders, out)

    assert content(out) == {"thesis.txt": b"precious"}
    assert not (out / "pack-state").exists()


def test_the_state_of_a_packing_is_no_class(tmp_path):
    photos = write_folders(tmp_path / "photos", {"a": 2, "b": 2})
    (photos / "pack-state").mkdir()
    (photos / "pack-state" / "lock").touch()

    packed = pack(photos, tmp_path / "out")

    assert packed.card.classes == ("a", "b")
    assert packed.unreadable == 0


def test_a_lost_shard_is_noticed(folders, tmp_path):
    out = tmp_path / "out"
    pack(folders, out)
    (out / "val-000000.tar").unlink()

    assert not is_complete(out)
    with pytest.raises(DataError, match=r"val-000000\.tar or its index is gone"):
        pack(folders, out)


def test_two_packers_do_not_meet_in_one_folder(folders, tmp_path):
    out = tmp_path / "out"

    def meddle(done: int, total: int) -> None:
        if not done:
            with pytest.raises(DataError, match="another process is packing into"):
                pack(folders, out)

    assert pack(folders, out, on_progress=meddle).card.splits["train"].images == 13


def test_progress_counts_every_image_that_is_tried(folders, tmp_path):
    (folders / "train" / "a" / "empty.jpg").touch()
    seen = []

    pack(
        folders,
        tmp_path / "out",
        options=PackOptions(images_per_shard=5),
        on_progress=lambda done, total: seen.append((done, total)),
    )

    assert seen == [(0, 19), (5, 19), (10, 19), (14, 19), (19, 19)]


# Bad input


def test_sources_that_cannot_be_used_are_refused_with_a_sentence_and_a_hint(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "0.jpg").write_bytes(jpeg(1))
    (tmp_path / "photos.zip").write_bytes(b"PK")
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "n01440764.tar.gz").write_bytes(b"\x1f\x8b")
    write_folders(tmp_path / "lonely", {"only": 2})
    write_folders(tmp_path / "deep" / "data", {"a": 1, "b": 1})
    write_folders(tmp_path / "twisted" / "train", {"a": 1, "b": 1})
    write_folders(tmp_path / "twisted" / "val", {"a": 1, "c": 1})
    (tmp_path / "bare" / "train").mkdir(parents=True)
    (tmp_path / "bare" / "train" / "0.jpg").write_bytes(jpeg(1))
    (tmp_path / "vacant" / "a").mkdir(parents=True)
    (tmp_path / "plain.tar").write_bytes(tar_bytes({"0.jpg": jpeg(1)}))
    pack(folders, tmp_path / "packed")

    for name, sentence, hint in (
        ("absent", "there is no", "class folders"),
        ("empty", "holds no class folders", "CSV"),
        ("loose", "holds no class folders", "CSV"),
        ("photos.zip", "neither a folder nor a .csv nor a .tar", "unpack it"),
        ("zipped", r"holds archives, such as n01440764\.tar\.gz", "unpack them"),
        ("lonely", r"holds 1 class \(only\)", "2 or more"),
        ("deep", r"holds 1 class \(data\)", f"convnext data pack {tmp_path}/deep/data OUT"),
        ("twisted", "of the validation part: c", "alike"),
        ("bare", "holds no class folders, only files", "CSV"),
        ("vacant", "holds no images", "SOURCE/CLASS"),
        ("plain.tar", r"holds 0\.jpg, no class tar", "unpack it"),
        ("packed", "is a packed data set already", "--data"),
    ):
        with pytest.raises(DataError, match=sentence) as caught:
            pack(tmp_path / name, tmp_path / "out")
        assert hint in caught.value.hint
        assert not (tmp_path / "out").exists()


def test_options_that_cannot_be_used_are_refused(folders, tmp_path):
    for options, sentence in (
        (PackOptions(images_per_shard=0), "0 images per shard"),
        (PackOptions(resize_short=0), "a short side of 0 px"),
        (PackOptions(val_fraction=1.0), "not between 0 and 1"),
        (PackOptions(val_fraction=0.1), "has a validation part already"),
    ):
        with pytest.raises(DataError, match=sentence) as caught:
            pack(folders, tmp_path / "out", options=options)
        assert caught.value.hint

    write_folders(tmp_path / "few", {"a": 2, "b": 2})
    with pytest.raises(DataError, match="leaves none for validation"):
        pack(tmp_path / "few", tmp_path / "out", options=PackOptions(val_fraction=0.001))
    with pytest.raises(DataError, match="--val-labels is for"):
        pack(folders, tmp_path / "out", val_labels=tmp_path / "labels.txt")


def test_a_destination_inside_its_source_is_refused(folders, tmp_path):
    for out in (folders, folders / "packed", folders / "train" / "a" / "packed"):
        with pytest.raises(DataError, match="lies inside the source") as caught:
            pack(folders, out)
        assert f"{folders}-packed" in caught.value.hint

    assert pack(folders, tmp_path / "images-packed").card.classes == ("a", "b")


def test_a_destination_that_is_a_file_is_refused(folders, tmp_path):
    (tmp_path / "out").write_text("a file")

    with pytest.raises(StorageError, match="is a file, not a folder"):
        pack(folders, tmp_path / "out")


def test_a_destination_below_a_file_is_refused(folders, tmp_path):
    (tmp_path / "out").write_text("a file")

    with pytest.raises(StorageError, match=f"{tmp_path}/out is a file, not a folder") as caught:
        pack(folders, tmp_path / "out" / "sub" / "deep")

    assert caught.value.exit_code == 2


def test_a_destination_without_permission_is_refused(folders, tmp_path):
    (tmp_path / "mine").mkdir(mode=0o555)
    # Nothing on a disk is forbidden to root.
    place = Path("/proc") if os.geteuid() == 0 else tmp_path / "mine"

    with pytest.raises(StorageError, match=f"cannot write {place}/out") as caught:
        pack(folders, place / "out")

    assert f"ls -ld {place}" in caught.value.hint


FULL = """
import resource, signal, sys
from pathlib import Path
from convnext_cli.data.pack import pack
from convnext_cli.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    pack(Path(sys.argv[1]), Path(sys.argv[2]))
except StorageError as error:
    print(error, "|", error.hint)
"""


def test_a_disk_that_takes_no_more_is_told_and_leaves_no_half_shard(tmp_path):
    images = write_folders(tmp_path / "images", {"a": 20, "b": 20})
    out = tmp_path / "out"

    done = subprocess.run(
        [sys.executable, "-c", FULL, str(images), str(out)], capture_output=True, text=True
    )

    assert os.strerror(errno.EFBIG) in done.stdout, done.stderr
    assert "df -h" in done.stdout
    assert content(out).keys() == {"pack-state/lock", "pack-state/plan.json"}
    assert pack(images, out).card.splits["train"].images == 40


def test_a_source_is_listed_without_opening_an_image(folders):
    (folders / "train" / "a" / "text.jpg").write_text("no image")

    assert len(list_source(folders).samples) == 19


def test_real_photos_are_packed_byte_for_byte(shared_data, tmp_path):
    with zipfile.ZipFile(shared_data / "imagenet-200.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".JPEG")][:12]
        archive.extractall(tmp_path, names)

    packed = pack(tmp_path / "imagenet", tmp_path / "out")

    assert packed.card.splits["train"].images == 12
    assert list(packed.card.classes) == sorted(Path(name).parent.name for name in names)
    for sample in read_samples(tmp_path / "out", "train"):
        source = tmp_path / "imagenet" / json.loads(sample["json"])["source"]
        assert sample["jpg"] == source.read_bytes()
