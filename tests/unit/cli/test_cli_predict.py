"""Which files `convnext predict` takes, and how it names what it cannot read."""

import os
from pathlib import Path

import pytest
import torch

from convnext_cli.catalog.models import find_variant
from convnext_cli.cli.predict import find_images, predict
from convnext_cli.errors import DataError
from convnext_cli.models.convnext import build_convnext


@pytest.fixture
def album(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """b.JPG, a.png and notes.txt; deep/c.webp below them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("b.JPG", "a.png", "notes.txt", "deep/c.webp"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def names(asked: list[str]) -> list[str]:
    return [str(path) for path in find_images(asked)[0]]


@pytest.mark.usefixtures("album")
def test_a_folder_gives_its_images_in_order_however_deep():
    assert names(["."]) == ["a.png", "b.JPG", "deep/c.webp"]


@pytest.mark.usefixtures("album")
def test_a_quoted_pattern_is_matched():
    assert names(["*.JPG", "deep/*"]) == ["b.JPG", "deep/c.webp"]


def test_a_pattern_may_start_at_the_root(album: Path):
    assert names([f"{album}/*.png"]) == [str(album / "a.png")]


@pytest.mark.usefixtures("album")
def test_a_file_named_twice_is_looked_at_once():
    assert names(["a.png", "*.png", "."]) == ["a.png", "b.JPG", "deep/c.webp"]


@pytest.mark.usefixtures("album")
def test_a_named_file_is_taken_whatever_its_name():
    assert names(["notes.txt"]) == ["notes.txt"]


def test_an_existing_file_with_brackets_in_its_name_is_no_pattern(album: Path):
    (album / "cat[1].jpg").write_bytes(b"x")

    assert names(["cat[1].jpg"]) == ["cat[1].jpg"]


def test_a_folder_gives_what_the_packer_takes_and_no_litter(album: Path):
    (album / ".thumbs").mkdir()
    for name in ("d.bmp", "e.tiff", "f.gif", "._a.png", ".thumbs/a.png", "Thumbs.db"):
        (album / name).write_bytes(b"x")

    assert names(["."]) == ["a.png", "b.JPG", "d.bmp", "deep/c.webp", "e.tiff", "f.gif"]
    assert names(["*.png"]) == ["a.png"]
    assert names(["._*"]) == ["._a.png"]


def test_a_link_to_a_folder_is_followed_as_the_packer_does(album: Path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "z.png").write_bytes(b"x")
    (album / "link").symlink_to(elsewhere)
    (album / "deep" / "round").symlink_to(album)

    assert names(["."]) == ["a.png", "b.JPG", "deep/c.webp", "link/z.png"]


@pytest.mark.parametrize("asked", ["pipe.jpg", "pipe*", "."])
def test_a_pipe_is_refused_before_it_is_read(album: Path, asked: str):
    os.mkfifo(album / "pipe.jpg")

    found, unread = find_images([asked])

    assert Path("pipe.jpg") not in found
    reason = "not a regular file, but a device or a pipe"
    assert [(bad.image, bad.reason) for bad in unread] == [("pipe.jpg", reason)]


def test_a_device_is_refused_before_the_model_is_read():
    with pytest.raises(DataError, match="/dev/zero: not a regular file"):
        predict("no-such-checkpoint", ["/dev/zero"])


def test_what_matches_nothing_is_named(album: Path):
    (album / "empty").mkdir()

    found, unread = find_images(["*.gif", "empty", "a.png"])

    assert [str(path) for path in found] == ["a.png"]
    assert [(bad.image, bad.reason) for bad in unread] == [
        ("*.gif", "no file matches"),
        ("empty", "a folder without images"),
    ]


@pytest.mark.parametrize(
    ("asked", "reason", "hint"),
    [
        ("gone.jpg", "gone.jpg: No such file or directory", "check the path"),
        ("*.gif", "*.gif: no file matches", "check the path"),
        ("b.JPG", "b.JPG: damaged, or not a JPEG", "save it again as JPEG or PNG, or leave it out"),
        ("empty", "empty: a folder without images", "name JPEG, PNG, WEBP, BMP, GIF or TIFF files"),
    ],
)
def test_the_hint_is_about_what_is_wrong_with_the_image(run_cli, album, asked, reason, hint):
    torch.manual_seed(0)
    model = build_convnext(find_variant("convnextv2_atto"), num_classes=3)
    torch.save({"model": model.state_dict()}, album / "x.pth")
    (album / "empty").mkdir()

    done = run_cli("predict", "x.pth", asked, "--device", "cpu")

    error, _, told = done.stderr.splitlines()[-3:]
    assert done.exit_code == 2
    assert error.startswith(f"error: {reason}")
    assert told.startswith(f"hint: {hint}")


@pytest.mark.usefixtures("album")
@pytest.mark.parametrize("left_over", [{"NODE_RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_what_a_launcher_says_is_nothing_to_one_process(run_cli, monkeypatch, left_over):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)

    done = run_cli("predict", "x.pth", "b.JPG", "--device", "cpu")

    assert done.stderr.startswith("error: there is no file x.pth")


@pytest.mark.usefixtures("album")
def test_nothing_to_look_at_is_said_before_the_model_is_read():
    with pytest.raises(DataError, match=r"\*\.gif: no file matches"):
        predict("no-such-checkpoint", ["*.gif"])
