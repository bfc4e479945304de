import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from convnext_cli.cli.data_show import show
from convnext_cli.data.card import DatasetCard, Shard, Split, index_name, write_card
from convnext_cli.data.contact_sheet import Cell, render_sheet
from convnext_cli.data.index import scan_shard, write_index
from convnext_cli.errors import DataError, StorageError


def cell(colour: int, px: int = 300, name: str = "robin") -> Cell:
    return Cell(image_CHW=torch.full((3, px, px), colour, dtype=torch.uint8), name=name)


def test_each_picture_is_on_the_sheet_in_its_place():
    sheet = render_sheet([(cell(50), cell(100)), (cell(150), cell(200))], title="two rows")

    found = {
        sheet.getpixel((x, y))[0]
        for x in range(0, sheet.width, 8)
        for y in range(0, sheet.height, 8)
    }
    assert {50, 100, 150, 200} <= found


def test_twelve_rows_are_set_in_two_columns():
    one = render_sheet([(cell(9),) * 5] * 6, title="")
    two = render_sheet([(cell(9),) * 5] * 12, title="")

    assert two.height == one.height
    assert two.width > 1.7 * one.width


def test_tiny_pictures_grow_in_whole_pixels():
    checks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    checks[:, ::2, ::2] = 255

    sheet = render_sheet([(Cell(image_CHW=checks, name="9"),)], title="")

    colours = {colour for _, colour in sheet.crop((16, 30, 150, 170)).getcolors(9999)}
    assert colours <= {(0, 0, 0), (255, 255, 255)}


def test_long_names_and_thread_like_pictures_stay_within_their_tile():
    thread = torch.zeros(3, 1, 5000, dtype=torch.uint8)
    name = "a very long class name that no tile could ever hold, because it goes on and on"

    sheet = render_sheet([(Cell(image_CHW=thread, name=name), cell(0, name=""))], title=name * 9)

    assert isinstance(sheet, Image.Image)
    right = [sheet.getpixel((160, y)) for y in range(30 + 145, 30 + 176)]
    assert set(right) == {(255, 255, 255)}


@pytest.fixture
def dataset(tmp_path):
    """A packed data set of ten images in two classes; the one with key 3 is no image."""
    shards = []
    for split in ("train", "val"):
        path = tmp_path / f"{split}-000000.tar"
        with tarfile.open(path, "w") as tar:
            for n in range(10):
                sink = io.BytesIO()
                pixels = np.random.default_rng(n).integers(0, 256, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(sink, "JPEG")
                image = b"not an image" if n == 3 else sink.getvalue()
                for extension, data in (("jpg", image), ("cls", str(n % 2).encode())):
                    member = tarfile.TarInfo(f"{n}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        write_index(scan_shard(path).index, tmp_path / index_name(path.name))
        size = path.stat().st_size
        shard = Shard(name=path.name, images=10, bytes=size, sha256=scan_shard(path).sha256)
        shards.append(Split(name=split, shards=(shard,), class_images=(5, 5)))
    card = DatasetCard(
        classes=("cat", "dog"), splits={split.name: split for split in shards}, options={}
    )
    write_card(card, tmp_path)
    return tmp_path


def test_the_command_draws_training_images_and_what_became_of_them(dataset, capsys):
    out = dataset / "sheet.png"

    show(str(dataset), images=10, out=out, json_output=True)

    assert json.loads(capsys.readouterr().out) == {
        "sheet": str(out),
        "images": 10,
        "split": "train",
    }
    with Image.open(out) as sheet:
        sheet.load()
        assert sheet.format == "PNG"


def test_the_same_seed_draws_the_same_sheet_and_another_seed_another_one(dataset):
    sheets = []
    for seed in (0, 0, 1):
        show(str(dataset), images=4, out=dataset / "sheet.png", seed=seed)
        sheets.append((dataset / "sheet.png").read_bytes())

    assert sheets[0] == sheets[1] != sheets[2]


def test_a_split_that_is_not_there_is_refused(dataset):
    with pytest.raises(DataError, match="no split named test, only train, val"):
        show(str(dataset), split="test", out=dataset / "sheet.png")


def test_a_bad_image_in_validation_is_refused_by_key(dataset):
    with pytest.raises(DataError, match=r"val-000000\.tar/3"):
        show(str(dataset), split="val", images=10, out=dataset / "sheet.png")


def test_a_sheet_that_cannot_be_written_is_refused_and_leaves_nothing(dataset):
    (dataset / "nowhere").touch()

    with pytest.raises(StorageError, match="nowhere"):
        show(str(dataset), images=2, out=dataset / "nowhere" / "sheet.png")

    assert not list(dataset.glob("*.partial"))
