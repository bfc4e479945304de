"""A check finds what is wrong, and nothing where all is well."""

import errno
import json
import shutil

import pytest

from convnext_cli.data.audit import check_dataset
from convnext_cli.data.index import scan_shard
from convnext_cli.data.pack import PackOptions, pack
from convnext_cli.data.report import Spread
from convnext_cli.errors import DataError, StorageError


@pytest.fixture
def shards(tiny_shards, tmp_path):
    """A copy that a test may damage: train (16, 16 and 7 images) and val (12)."""
    shutil.copytree(tiny_shards, tmp_path / "shards")
    return tmp_path / "shards"


def damage_of(folder, *, deep=False):
    return [(item.where, item.what) for item in check_dataset(folder, deep=deep).damage]


def change_card(folder, change):
    path = folder / "dataset.json"
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


def test_sound_data_have_no_damage_and_true_totals(tiny_shards):
    report = check_dataset(tiny_shards, deep=True)

    assert report.damage == ()
    assert (report.classes, report.shared) == (3, 0)
    train, val = report.splits
    assert (train.name, train.images, train.shards) == ("train", 39, 3)
    assert (val.name, val.images, val.shards) == ("val", 12, 1)
    assert train.class_images == Spread(13, 13.0, 13)
    assert (train.width, train.height) == (Spread(40, 40.0, 40), Spread(32, 32.0, 32))
    assert train.empty_classes == ()
    assert train.duplicates == 0
    assert train.bytes == sum(path.stat().st_size for path in tiny_shards.glob("train-*.tar"))


def test_a_url_can_be_checked(tiny_shards):
    assert check_dataset(f"file://{tiny_shards}", deep=False).damage == ()


def test_a_flipped_bit_in_an_image_is_found_and_the_image_named(shards):
    path = shards / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[900] ^= 16
    path.write_bytes(data)

    assert damage_of(shards) == [
        ("train-000001.tar", "its bytes are not those that were packed (sha256)"),
        ("train-000001.tar", "train/square/012: its bytes are not those that were indexed"),
    ]


def test_a_flipped_bit_in_a_header_is_found_with_its_place(shards):
    path = shards / "val-000000.tar"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)

    ((where, reason),) = damage_of(shards)

    assert where == "val-000000.tar"
    assert "header at byte 0 is damaged" in reason


def test_a_cut_shard_and_a_missing_one_do_not_hide_each_other(shards):
    (shards / "train-000000.tar").unlink()
    path = shards / "val-000000.tar"
    path.write_bytes(path.read_bytes()[:4000])

    found = damage_of(shards)

    assert {where for where, _ in found} == {"train-000000.tar", "val-000000.tar"}
    assert any("No such file" in what for _, what in found)
    assert any("4,000 bytes, but the card says" in what for _, what in found)
    assert any("is cut" in what for _, what in found)


def test_a_url_is_read_anew_by_every_check(shards, faulty_server):
    files = faulty_server.files
    files.update({path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()})
    for name in ("train-000001.tar", "train-000002.index.npz"):
        sound = files[name]

        assert damage_of(faulty_server.url) == []
        files[name] = sound[:600] + bytes(8) + sound[608:]
        assert damage_of(faulty_server.url) != []
        files[name] = sound

    assert damage_of(faulty_server.url, deep=True) == []


def test_a_check_of_a_url_leaves_no_copy_and_says_how_to_use_another_disk(
    shards, faulty_server, tmp_path, monkeypatch
):
    files = faulty_server.files
    files.update({path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()})
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))

    check_dataset(faulty_server.url, deep=False)
    assert list((tmp_path / "temporary").iterdir()) == []

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("convnext_cli.data.fetch.os.fsync", fail)
    with pytest.raises(StorageError, match="Input/output error") as refused:
        check_dataset(faulty_server.url, deep=False)
    assert f"TMPDIR=DIR convnext data check {faulty_server.url}" in (refused.value.hint or "")


def test_an_index_of_another_shard_or_none_is_found(shards):
    shutil.copy(shards / "train-000000.index.npz", shards / "train-000001.index.npz")
    (shards / "train-000002.index.npz").unlink()

    (first, second) = damage_of(shards)

    assert first == ("train-000001.index.npz", "it does not describe its shard")
    assert second[0] == "train-000002.index.npz"


def test_an_index_that_is_not_the_cards_is_found(shards):
    def rename(plain):
        plain["splits"]["val"]["shards"][0]["index_sha256"] = "0" * 64

    change_card(shards, rename)

    assert damage_of(shards) == [("val-000000.index.npz", "it is not the one that the card names")]


def test_a_card_that_miscounts_is_found(shards):
    def miscount(plain):
        plain["splits"]["train"]["class_images"] = [12, 14, 13]
        plain["splits"]["val"]["shards"][0]["images"] = 11

    change_card(shards, miscount)

    assert damage_of(shards) == [
        ("dataset.json", "train: its class counts are not those of the shards"),
        ("val-000000.tar", "12 images, but the card says 11"),
    ]


def test_class_names_that_were_changed_are_found(shards):
    change_card(shards, lambda plain: plain["classes"].reverse())

    assert damage_of(shards) == [("dataset.json", "its classes are not those that were packed")]


def test_labels_beyond_the_classes_are_found(shards):
    def drop_a_class(plain):
        plain["classes"].pop()
        for split in plain["splits"].values():
            split["class_images"].pop()

    change_card(shards, drop_a_class)

    found = damage_of(shards)

    assert len(found) == 13 + 4
    assert all("label 2 of 2 classes" in what for _, what in found)


def test_a_deep_check_names_the_images_that_cannot_be_decoded(shards):
    path = shards / "val-000000.tar"
    index = scan_shard(path).index
    data = bytearray(path.read_bytes())
    begin = int(index.image_offset[3])
    data[begin : begin + 200] = bytes(200)
    path.write_bytes(data)

    found = damage_of(shards, deep=True)

    assert found[0][1] == "its bytes are not those that were packed (sha256)"
    assert found[1:] == [
        ("val-000000.tar", f"{index.key(3)}: its bytes are not those that were indexed"),
        ("val-000000.tar", f"{index.key(3)}: damaged, or not a JPEG, PNG or WEBP"),
    ]


def test_repeated_images_are_counted_within_a_split_and_between_splits(image_folder, tmp_path):
    source = (image_folder / "train" / "disc" / "000.jpg").read_bytes()
    (image_folder / "train" / "square" / "same.jpg").write_bytes(source)
    (image_folder / "val" / "disc" / "twin.jpg").write_bytes(source)
    (image_folder / "val" / "disc" / "twin2.jpg").write_bytes(source)
    pack(image_folder, tmp_path / "out", options=PackOptions(images_per_shard=10))

    report = check_dataset(tmp_path / "out", deep=False)

    assert [split.duplicates for split in report.splits] == [1, 1]
    assert report.shared == 2
    keys = {val for _, val in report.shared_examples}
    assert keys == {"val/disc/twin", "val/disc/twin2"}
    assert {train for train, _ in report.shared_examples} <= {
        "train/disc/000",
        "train/square/same",
    }
    assert report.damage == ()


def test_classes_without_images_are_named(image_folder, tmp_path):
    for path in (image_folder / "val" / "cross").iterdir():
        path.unlink()
    pack(image_folder, tmp_path / "out")

    train, val = check_dataset(tmp_path / "out", deep=False).splits

    assert (train.empty_classes, val.empty_classes) == ((), ("cross",))
    assert val.class_images == Spread(0, 5.0, 5)


def test_progress_counts_every_image(tiny_shards):
    seen = []

    check_dataset(
        tiny_shards, deep=False, on_progress=lambda done, total: seen.append((done, total))
    )

    assert seen[-1] == (51, 51)
    assert seen == sorted(seen)


def test_a_folder_without_a_card_cannot_be_checked(tmp_path):
    with pytest.raises(DataError, match="holds no dataset"):
        check_dataset(tmp_path, deep=False)
