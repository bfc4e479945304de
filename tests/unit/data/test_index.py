"""Scanning shards and keeping their index."""

import hashlib
import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from xxhash import xxh3_64_intdigest

from convnext_cli.data.index import (
    find_label_source,
    iter_members,
    read_index,
    scan_shard,
    scan_stream,
    write_index,
)
from convnext_cli.errors import DataError


def write_tar(path: Path, members: list[tuple[str, bytes]], *, kind=tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(key: str, label: int, image: bytes = b"image") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.cls", str(label).encode()), (f"{key}.json", b"{}")]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = [*sample("a/0", 3, b"first"), *sample("a/1", 0, b"second one"), *sample("b/0", 12)]
    return write_tar(tmp_path / "train-000000.tar", members)


def test_a_scan_finds_every_sample_and_where_its_image_lies(shard):
    index = scan_shard(shard).index

    assert list(index.keys) == ["a/0", "a/1", "b/0"]
    assert index.labels.tolist() == [3, 0, 12]
    data = shard.read_bytes()
    images = [
        data[at : at + size] for at, size in zip(index.image_offset, index.image_bytes, strict=True)
    ]
    assert images == [b"first", b"second one", b"image"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_in_every_tar_format(tmp_path, kind):
    key = "/".join(["folder" * 5] * 4) + "/na\nme"
    shard = write_tar(tmp_path / "s.tar", sample(key, 1), kind=kind)

    assert list(scan_shard(shard).index.keys) == [key]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_labels_that_are_no_utf8_stay_apart(tmp_path, kind):
    members = []
    for letter in (b"\xe8", b"\xe9"):
        key = os.fsdecode(b"caf" + letter)
        members += [(f"{key}.jpg", b"image"), (f"{key}.cls", letter)]

    scan = scan_shard(write_tar(tmp_path / "s.tar", members, kind=kind), names=True)

    assert scan.index.keys == [r"caf\xe8", r"caf\xe9"]
    assert scan.label_texts == (r"\xe8", r"\xe9")


def test_every_flipped_bit_of_a_header_is_refused(shard):
    data = shard.read_bytes()
    second_header = 1024  # after the first header and the padded first image
    for byte in (0, 100, 124, 135, 148, 156, 200, 511):
        damaged = bytearray(data)
        damaged[second_header + byte] ^= 1
        shard.write_bytes(damaged)

        with pytest.raises(DataError, match=r"header at byte 1,024 is damaged|is cut"):
            scan_shard(shard)


def test_a_zeroed_header_is_not_taken_for_the_end_of_the_shard(shard):
    damaged = bytearray(shard.read_bytes())
    damaged[3072:4096] = bytes(1024)  # the second sample's first header and image
    shard.write_bytes(damaged)

    with pytest.raises(DataError, match=r"header at byte 3,072 is zeroed: data follow"):
        scan_shard(shard)


@pytest.mark.parametrize("end", [0, 100, 512, 1024, 2000, 3072])
def test_a_shard_that_is_cut_anywhere_is_refused(shard, end):
    shard.write_bytes(shard.read_bytes()[:end])

    with pytest.raises(DataError, match="is cut"):
        scan_shard(shard)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("a.jpg", b"x"), ("b.cls", b"1")], "sample a has no label"),
        ([("a.cls", b"1")], "sample a has no image"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1"), ("b.cls", b"1")], "has no label"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "the label is 'cat', not a class number"),
        ([("a.jpg", b"x"), ("a.cls", b"")], "sample a has an empty label"),
        ([("a.jpg", b"x"), ("a.cls", "²".encode())], "the label is '²', not a class number"),
        ([("a.jpg", b"x"), ("a.cls", b"9" * 9000)], "the label is '9+', not a class number"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "the label is '-1', not a class number"),
        ([("a.jpg", b"x"), ("a.cls", b"9" * 20)], "the label is '9+', not a class number"),
        ([("a.jpg", b"x"), ("a.jpg", b"y"), ("a.cls", b"1")], r"a\.jpg is a second image"),
        ([("a.jpg", b"x"), ("a.png", b"y"), ("a.cls", b"1")], r"a\.png is a second image of its"),
        ([*sample("a", 1), *sample("b", 1), *sample("a", 1)], "sample a comes twice"),
    ],
)
def test_samples_that_are_not_whole_are_refused(tmp_path, members, sentence):
    shard = write_tar(tmp_path / "s.tar", members)

    with pytest.raises(DataError, match=sentence):
        scan_shard(shard)


def test_an_html_page_and_an_absent_file_are_no_shards(tmp_path):
    page = tmp_path / "page.tar"
    page.write_text("<html>404</html>" * 100)

    with pytest.raises(DataError, match="header at byte 0 is damaged, or it is no tar"):
        scan_shard(page)
    with pytest.raises(DataError, match="No such file"):
        scan_shard(tmp_path / "absent.tar")


def test_a_tar_inside_a_tar_is_read_in_place(tmp_path):
    inner = write_tar(tmp_path / "n01.tar", [("one.JPEG", b"11"), ("two.JPEG", b"222")])
    outer = write_tar(tmp_path / "outer.tar", [("n01.tar", inner.read_bytes())])

    with outer.open("rb") as file:
        (whole,) = iter_members(file, where="outer")
        end = whole.offset + whole.size
        members = list(iter_members(file, where="inner", begin=whole.offset, end=end))
        content = []
        for member in members:
            file.seek(member.offset)
            content.append((member.name, file.read(member.size)))

    assert content == [("one.JPEG", b"11"), ("two.JPEG", b"222")]


def test_an_index_is_read_as_it_was_written_and_gives_the_same_bytes(shard, tmp_path):
    index = replace(scan_shard(shard).index, width=np.array([4, 5, 6], dtype=np.int32))
    write_index(index, tmp_path / "a.npz")
    write_index(index, tmp_path / "b.npz")

    again = read_index(tmp_path / "a.npz")

    assert list(again.keys) == list(index.keys)
    for column in ("labels", "image_offset", "image_bytes", "width", "height"):
        assert np.array_equal(getattr(again, column), getattr(index, column))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_damaged_index_is_refused(shard, tmp_path):
    write_index(scan_shard(shard).index, tmp_path / "a.npz")
    data = (tmp_path / "a.npz").read_bytes()

    for content in (b"", b"no zip", data[: len(data) // 2]):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(DataError, match="index cannot be read"):
            read_index(tmp_path / "a.npz")


def test_no_flipped_bit_of_an_index_is_a_surprise(shard, tmp_path):
    index = scan_shard(shard).index
    write_index(index, tmp_path / "a.npz")
    data = (tmp_path / "a.npz").read_bytes()
    refused = 0

    for bit in range(0, 8 * len(data), 31):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.npz").write_bytes(damaged)
        try:
            again = read_index(tmp_path / "a.npz")
        except DataError:
            refused += 1
        else:  # a bit without a meaning, such as a time
            assert again.labels.tolist() == index.labels.tolist()
            assert list(again.keys) == list(index.keys)

    assert refused > 100


def test_an_index_with_columns_of_several_lengths_is_refused(shard, tmp_path):
    write_index(replace(scan_shard(shard).index, width=np.array([4, 5])), tmp_path / "a.npz")

    with pytest.raises(DataError, match="its columns differ in length"):
        read_index(tmp_path / "a.npz")


def test_an_index_is_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", key_text=np.array([print], dtype=object))

    with pytest.raises(DataError, match="index cannot be read"):
        read_index(tmp_path / "a.npz")


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"])
def test_a_compressed_shard_is_refused_and_never_unpacked(tmp_path, magic):
    (tmp_path / "bomb.tar").write_bytes(magic + bytes(2000))

    with pytest.raises(DataError, match="the shard is compressed"):
        scan_shard(tmp_path / "bomb.tar")


def test_a_name_with_dots_ends_at_the_first(tmp_path):
    members = [("a/x.seg.png", b"mask"), ("a/x.jpg", b"image"), ("a/x.cls", b"3")]

    scan = scan_shard(write_tar(tmp_path / "s.tar", members))

    assert scan.index.keys == ["a/x"]
    assert dict(scan.skipped) == {".seg.png": 1}


def test_a_scan_gives_the_hash_the_digests_and_the_sizes_in_one_pass(tmp_path):
    sink = io.BytesIO()
    Image.new("RGB", (31, 17)).save(sink, "PNG")
    image = sink.getvalue()
    shard = write_tar(
        tmp_path / "s.tar",
        [("a.png", image), ("a.cls", b"1"), ("b.jpg", b"no image"), ("b.cls", b"0")],
    )

    scan = scan_shard(shard)

    assert scan.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert scan.num_bytes == shard.stat().st_size
    assert scan.index.digest.tolist() == [
        xxh3_64_intdigest(image),
        xxh3_64_intdigest(b"no image"),
    ]
    assert list(zip(scan.index.width, scan.index.height, strict=True)) == [(31, 17), (0, 0)]
    assert scan.unreadable == 1


def test_a_member_that_says_it_is_larger_than_the_shard_is_refused(shard):
    data = bytearray(shard.read_bytes())
    data[124:136] = b"77777777777\0"
    header = bytes(data[:512])
    checksum = sum(header[:148]) + 8 * 32 + sum(header[156:])
    data[148:156] = f"{checksum:06o}\0 ".encode()
    shard.write_bytes(data)

    with pytest.raises(DataError, match="the member at byte 0 is cut or larger than 1,024 MiB"):
        scan_shard(shard)


def test_links_in_a_shard_are_counted_and_never_followed(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            tar.addfile(member)
        folder = tarfile.TarInfo("c")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in sample("c/0", 1):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

    scan = scan_shard(path)

    assert scan.index.keys == ["c/0"]
    assert dict(scan.skipped) == {"(link)": 2, ".json": 1}


@pytest.mark.parametrize(
    ("members", "source"),
    [
        ([("a.cls", b"1"), ("a.jpg", b""), ("a.json", b'{"label": 1}')], "cls"),
        ([("a.jpg", b""), ("a.json", b'{"id": 7, "label": 1}')], ("json", "label")),
        ([("a.jpg", b""), ("a.json", b'{"class": "cat"}'), ("a.txt", b"1")], ("json", "class")),
        ([("a.jpg", b""), ("a.json", b"[]"), ("a.txt", b"cat")], "txt"),
        ([("README.txt", b"read me"), ("a.jpg", b""), ("a.cls", b"1")], "cls"),
        ([("a.jpg", b""), ("b.jpg", b"")], "cls"),
    ],
)
def test_where_labels_are_is_seen_in_the_first_sample(tmp_path, members, source):
    shard = write_tar(tmp_path / "s.tar", members)

    with shard.open("rb") as file:
        assert find_label_source(file, where="s.tar") == source


def test_a_whole_number_with_a_point_is_a_class_number(tmp_path):
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", b""), ("a.json", b'{"x": 0.5, "label": 2.0}')])

    with shard.open("rb") as file:
        source = find_label_source(file, where="s.tar")

    assert source == ("json", "label")
    assert scan_shard(shard, labels=source).index.labels.tolist() == [2]


def test_a_json_without_a_label_is_told_with_the_fields_it_has(tmp_path):
    shard = write_tar(tmp_path / "s.tar", [("a.jpg", b""), ("a.json", b'{"species": "cat"}')])

    with shard.open("rb") as file, pytest.raises(DataError, match="sample a has no") as caught:
        find_label_source(file, where="s.tar")

    assert caught.value.hint.endswith("--label json:species")


def test_a_stream_that_ends_early_is_told_with_the_place(shard):
    cut = io.BytesIO(shard.read_bytes()[:2000])

    with pytest.raises(DataError, match="is cut at byte 2,000"):
        scan_stream(cut, where="stream", num_bytes=None)
