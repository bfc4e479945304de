"""Shards that others made: their layouts, their labels, and what is refused."""

import io
import json
import os
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import fsspec
import numpy as np
import pytest
from PIL import Image

from convnext_cli.data import foreign
from convnext_cli.data.audit import check_dataset
from convnext_cli.data.augment import EvalView
from convnext_cli.data.card import index_name, read_card
from convnext_cli.data.fetch import Store
from convnext_cli.data.foreign import (
    choose_split,
    choose_splits,
    common_root,
    index_shards,
    list_shards,
    parse_label_source,
)
from convnext_cli.data.index import read_index
from convnext_cli.data.reader import ImageReader
from convnext_cli.errors import DataError, Stopped

WNIDS = ("n01440764", "n01443537", "n01484850")


def jpeg(number: int) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (10, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(sink, "JPEG")
    return sink.getvalue()


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def timm_members(first: int, count: int) -> list[tuple[str, bytes]]:
    """As timm/imagenet-1k-wds: WNID_NUMBER.jpg, .cls and .json, in this order."""
    members = []
    for number in range(first, first + count):
        key = f"{WNIDS[number % 3]}_{number}"
        about = json.dumps({"label": number % 3, "filename": f"{key}.JPEG"}).encode()
        members += [(f"{key}.cls", str(number % 3).encode()), (f"{key}.jpg", jpeg(number))]
        members += [(f"{key}.json", about)]
    return members


@pytest.fixture
def timm_shards(tmp_path: Path) -> Path:
    folder = tmp_path / "wds"
    write_shard(folder / "imagenet1k-train-0000.tar", timm_members(0, 7))
    write_shard(folder / "imagenet1k-train-0001.tar", timm_members(7, 5))
    write_shard(folder / "imagenet1k-validation-00.tar", timm_members(100, 4))
    info = {
        "splits": {
            "train": {
                "filenames": ["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar"],
                "shard_lengths": [7, 5],
            }
        }
    }
    (folder / "_info.json").write_text(json.dumps(info))
    return folder


def index_all(shards: list[str], out: Path, *, labels=None, classes=None):
    train, val, _ = choose_splits(list_shards(shards), val=[])
    source = None if labels is None else parse_label_source(labels)
    return index_shards(train, val, out=out, labels=source, classes=classes, workers=1)


def reader_of(out: Path | str, split: str = "train", **cache: Path) -> ImageReader:
    store = Store(location=str(out), **cache)
    view = EvalView(image_px=8)
    return ImageReader(read_card(out), store=store, split=split, view=view, seed=0, on_bad="raise")


@pytest.mark.parametrize("info", [{"splits": ["train"]}, {"splits": {"train": 12}}, [], {}])
def test_sizes_in_another_form_than_timms_are_passed_over(timm_shards, tmp_path, info):
    (timm_shards / "_info.json").write_text(json.dumps(info))

    assert index_all([str(timm_shards)], tmp_path / "out").card.splits["train"].images == 12


def test_timms_imagenet_shards_are_indexed_where_they_lie(timm_shards, tmp_path):
    made = index_all([str(timm_shards)], tmp_path / "out")

    card = read_card(tmp_path / "out")
    assert card == made.card
    assert card.classes == WNIDS
    assert {name: split.images for name, split in card.splits.items()} == {"train": 12, "val": 4}
    assert card.splits["train"].class_images == (4, 4, 4)
    assert card.shards_at == str(timm_shards)
    assert dict(made.skipped) == {".json": 16}
    assert check_dataset(tmp_path / "out", deep=True).damage == ()


def test_indexed_shards_are_read_by_their_offsets(timm_shards, tmp_path):
    index_all([str(timm_shards)], tmp_path / "out")
    reader = reader_of(tmp_path / "out")

    data, label = reader.read(8)

    assert data == jpeg(8)
    assert label == 2
    assert reader.key(8) == "imagenet1k-train-0001.tar/n01484850_8"
    assert reader[0, 8].image_CHW.shape == (3, 8, 8)


def test_braces_name_shards_and_sub_folders_have_flat_indexes(tmp_path):
    for part in ("a", "b"):
        write_shard(tmp_path / "in" / part / "train-0.tar", timm_members(0, 3))

    made = index_all([f"{tmp_path}/in/{{a,b}}/train-0.tar"], tmp_path / "out")

    names = [shard.name for shard in made.card.splits["train"].shards]
    assert names == ["a/train-0.tar", "b/train-0.tar"]
    assert (tmp_path / "out" / "a--train-0.index.npz").is_file()
    assert made.notes[1:] == ("train: 3 keys come in several shards, too",)
    assert len(reader_of(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    ("labels", "member"),
    [
        ("cls", ("a.cls", b"cat")),
        ("txt", ("a.txt", b"cat\n")),
        ("json:class", ("a.json", b'{"class": "cat", "more": [1]}')),
    ],
)
def test_labels_may_be_names_in_several_places(tmp_path, labels, member):
    other = (member[0].replace("a.", "b."), member[1].replace(b"cat", b"dog"))
    write_shard(
        tmp_path / "in" / "x.tar", [("a.JPEG", jpeg(0)), member, ("b.JPEG", jpeg(1)), other]
    )

    made = index_all([str(tmp_path / "in")], tmp_path / "out", labels=labels)

    assert made.card == index_all([str(tmp_path / "in")], tmp_path / "found").card
    assert made.card.classes == ("cat", "dog")
    assert reader_of(tmp_path / "out").read(1)[1] == 1
    assert check_dataset(tmp_path / "out", deep=False).damage == ()


def test_classes_that_val_alone_has_are_told(tmp_path):
    for shard, names in (("train", (b"cat", b"dog")), ("val", (b"Cat", b"dog"))):
        members = [
            (f"{i}.{e}", jpeg(i) if e == "jpg" else name)
            for i, name in enumerate(names)
            for e in ("jpg", "cls")
        ]
        write_shard(tmp_path / "in" / f"{shard}.tar", members)

    made = index_all([str(tmp_path / "in")], tmp_path / "out")

    assert made.card.classes == ("Cat", "cat", "dog")
    assert "1 classes of val have no image in train, such as Cat" in made.notes


def test_given_classes_decide_the_numbers_of_names(tmp_path):
    write_shard(tmp_path / "in" / "x.tar", [("a.jpg", jpeg(0)), ("a.cls", b"cat")])

    made = index_all([str(tmp_path / "in")], tmp_path / "out", classes=["dog", "cat"])

    assert made.card.splits["train"].class_images == (0, 1)
    assert reader_of(tmp_path / "out").read(0)[1] == 1


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        (((4, 1), (5, 1)), "label 1 comes with n00000004 and n00000005"),
        (((4, 0), (4, 1)), "n00000004 comes with labels 0 and 1"),
        (((4, 0), (6, 2)), "1 labels come with none"),
    ],
)
def test_wnids_that_do_not_pair_with_labels_are_told_and_not_used(tmp_path, pairs, told):
    members = [
        (f"n0000000{wnid}_{label}.{ending}", data)
        for wnid, label in pairs
        for ending, data in (("jpg", jpeg(wnid)), ("cls", str(label).encode()))
    ]
    write_shard(tmp_path / "in" / "x.tar", members)

    made = index_all([str(tmp_path / "in")], tmp_path / "out")

    assert made.card.classes == tuple(map(str, range(max(label for _, label in pairs) + 1)))
    assert told in made.notes[0]


def test_wnids_name_classes_also_where_validation_keys_have_none(timm_shards, tmp_path):
    members = [("ILSVRC2012_val_1.jpg", jpeg(1)), ("ILSVRC2012_val_1.cls", b"2")]
    write_shard(timm_shards / "imagenet1k-validation-00.tar", members)

    assert index_all([str(timm_shards)], tmp_path / "out").card.classes == WNIDS


def test_class_numbers_without_a_sample_are_told(tmp_path):
    members = [(f"{n}.{e}", d) for n in (1, 2) for e, d in (("jpg", b""), ("cls", b"%d" % n))]
    write_shard(tmp_path / "in" / "x.tar", members)

    made = index_all([str(tmp_path / "in")], tmp_path / "out")

    assert made.notes[1] == "1 of 3 class numbers have no sample, as 0"


def test_what_was_scanned_is_not_read_again_after_an_interruption(timm_shards, tmp_path):
    late = timm_shards / "imagenet1k-validation-00.tar"
    whole = late.read_bytes()
    late.write_bytes(whole[:2000])
    with pytest.raises(DataError, match=r"validation-00\.tar"):
        index_all([str(timm_shards)], tmp_path / "out")
    late.write_bytes(whole)

    made = index_all([str(timm_shards)], tmp_path / "out")

    assert made.reused_shards == 2
    assert read_card(tmp_path / "out").splits["val"].images == 4


def test_where_all_is_done_nothing_is_read_or_written_again(timm_shards, tmp_path):
    first = index_all([str(timm_shards)], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npz")}

    again = index_all([str(timm_shards)], tmp_path / "out")

    assert again.reused_shards == 3
    assert again.card == first.card
    assert again.skipped == first.skipped
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_shard_that_changed_is_scanned_again(timm_shards, tmp_path):
    index_all([str(timm_shards)], tmp_path / "out")
    write_shard(timm_shards / "imagenet1k-validation-00.tar", timm_members(200, 9))

    made = index_all([str(timm_shards)], tmp_path / "out")

    assert made.reused_shards == 2
    assert made.card.splits["val"].images == 9
    assert check_dataset(tmp_path / "out", deep=False).damage == ()


def test_a_shard_on_the_web_that_changed_is_scanned_again(web_address, timm_shards, tmp_path):
    shard = timm_shards / "imagenet1k-train-0001.tar"
    urls = [f"{web_address}/imagenet1k-train-{{0000..0001}}.tar"]
    index_all(urls, tmp_path / "out")
    os.utime(shard, (1, 1))

    assert index_all(urls, tmp_path / "out").reused_shards == 1


def test_a_field_that_no_sample_has_is_told_with_how_to_name_another(timm_shards, tmp_path):
    with pytest.raises(
        DataError, match=r"the \.json of sample .* has no label under 'breed'"
    ) as told:
        index_all([str(timm_shards)], tmp_path / "out", labels="json:breed")

    assert "--label json:FIELD" in told.value.hint


def test_other_labels_are_scanned_and_other_classes_only_renamed(timm_shards, tmp_path):
    index_all([str(timm_shards)], tmp_path / "out")

    by_json = index_all([str(timm_shards)], tmp_path / "out", labels="json:label")
    named = index_all(
        [str(timm_shards)], tmp_path / "out", labels="json:label", classes=["a", "b", "c"]
    )

    assert (by_json.reused_shards, named.reused_shards) == (0, 3)
    assert named.card.classes == ("a", "b", "c")
    assert check_dataset(tmp_path / "out", deep=False).damage == ()


def test_a_kill_while_other_labels_are_scanned_leaves_nothing_of_them(tmp_path, monkeypatch):
    members = [
        (f"{number}.{ending}", data)
        for number in range(4)
        for ending, data in (
            ("jpg", jpeg(number)),
            ("cls", str(number % 2).encode()),
            ("json", json.dumps({"half": number // 2}).encode()),
        )
    ]
    write_shard(tmp_path / "wds" / "train-0000.tar", members)
    index_all([str(tmp_path / "wds")], tmp_path / "out")
    with monkeypatch.context() as patch:
        # before the record of the shard, the last of its files
        patch.setattr(foreign, "write_json", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(Stopped):
            index_all([str(tmp_path / "wds")], tmp_path / "out", labels="json:half")

    index_all([str(tmp_path / "wds")], tmp_path / "out")

    labels = [label for _, label in reader_of(tmp_path / "out").names(range(4))]
    assert labels == [0, 1, 0, 1]


def test_a_node_that_has_an_index_fetches_the_one_of_other_classes(tmp_path):
    members = [("a.jpg", jpeg(0)), ("a.cls", b"cat"), ("b.jpg", jpeg(1)), ("b.cls", b"dog")]
    write_shard(tmp_path / "wds" / "train-0000.tar", members)
    files = fsspec.filesystem("memory")
    seen = []
    for classes in (["cat", "dog"], ["dog", "cat"]):
        index_all([str(tmp_path / "wds")], tmp_path / "out", classes=classes)
        for path in (tmp_path / "out").glob("*.*"):
            files.pipe(f"/out/{path.name}", path.read_bytes())
        reader = reader_of("memory://out", cache_dir=tmp_path / "cache")
        seen.append([label for _, label in reader.names([0, 1])])
    files.rm("/out", recursive=True)

    assert seen == [[0, 1], [1, 0]]


def test_a_card_never_stands_beside_indexes_that_are_not_its_own(timm_shards, tmp_path):
    index_all([str(timm_shards)], tmp_path / "out")
    shard = timm_shards / "imagenet1k-train-0000.tar"
    shard.write_bytes(shard.read_bytes()[:5000])

    with pytest.raises(DataError, match="is cut"):
        index_all([str(timm_shards)], tmp_path / "out")

    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_packed_data_set_is_not_written_over(tiny_shards):
    with pytest.raises(DataError, match="holds a packed data set"):
        index_all([str(tiny_shards)], tiny_shards)


def test_shards_whose_indexes_would_have_one_name_are_refused(tmp_path):
    for name in ("a/b.tar", "a--b.tar"):
        write_shard(tmp_path / "in" / name, timm_members(0, 3))

    with pytest.raises(DataError, match=r"would have one index, a--b\.index\.npz"):
        index_all([f"{tmp_path}/in/{{a/b,a--b}}.tar"], tmp_path / "out")


def test_a_shard_without_samples_is_told_and_left_out(timm_shards, tmp_path):
    write_shard(timm_shards / "imagenet1k-train-0002.tar", [])

    made = index_all([str(timm_shards)], tmp_path / "out")

    assert "imagenet1k-train-0002.tar holds no sample" in made.notes
    assert len(made.card.splits["train"].shards) == 2


@pytest.fixture
def web_address(timm_shards):
    """The shards behind a web server that gives no ranges."""
    handler = partial(QuietHandler, directory=str(timm_shards))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_shards_on_the_web_are_indexed_by_braces(web_address, timm_shards, tmp_path):
    made = index_all(
        [
            f"{web_address}/imagenet1k-train-{{0000..0001}}.tar",
            f"{web_address}/imagenet1k-validation-00.tar",
        ],
        tmp_path / "far",
    )

    near = index_all([str(timm_shards)], tmp_path / "near")
    assert made.card.shards_at == web_address
    assert made.card.fingerprint == near.card.fingerprint


def test_a_shard_that_is_not_on_the_web_is_told(web_address, tmp_path):
    with pytest.raises(DataError, match=r"/absent\.tar: there is no such file"):
        index_all([f"{web_address}/absent.tar"], tmp_path / "out")


def test_a_server_that_does_not_answer_is_asked_again_and_told(monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda _: None)

    with pytest.raises(DataError, match=r"a\.tar: ClientConnectorError \(5 tries\)"):
        index_all(["http://127.0.0.1:1/a.tar"], tmp_path / "out")


def test_a_protocol_that_nobody_knows_is_told(tmp_path):
    with pytest.raises(DataError, match="this protocol cannot be read"):
        index_all(["nosuch://x/a.tar"], tmp_path / "out")


def test_a_shard_behind_a_url_is_scanned_as_a_local_one(timm_shards, tmp_path):
    memory = fsspec.filesystem("memory")
    for shard in timm_shards.glob("*.tar"):
        memory.pipe(f"/bucket/{shard.name}", shard.read_bytes())

    made = index_all(["memory://bucket"], tmp_path / "far")
    index_all([str(timm_shards)], tmp_path / "near")

    assert made.card.shards_at is not None
    assert made.card.shards_at.startswith("memory://")
    for shard in made.card.splits["train"].shards:
        name = index_name(shard.name)
        far, near = (read_index(tmp_path / place / name) for place in ("far", "near"))
        assert np.array_equal(far.digest, near.digest)
        assert far.keys == near.keys


def test_counts_are_held_against_those_that_the_data_set_says(timm_shards, tmp_path):
    write_shard(timm_shards / "imagenet1k-train-0001.tar", timm_members(7, 4))

    with pytest.raises(DataError, match=r"train-0001\.tar: 4 samples, but _info\.json says 5"):
        index_all([str(timm_shards)], tmp_path / "out")


@pytest.mark.parametrize(
    ("urls", "told"),
    [
        (["pipe:cat x.tar"], "a pipe: URL runs a shell command"),
        (["/nowhere/at/all"], "there is no /nowhere/at/all"),
        (["/x/*.tar"], r"/x/\*.tar: patterns with \* are not read"),
        (["/x/a.tar", "file:///x/{a,b}.tar"], "/x/a.tar is named twice"),
        (["nosuch://x/y"], "nosuch://x/y: its shards cannot be listed"),
        (["/x/{0..3.tar"], "Unbalanced braces"),
        (["https://me:secret@host/x.tar"], "https://host/x.tar: an address with a password"),
        (["https://host/x.tar?sig=abc"], "https://host/x.tar: an address with a password"),
    ],
)
def test_shards_that_cannot_be_listed_are_refused(urls, told):
    with pytest.raises(DataError, match=told):
        list_shards(urls)


def test_a_folder_without_shards_says_where_they_are(tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train-0.tar.gz").write_bytes(b"\x1f\x8b")
    write_shard(tmp_path / "parted" / "my train" / "0.tar", timm_members(0, 3))
    (tmp_path / "bare").mkdir()

    for name, told, hint in (
        ("packed", r"train-0\.tar\.gz is compressed", "unpack it first"),
        ("packed/train-0.tar.gz", r"train-0\.tar\.gz is compressed", "unpack it first"),
        ("parted", "there is no .tar file in it", f"'{tmp_path}/parted/my train'"),
        ("bare", "there is no .tar file in it", "convnext data pack"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            list_shards([str(tmp_path / name)])
        assert hint in caught.value.hint


def test_a_folder_may_have_brackets_in_its_name_and_hidden_files(tmp_path):
    shard = write_shard(tmp_path / "photos [1]" / "train-0.tar", timm_members(0, 3))
    (shard.parent / "._train-0.tar").write_bytes(b"what macOS leaves beside a copy")

    assert list_shards([str(shard.parent)]) == [str(shard)]


def test_an_unknown_place_of_labels_is_refused():
    with pytest.raises(DataError, match="labels are in cls, txt or json:FIELD"):
        parse_label_source("pickle")


def test_shards_without_a_folder_in_common_are_refused():
    with pytest.raises(DataError, match="no folder in common"):
        common_root(["s3://a/x.tar", "s3://b/x.tar"])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet1k-train-0001.tar", "train"),
        ("imagenet1k-validation-00.tar", "val"),
        ("val_000.tar", "val"),
        ("test-3.tar", "test"),
        ("carnivals-01.tar", "train"),
        ("shard-0001.tar", "train"),
        ("val/0001.tar", "val"),
        ("test/a/0001.tar", "test"),
        ("test/train/0001.tar", "train"),
        ("test/train-0001.tar", "train"),
        ("training/val-0001.tar", "val"),
        ("testing/0001.tar", "test"),
    ],
)
def test_the_split_is_read_from_the_name_of_a_shard_or_of_its_folder(name, split):
    root = "https://host/valid"

    assert choose_split(f"{root}/{name}", root=root) == split


@pytest.mark.parametrize(
    ("names", "asked", "train", "val", "told"),
    [
        ("train a test", "", "train a", "test", ""),
        ("train val test", "", "train", "val", "not indexed: 1 test shards"),
        ("val-1 valid-2", "", "", "val-1 valid-2", ""),
        ("train val a", "a", "train val", "a", "trained on: 1 shards named val or test"),
        ("test-1 test-2", "test-2", "test-1", "test-2", ""),
        ("a", "a", "", "a", ""),
    ],
)
def test_test_shards_are_for_validation_only_where_no_others_are(names, asked, train, val, told):
    def urls(words: str) -> list[str]:
        return [f"/data/{word}.tar" for word in words.split()]

    *chosen, notes = choose_splits(urls(names), val=urls(asked))

    assert chosen == [urls(train), urls(val)]
    assert [note.partition(" (")[0] for note in notes] == ([told] if told else [])


@pytest.mark.parametrize(
    ("labels", "classes", "told"),
    [
        (["0", "7"], ["one", "two"], "sample 1: label '7' is none of the 2 classes"),
        (["one", "six"], ["one", "two"], "sample 1: label 'six' is none of the 2 classes"),
        (["0", "-1"], None, "sample 1: label '-1': labels are class numbers from 0, or all"),
        (["0", "cat"], None, "sample 1: label 'cat': labels are class numbers from 0, or all"),
        (["0", "9" * 20], None, "sample 1: label '9+': labels are class numbers from 0"),
        (["0", "2147483647"], None, "sample 1: label '2147483647' is beyond 1,000,000 classes"),
        (["0", ""], None, "sample 1 has an empty label"),
        (["0", "0"], None, "sample 0: label '0' is the only class, but 2 or more are needed"),
        (["cat", "cat"], None, "sample 0: label 'cat' is the only class"),
    ],
)
def test_labels_that_make_no_class_are_refused_with_their_sample(tmp_path, labels, classes, told):
    members = []
    for key, label in enumerate(labels):
        members += [(f"{key}.jpg", b""), (f"{key}.cls", label.encode())]
    write_shard(tmp_path / "in" / "x.tar", members)

    with pytest.raises(DataError, match=rf"x\.tar: {told}") as caught:
        index_all([str(tmp_path / "in")], tmp_path / "out", classes=classes)

    assert caught.value.hint


def test_no_member_but_images_and_labels_is_ever_opened(tmp_path):
    canary = tmp_path / "canary"
    payload = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    members = [("a.jpg", jpeg(0)), ("a.cls", b"1")]
    members += [(f"a.{ending}", payload) for ending in ("pkl", "pyd", "pth", "npy", "json", "txt")]
    write_shard(tmp_path / "in" / "x.tar", members)

    made = index_all([str(tmp_path / "in")], tmp_path / "out")

    assert sum(made.skipped.values()) == 6
    assert not canary.exists()


def test_names_that_climb_out_of_a_folder_are_only_names(tmp_path):
    members = [
        (f"{name}.{ending}", data)
        for name in ("../../etc/x", "/abs/y")
        for ending, data in (("jpg", jpeg(0)), ("cls", b"1"))
    ]
    write_shard(tmp_path / "in" / "x.tar", members)

    index_all([str(tmp_path / "in")], tmp_path / "out")

    assert [key for key, _ in reader_of(tmp_path / "out").names([0, 1])] == [
        "x.tar/../../etc/x",
        "x.tar//abs/y",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dataset.json",
        "index-state",
        "x.index.npz",
    ]
    assert not (tmp_path / "etc").exists()
