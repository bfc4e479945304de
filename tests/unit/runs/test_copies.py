import errno
import hashlib
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from fsspec.implementations.local import LocalFileSystem

from convnext_cli.errors import CheckpointError, RunError, WriteError
from convnext_cli.runs import copies
from convnext_cli.runs.copies import Copier, RemoteFolder, fetch_run
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.manifest import (
    Manifest,
    check_checkpoint,
    find_newest_whole,
    manifest_path,
)
from convnext_cli.runs.record import read_jsonl


def write(run: RunDir, step: int, *, content: bytes = b"weights" * 500) -> None:
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    run.checkpoint(step).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    manifest = Manifest(step, len(content), digest, "2026-11-23T00:00:00+00:00", 1)
    manifest_path(run.checkpoint(step)).write_text(manifest.to_json())


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "mine")
    for step in (2, 4):
        write(run, step, content=f"weights {step}".encode() * 500)
    run.recipe.write_text("about: x\n")
    run.plan.write_text("{}")
    run.metrics.write_text('{"step": 4}\n')
    run.last.symlink_to("step=00000004.ckpt")
    run.best.symlink_to("step=00000002.ckpt")
    return run


@pytest.fixture
def url(tmp_path) -> str:
    return f"file://{tmp_path}/elsewhere/mine"


def test_a_run_comes_back_as_it_was(run, url, tmp_path):
    RemoteFolder(url).push(run)

    back, step = fetch_run(url, tmp_path / "back")

    assert step == 4
    assert back.root == tmp_path / "back" / "mine"
    assert back.is_run()
    assert back.metrics.read_text() == run.metrics.read_text()
    for link in ("last", "best"):
        ours, theirs = getattr(back, link), getattr(run, link)
        assert ours.read_bytes() == theirs.read_bytes()
        assert check_checkpoint(ours).problem is None
    assert find_newest_whole(back)[0].manifest.step == 4


def test_a_copy_follows_what_is_removed_and_sends_nothing_twice(run, url):
    folder = RemoteFolder(url)
    folder.push(run)
    run.checkpoint(4).write_bytes(b"no longer sent")  # its name is there already
    run.best.unlink()
    run.checkpoint(2).unlink()
    manifest_path(run.checkpoint(2)).unlink()
    write(run, 6)

    folder.push(run)

    assert folder.list_steps() == [4, 6]


def test_a_step_that_is_taken_again_is_copied_again_after_its_manifest_is_gone(
    run, url, monkeypatch
):
    folder = RemoteFolder(url)
    folder.push(run)
    write(run, 4, content=b"taken again")
    sent, put = [], LocalFileSystem.put_file

    def put_file(self, source, target, **kwargs):
        if target.endswith(".ckpt"):
            sent.append((target.rpartition("/")[2], folder.list_steps()))
        put(self, source, target, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)

    folder.push(run)

    assert sent == [("step=00000004.ckpt", [2])]
    back, step = fetch_run(url, run.root.parent.parent / "back")
    assert (step, back.checkpoint(4).read_bytes()) == (4, b"taken again")


class Killed(BaseException):
    """Of the process, in the middle of a copy."""


def test_a_copy_that_is_killed_in_a_small_file_leaves_the_one_before(run, url, monkeypatch):
    def put_half(self, source, target, **kwargs):
        Path(target).write_bytes(Path(source).read_bytes()[:1])
        raise Killed

    folder = RemoteFolder(url)
    folder.push(run)
    monkeypatch.setattr(LocalFileSystem, "put_file", put_half)
    with pytest.raises(Killed):
        folder.push(run)

    back, _ = fetch_run(url, run.root.parent.parent / "back")
    assert back.recipe.read_text() == run.recipe.read_text()


def test_a_checkpoint_is_not_copied_before_the_rows_up_to_its_step(run, url, monkeypatch):
    put = LocalFileSystem.put_file

    def put_file(self, source, target, **kwargs):
        put(self, source, target, **kwargs)
        if source == str(run.metrics):  # the run goes on meanwhile
            run.metrics.write_text('{"step": 4}\n{"step": 6}\n')
            write(run, 6)

    monkeypatch.setattr(LocalFileSystem, "put_file", put_file)
    RemoteFolder(url).push(run)

    back, step = fetch_run(url, run.root.parent.parent / "back")
    assert [row["step"] for row in read_jsonl(back.metrics)] == [step]


def test_what_a_run_went_back_from_is_not_fetched_with_what_it_leaves_out_since(
    run, url, monkeypatch
):
    folder = RemoteFolder(url)
    folder.push(run)
    run.checkpoint(4).unlink()
    manifest_path(run.checkpoint(4)).unlink()
    run.skips.write_text('{"skips": [[2, 3]]}')
    monkeypatch.setattr(LocalFileSystem, "pipe_file", Mock(side_effect=Killed))
    with pytest.raises(Killed):
        folder.push(run)

    back, step = fetch_run(url, run.root.parent.parent / "back")
    assert (step, back.skips.is_file()) == (2, True)


def test_a_torn_copy_does_not_count_and_a_damaged_one_is_passed_over(run, url, tmp_path):
    write(run, 6)
    RemoteFolder(url).push(run)
    there = tmp_path / "elsewhere" / "mine" / "checkpoints"
    (there / "step=00000006.json").unlink()
    (there / "step=00000004.ckpt").write_bytes(b"half")

    assert RemoteFolder(url).list_steps() == [2, 4]
    back, step = fetch_run(url, tmp_path / "back")

    assert step == 2
    assert not back.checkpoint(4).exists()


def test_where_there_is_no_copy_nothing_is_left_behind(url, tmp_path):
    with pytest.raises(CheckpointError, match="has no whole checkpoint"):
        fetch_run(url, tmp_path / "back")

    assert not (tmp_path / "back" / "mine").exists()


def test_a_run_that_is_there_is_not_written_over(run, url):
    RemoteFolder(url).push(run)

    with pytest.raises(RunError, match="is there already"):
        fetch_run(url, run.root.parent)


def test_a_url_that_nothing_can_read_gets_a_sentence():
    with pytest.raises(RunError, match="nosuch"):
        RemoteFolder("nosuch://bucket/runs/mine")


def test_a_server_that_does_not_answer_is_told_without_the_password():
    with pytest.raises(RunError, match=r"cannot be read: .*ConnectionRefusedError") as refused:
        RemoteFolder("ftp://bob:sesame@127.0.0.1:1/runs/mine")

    assert "sesame" not in str(refused.value)


def test_a_copy_that_fails_is_told_and_the_next_one_makes_up_for_it(run, url, tmp_path):
    told: list[str] = []
    blocked = tmp_path / "elsewhere"
    blocked.write_text("a file where the folder should be")
    copier = Copier(run, RemoteFolder(url), say=told.append)

    copier.start()
    while not told:
        time.sleep(0.01)
    blocked.unlink()
    copier.start()
    copier.finish()

    assert len(told) == 1
    assert "could not copy to" in told[0]
    assert [event["event"] for event in read_jsonl(run.events)] == ["copy_failed"]
    assert RemoteFolder(url).list_steps() == [2, 4]


def test_the_end_says_that_the_last_copy_is_missing(run, url, tmp_path):
    told: list[str] = []
    (tmp_path / "elsewhere").write_text("a file where the folder should be")
    copier = Copier(run, RemoteFolder(url), say=told.append)

    copier.start()
    copier.finish()

    assert "could not copy to" in told[0]
    assert told[1:] == [f"{url} lacks what was saved last; the same command again copies it"]


def test_a_copy_that_takes_long_is_told_and_does_not_hold_up_who_presses_ctrl_c_twice(
    run, url, monkeypatch
):
    told: list[str] = []
    gone_on = threading.Event()
    monkeypatch.setattr(copies, "_QUIET_SECONDS", 0.01)
    monkeypatch.setattr(RemoteFolder, "push", lambda *_: gone_on.wait(30))

    def say(line: str) -> None:
        told.append(line)
        gone_on.set()

    copier = Copier(run, RemoteFolder(url), say=say)
    before = set(threading.enumerate())
    copier.start()
    (thread,) = (new for new in set(threading.enumerate()) - before if new.name == "copies")
    copier.finish()

    assert told[0].startswith(f"waiting for copies to {url}")
    assert thread.daemon


def test_a_bucket_is_written_to_and_not_made(run):
    folder = RemoteFolder("s3://bucket/runs/mine")
    folder._files = files = Mock()
    files.ls.return_value = []

    folder.push(run)

    assert files.put_file.call_count > 4
    assert not files.makedirs.called


@pytest.mark.parametrize(
    ("failure", "kind", "sentence"),
    [
        (FileNotFoundError("no bucket"), CheckpointError, "has no whole checkpoint"),
        (RuntimeError("no\ncredentials"), RunError, r"no credentials \(RuntimeError\)"),
        (PermissionError(13, "Denied"), RunError, r"/mine cannot be read: .*PermissionError"),
    ],
)
def test_a_place_that_cannot_be_read_is_no_trouble_of_this_disk(
    tmp_path, url, monkeypatch, failure, kind, sentence
):
    def refuse(self, path, detail=True, **kwargs):
        raise failure

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.ls", refuse)

    with pytest.raises(kind, match=sentence):
        fetch_run(f"{url}/mine", tmp_path / "elsewhere")

    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (RuntimeError("no network"), RunError),
        (PermissionError(13, "Denied"), RunError),
        (OSError(errno.ENOSPC, "No space left"), WriteError),
    ],
)
@pytest.mark.parametrize("name", ["step=00000004.json", "metrics.jsonl"])
def test_half_of_a_run_is_not_left_behind(run, url, tmp_path, monkeypatch, failure, kind, name):
    def fetch(self, source, target, real=LocalFileSystem.get_file):
        if source.endswith(name):
            raise failure
        real(self, source, target)

    run.metrics.write_text("{}\n")
    RemoteFolder(url).push(run)
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "get_file", fetch)
        with pytest.raises(kind):
            fetch_run(url, tmp_path / "back")

    assert list((tmp_path / "back").iterdir()) == []
    assert fetch_run(url, tmp_path / "back")[1] == 4
