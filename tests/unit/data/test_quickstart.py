"""The images of the quick start."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_cli.catalog.datasets import DATASETS
from convnext_cli.data.card import read_card
from convnext_cli.data.quickstart import pack_quickstart, read_digits, write_quickstart_images
from convnext_cli.errors import StorageError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart")
    write_quickstart_images(out)
    return out


def test_the_digits_are_those_of_the_uci_test_set():
    counts, digits = read_digits()

    assert (counts.shape, counts.dtype, counts.max()) == ((1797, 8, 8), np.uint8, 16)
    # names and class counts as optdigits.names tells them
    assert np.bincount(digits).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert counts[0].tolist()[0] == [0, 0, 5, 13, 9, 1, 0, 0]
    assert digits[:10].tolist() == list(range(10))


def test_every_digit_is_written_once_in_ten_classes_on_both_sides(images):
    train = sorted((images / "train").glob("*/*.png"))
    val = sorted((images / "val").glob("*/*.png"))

    assert (len(train), len(val)) == (1437, 360)
    assert {path.parent.name for path in train} == set("0123456789")
    assert {path.parent.name for path in val} == set("0123456789")
    assert sorted(path.stem for path in train + val) == [f"{place:04d}" for place in range(1797)]


def test_the_counts_are_those_that_the_catalog_plans_with(images):
    known = DATASETS["quickstart"]

    assert known.train_images == len(list((images / "train").glob("*/*")))
    assert known.val_images == len(list((images / "val").glob("*/*")))
    assert known.num_classes == len(list((images / "train").iterdir()))


def test_a_file_holds_the_digit_that_its_name_and_folder_say(images):
    counts, digits = read_digits()

    for place in (0, 700, 1436, 1437, 1796):
        part = "train" if place < 1437 else "val"
        with Image.open(images / part / str(digits[place]) / f"{place:04d}.png") as image:
            assert (image.size, image.mode) == ((32, 32), "L")
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=np.float64)
        assert np.corrcoef(small.ravel(), counts[place].ravel())[0, 1] > 0.95


def test_two_writings_give_the_same_bytes(images, tmp_path):
    write_quickstart_images(tmp_path)
    write_quickstart_images(tmp_path)

    ours = {p.relative_to(images): p.read_bytes() for p in images.glob("*/*/*.png")}
    again = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.glob("*/*/*.png")}
    assert ours == again


def test_a_destination_that_is_a_file_is_refused_with_a_hint(tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("not a folder")

    with pytest.raises(StorageError, match=r"taken: the quick start's images") as caught:
        write_quickstart_images(taken)

    assert caught.value.hint


def test_the_digits_are_packed_once_and_reused(tmp_path):
    folder = pack_quickstart(tmp_path)
    first = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    again = pack_quickstart(tmp_path)

    assert again == folder == tmp_path / "quickstart"
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == first
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart"]
    card, known = read_card(folder), DATASETS["quickstart"]
    assert card.classes == tuple("0123456789")
    assert card.splits["train"].images == known.train_images
    assert card.splits["val"].images == known.val_images


def test_what_a_kill_or_an_earlier_version_left_in_the_cache_gives_way(tmp_path):
    whole = pack_quickstart(tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "cache" / "quickstart")
    (tmp_path / "cache" / "quickstart" / "train-000000.tar").unlink()

    folder = pack_quickstart(tmp_path / "cache")

    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def test_the_cache_is_where_the_user_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert pack_quickstart() == tmp_path / "convnext" / "quickstart"


def test_a_cache_that_cannot_be_written_is_told_with_a_hint(tmp_path):
    (tmp_path / "cache").write_text("a file")

    with pytest.raises(StorageError, match=r"cannot write .*quickstart") as caught:
        pack_quickstart(tmp_path / "cache")

    assert caught.value.hint
