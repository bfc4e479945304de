"""Every kind of damage to a shard is an error that names the place or the sample.

A streaming tar reader gives the first half of most of these shards and says nothing.
"""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_cli.data.foreign import index_shards
from convnext_cli.data.index import scan_shard, scan_stream
from convnext_cli.errors import DataError

SAMPLES = 10
HALF = SAMPLES // 2


def make_members() -> list[tuple[str, bytes]]:
    """Ten samples: an image of a bit more than one block, and its label."""
    members = []
    for number in range(SAMPLES):
        sink = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(sink, "JPEG")
        members += [(f"{number}.jpg", sink.getvalue()), (f"{number}.cls", b"%d" % (number % 3))]
    return members


def make_tar(members: list[tuple[str, bytes]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


MEMBERS = make_members()
SHARD = make_tar(MEMBERS)
with tarfile.open(fileobj=io.BytesIO(SHARD)) as opened:
    IMAGE, LABEL = opened.getmember(f"{HALF}.jpg"), opened.getmember(f"{HALF}.cls")
IMAGE_AT, DATA_AT, LABEL_AT = IMAGE.offset, IMAGE.offset_data, LABEL.offset


def flip(place: int) -> bytes:
    data = bytearray(SHARD)
    data[place] ^= 1
    return bytes(data)


def zero(begin: int) -> bytes:
    return SHARD[:begin] + bytes(1024) + SHARD[begin + 1024 :]


def change_label(text: bytes) -> bytes:
    return make_tar([(name, text if name == f"{HALF}.cls" else data) for name, data in MEMBERS])


DAMAGES = {
    "bit of a name": (flip(IMAGE_AT), f"the header at byte {IMAGE_AT:,} is damaged"),
    "bit of a size": (flip(IMAGE_AT + 130), f"the header at byte {IMAGE_AT:,} is damaged"),
    "bit of a kind": (flip(IMAGE_AT + 156), f"the header at byte {IMAGE_AT:,} is damaged"),
    "zeroed header": (zero(IMAGE_AT), f"the header at byte {IMAGE_AT:,} is zeroed"),
    "zeroed label header": (zero(LABEL_AT), f"the header at byte {LABEL_AT:,} is zeroed"),
    "cut between samples": (SHARD[:IMAGE_AT], f"cut at byte {IMAGE_AT:,}"),
    "cut in a header": (SHARD[: IMAGE_AT + 200], f"cut at byte {IMAGE_AT + 200:,}"),
    "cut before data": (SHARD[:DATA_AT], f"the member at byte {IMAGE_AT:,} is cut"),
    "cut in data": (SHARD[: DATA_AT + 77], f"the member at byte {IMAGE_AT:,} is cut"),
    "cut between image and label": (SHARD[:LABEL_AT], f"cut at byte {LABEL_AT:,}"),
    "empty": (b"", "cut at byte 0"),
    "web page": (b"<!DOCTYPE html><html>Sign in</html>" * 99, "the header at byte 0 is damaged"),
    "compressed": (gzip.compress(SHARD), "the shard is compressed"),
    "compressed bomb": (gzip.compress(bytes(1 << 24)), "the shard is compressed"),
    "two shards": (SHARD + SHARD, "data follow this end mark"),
    "member twice in a row": (
        make_tar([*MEMBERS[:3], MEMBERS[2], *MEMBERS[3:]]),
        r"1\.jpg is a second image of its sample",
    ),
    "sample twice apart": (make_tar([*MEMBERS, *MEMBERS[2:4]]), "sample 1 comes twice"),
    "images first": (make_tar([*MEMBERS[::2], *MEMBERS[1::2]]), "sample 0 has no label"),
    "no label": (make_tar([*MEMBERS[:3], *MEMBERS[4:]]), "sample 1 has no label"),
    "no image": (make_tar([*MEMBERS[:2], *MEMBERS[3:]]), "sample 1 has no image"),
    "empty label": (change_label(b" \n"), f"sample {HALF} has an empty label"),
    "negative label": (change_label(b"-1"), f"sample {HALF}: (the )?label (is )?'-1'"),
    "text label": (change_label(b"cat"), f"sample {HALF}: (the )?label (is )?'cat'"),
    "fraction": (change_label(b"1.5"), f"sample {HALF}: (the )?label (is )?'1.5'"),
    "binary label": (change_label(b"\x80\x04K\x01."), f"sample {HALF}: (the )?label "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_when_a_shard_is_scanned(tmp_path, damage):
    content, told = DAMAGES[damage]
    (tmp_path / "x.tar").write_bytes(content)

    with pytest.raises(DataError, match=rf"x\.tar: .*{told}") as caught:
        scan_shard(tmp_path / "x.tar")

    assert caught.value.hint


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_when_a_shard_is_indexed_and_no_card_is_written(tmp_path, damage):
    content, told = DAMAGES[damage]
    sound, bad = tmp_path / "sound.tar", tmp_path / "x.tar"
    sound.write_bytes(make_tar([("good.jpg", b"-"), ("good.cls", b"1")]))
    bad.write_bytes(content)

    with pytest.raises(DataError, match=told) as caught:
        index(sound, bad, out=tmp_path / "out")

    assert caught.value.hint
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.parametrize(
    "damage", [name for name, (content, _) in DAMAGES.items() if len(content) < len(SHARD)]
)
def test_damage_is_refused_in_a_stream_of_unknown_length(damage):
    with pytest.raises(DataError):
        scan_stream(io.BytesIO(DAMAGES[damage][0]), where="stream", num_bytes=None)


def test_a_label_beyond_the_classes_is_refused_with_its_sample(tmp_path):
    (tmp_path / "x.tar").write_bytes(change_label(b"7"))

    with pytest.raises(DataError, match=rf"x\.tar: sample {HALF}: label '7' is none of the 3"):
        index(tmp_path / "x.tar", out=tmp_path / "out", classes=["a", "b", "c"])


def test_a_shard_cut_at_any_block_is_refused(tmp_path):
    end = SHARD.index(bytes(1024), LABEL_AT + 4096)
    path = tmp_path / "x.tar"

    for cut in range(0, end, 256):
        path.write_bytes(SHARD[:cut])
        with pytest.raises(DataError, match="is cut"):
            scan_shard(path)


def test_a_flipped_bit_anywhere_changes_what_a_scan_gives_or_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(SHARD)
    whole = scan_shard(path)
    places = np.random.default_rng(0).integers(0, len(SHARD), 200)

    for place in places.tolist():
        path.write_bytes(flip(place))
        try:
            scan = scan_shard(path)
        except DataError:
            continue
        assert scan.sha256 != whole.sha256
        changed = np.flatnonzero(scan.index.digest != whole.index.digest)
        begin = whole.index.image_offset
        inside = np.flatnonzero((begin <= place) & (place < begin + whole.index.image_bytes))
        assert changed.tolist() == inside.tolist()


@pytest.mark.parametrize("name", ["../../etc/x", "/abs/x", "..", "a/../x", "-rf"])
def test_a_name_like_a_path_is_a_key_and_nothing_else(tmp_path, name):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "x.tar"
    path.write_bytes(make_tar([(f"{name}/x.jpg", b"-"), (f"{name}/x.cls", b"1")]))

    made = index(path, out=tmp_path / "out")

    assert made.card.splits["train"].images == 1
    assert scan_shard(path).index.keys == [f"{name}/x"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in", "out"]


def test_a_name_with_several_dots_ends_its_key_at_the_first(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(make_tar([("a.jpg", b"-"), ("a.1.jpg", b"other"), ("a.cls", b"0")]))

    scan = scan_shard(path)

    assert scan.index.keys == ["a"]
    assert scan.skipped == {".1.jpg": 1}


def index(*shards: Path, out: Path, classes: list[str] | None = None):
    urls = [str(path) for path in shards]
    return index_shards(urls, [], out=out, labels="cls", classes=classes, workers=1)
