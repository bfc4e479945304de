import hashlib
import multiprocessing
from pathlib import Path

import fsspec
import pytest

from convnext_cli.data.fetch import Expected, Store, read_file
from convnext_cli.errors import DataError, StorageError

DATA = b"shard" * 1000
WHOLE = Expected(num_bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())


@pytest.fixture
def remote():
    """A folder behind a URL: fsspec's file system in memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe("/data/a.tar", DATA)
    yield files
    files.store.clear()


def store(tmp_path, **changes) -> Store:
    settings = {"location": "memory://data", "cache_dir": tmp_path / "cache"} | changes
    return Store(attempts=3, backoff_seconds=0.0, **settings)


def test_a_local_file_is_used_where_it_lies(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)

    assert Store(location=str(tmp_path)).path("a.tar", expected=WHOLE) == tmp_path / "a.tar"


def test_a_local_file_of_another_size_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA[:-1])

    with pytest.raises(DataError, match=r"a\.tar: 4,999 bytes, but the data set's list says 5,000"):
        Store(location=str(tmp_path)).path("a.tar", expected=WHOLE)


def test_a_url_is_downloaded_once(tmp_path, remote):
    path = store(tmp_path).path("a.tar", expected=WHOLE)
    remote.rm("/data/a.tar")

    assert path.read_bytes() == DATA
    assert store(tmp_path).path("a.tar", expected=WHOLE) == path


@pytest.mark.usefixtures("remote")
def test_a_cache_may_lie_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    path = store(tmp_path, cache_dir=Path("~/cache")).path("a.tar", expected=WHOLE)

    assert path.parent == tmp_path / "cache"


def test_shards_of_one_name_and_other_contents_do_not_meet_in_the_cache(tmp_path, remote):
    first = store(tmp_path).path("a.tar", expected=WHOLE)
    remote.pipe("/data/a.tar", DATA[::-1])
    other = Expected(num_bytes=len(DATA), sha256=hashlib.sha256(DATA[::-1]).hexdigest())

    second = store(tmp_path).path("a.tar", expected=other)

    assert (first.read_bytes(), second.read_bytes()) == (DATA, DATA[::-1])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (DATA[:10], r"10 bytes came of a range of 5,000 \(3 tries\)"),
        (DATA[::-1], r"its sha256 is \w+\.\.\., the list says \w+\.\.\., twice"),
    ],
)
def test_a_wrong_body_is_never_taken(tmp_path, remote, body, message):
    remote.pipe("/data/a.tar", body)

    with pytest.raises(DataError, match=message):
        store(tmp_path).path("a.tar", expected=WHOLE)

    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"] == []


@pytest.mark.usefixtures("remote")
def test_what_is_not_there_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match=r"b\.tar: there is no such file"):
        store(tmp_path).path("b.tar", expected=WHOLE)


def test_an_unknown_protocol_is_refused_with_a_hint(tmp_path):
    with pytest.raises(DataError, match="cannot be read") as refused:
        store(tmp_path, location="nothing://x").path("a.tar", expected=WHOLE)

    assert "fsspec" in (refused.value.hint or "")


@pytest.mark.usefixtures("remote")
def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")

    with pytest.raises(StorageError, match="cache"):
        store(tmp_path).path("a.tar", expected=WHOLE)


def fetch_in_process(folder, source) -> None:
    Store(location=source, cache_dir=folder).path("a.tar", expected=WHOLE)


def test_several_processes_may_want_a_shard_at_once(tmp_path):
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "a.tar").write_bytes(DATA)
    source = f"local://{tmp_path}/origin"
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=fetch_in_process, args=(tmp_path / "cache", source))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0]
    tars = [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"]
    assert [path.read_bytes() for path in tars] == [DATA]


@pytest.mark.usefixtures("remote")
def test_small_files_are_read_from_paths_and_urls(tmp_path):
    (tmp_path / "a.json").write_bytes(b"{}")

    assert read_file(str(tmp_path / "a.json")) == b"{}"
    assert read_file("memory://data/a.tar") == DATA
    with pytest.raises(DataError, match="No such file"):
        read_file(str(tmp_path / "b.json"))
    with pytest.raises(DataError, match="no such file"):
        read_file("memory://data/b.json", attempts=1)
