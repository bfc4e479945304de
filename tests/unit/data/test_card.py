"""The card of a packed data set."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from convnext_cli.data.card import (
    DatasetCard,
    Shard,
    Split,
    index_name,
    read_card,
    shards_location,
    write_card,
)
from convnext_cli.errors import DataError

SHARD = Shard(name="train-000000.tar", images=3, bytes=10240, sha256="ab" * 32)
CARD = DatasetCard(
    classes=("cat", "dog"),
    splits={"train": Split(name="train", shards=(SHARD,), class_images=(1, 2))},
    options={"seed": 0},
)


def test_a_card_is_read_as_it_was_written(tmp_path):
    write_card(CARD, tmp_path)

    card = read_card(tmp_path)

    assert card == CARD
    assert card.splits["train"].images == 3
    assert card.fingerprint == CARD.fingerprint


def test_a_card_is_read_through_a_url(tmp_path):
    write_card(CARD, tmp_path)

    assert read_card(f"file://{tmp_path}/") == CARD


def test_the_fingerprint_changes_with_a_class_and_with_a_byte_of_a_shard():
    renamed = DatasetCard(("cat", "wolf"), CARD.splits, CARD.options)
    shard = Shard(SHARD.name, SHARD.images, SHARD.bytes, "cd" * 32)
    other = DatasetCard(CARD.classes, {"train": Split("train", (shard,), (1, 2))}, CARD.options)
    repacked = DatasetCard(CARD.classes, CARD.splits, {"seed": 1})

    assert len({CARD.fingerprint, renamed.fingerprint, other.fingerprint}) == 3
    assert repacked.fingerprint == CARD.fingerprint


def test_the_fingerprint_changes_with_an_index_and_stays_where_its_digest_is_not_known():
    def fingerprint(digest: str | None) -> str:
        shard = replace(SHARD, index_sha256=digest)
        return replace(CARD, splits={"train": Split("train", (shard,), (1, 2))}).fingerprint

    assert len({CARD.fingerprint, fingerprint("12" * 32), fingerprint("34" * 32)}) == 3
    assert fingerprint(None) == CARD.fingerprint
    # of the first cards, by hand
    plain = f"cat\ndog\ntrain train-000000.tar 3 {'ab' * 32}"
    assert CARD.fingerprint == hashlib.sha256(plain.encode()).hexdigest()


def test_the_index_lies_beside_its_shard():
    assert index_name("train-000012.tar") == "train-000012.index.npz"


def test_shards_lie_beside_the_card_or_where_it_says(tmp_path):
    far = replace(CARD, shards_at="s3://bucket/wds")
    write_card(far, tmp_path)

    assert read_card(tmp_path) == far
    assert shards_location(far, str(tmp_path)) == "s3://bucket/wds"
    assert shards_location(CARD, str(tmp_path)) == str(tmp_path)
    assert far.fingerprint == CARD.fingerprint


def test_a_shard_in_a_sub_folder_has_a_flat_index():
    assert index_name("part-1/train-0.tar") == "part-1--train-0.index.npz"


def change(plain, **values):
    return json.dumps({**plain, **values})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (lambda plain: "{", "dataset.json cannot be read"),
        (lambda plain: change(plain, format=2), "has format 2, newer than 1"),
        (lambda plain: change(plain, splits=3), "is damaged"),
        (lambda plain: json.dumps({"format": 1}), "is damaged: KeyError"),
        (lambda plain: "[]", "is damaged"),
    ],
)
def test_a_damaged_or_newer_card_is_refused(tmp_path, text, sentence):
    write_card(CARD, tmp_path)
    path = tmp_path / "dataset.json"
    path.write_text(text(json.loads(path.read_text())))

    with pytest.raises(DataError, match=sentence) as caught:
        read_card(tmp_path)

    assert caught.value.hint


def test_a_folder_without_a_card_and_no_folder_at_all_are_told_apart(tmp_path):
    with pytest.raises(DataError, match=r"holds no dataset\.json: it is not a packed data set"):
        read_card(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        read_card(tmp_path / "absent")


def test_photos_that_are_not_packed_yet_are_the_source_that_the_hint_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos" / "cat").mkdir(parents=True)
    (tmp_path / "empty").mkdir()

    def hint(place: str) -> str:
        with pytest.raises(DataError) as caught:
            read_card(place)
        return caught.value.hint.removeprefix("pack one: convnext data pack ")

    assert hint("my photos") == "'my photos' 'my photos-packed'"
    assert hint("empty") == "SOURCE empty"
    assert hint("absent") == "SOURCE absent"
    monkeypatch.chdir(tmp_path / "my photos")
    assert hint(".") == f". '{tmp_path}/my photos-packed'"


def test_a_packing_that_is_not_finished_is_told_as_such(tmp_path):
    (tmp_path / "pack-state").mkdir()
    (tmp_path / "pack-state" / "plan.json").write_text("{}")
    (tmp_path / "train-000000.tar").touch()

    with pytest.raises(DataError, match="its packing is not finished") as caught:
        read_card(tmp_path)

    assert caught.value.hint == f"repeat the command: convnext data pack SOURCE {tmp_path}"


def test_a_url_that_cannot_be_read_is_told_as_such():
    with pytest.raises(DataError, match=r"holds no dataset\.json") as absent:
        read_card("memory://nothing-here")
    with pytest.raises(DataError, match="this protocol cannot be read") as unknown:
        read_card("nosuch://bucket/data")

    assert "check the address" in absent.value.hint
    assert "fsspec" in unknown.value.hint


def test_reading_a_card_loads_neither_numpy_nor_torch():
    script = "import sys, convnext_cli.data.card; print({'numpy', 'torch'} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.stdout.strip() == "set()", done.stderr
