"""A server's every misbehaviour, with real requests: what is taken, tried again, or refused."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from convnext_cli.data import fetch
from convnext_cli.data.card import read_card
from convnext_cli.data.fetch import (
    Expected,
    Store,
    evict,
    make_room,
    read_file,
    read_stream,
    without_secrets,
)
from convnext_cli.errors import DataError, WriteError

DATA = bytes(range(256)) * 400
WHOLE = Expected(num_bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Seven blocks a file, so that a download has a middle."""
    monkeypatch.setattr(fetch, "BLOCK_BYTES", 16_000)


def store(faulty_server, tmp_path, **changes) -> Store:
    settings = {"attempts": 4, "backoff_seconds": 0.01, "stall_seconds": 5.0} | changes
    faulty_server.files.setdefault("a.tar", DATA)
    return Store(location=faulty_server.url, cache_dir=tmp_path / "cache", **settings)


def whole_files(tmp_path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_good_server_is_asked_once_for_every_byte(faulty_server, tmp_path, ranges):
    faulty_server.ranges = ranges

    path = store(faulty_server, tmp_path).path("a.tar", expected=WHOLE)

    assert path.read_bytes() == DATA
    # A server that ignores ranges is noticed at the second, and asked for the whole.
    assert len(faulty_server.gets) == (7 if ranges else 3)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "fault", ["500", "503", "408", "429 0", "half", "half without length", "reset", "login"]
)
def test_what_may_pass_is_tried_again(faulty_server, tmp_path, fault, ranges):
    faulty_server.ranges = ranges
    faulty_server.faults["a.tar"] = [fault]

    path = store(faulty_server, tmp_path).path("a.tar", expected=WHOLE)

    assert path.read_bytes() == DATA


@pytest.mark.parametrize("fault", ["stall", "trickle"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_stalls_or_crawls_is_left_and_asked_again(
    faulty_server, tmp_path, fault, ranges
):
    faulty_server.ranges = ranges
    faulty_server.faults["a.tar"] = [fault]

    path = store(faulty_server, tmp_path, stall_seconds=0.4).path("a.tar", expected=WHOLE)

    assert path.read_bytes() == DATA


@pytest.mark.parametrize("status", ["400", "401", "403", "404", "410"])
def test_what_will_not_pass_is_refused_at_once(faulty_server, tmp_path, status):
    faulty_server.always["a.tar"] = status

    with pytest.raises(DataError) as refused:
        store(faulty_server, tmp_path).path("a.tar", expected=WHOLE)

    assert "no such file" in str(refused.value) or f"status {status}" in str(refused.value)
    assert refused.value.hint
    assert len(faulty_server.gets) == 1


class GcsError(Exception):
    """As gcsfs raises for a status that it has no other error for."""

    code = 401


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (GcsError("Anonymous caller does not have storage.objects.get access, 401"), 401),
        (OSError("Forbidden: b/bucket/o/a.tar\nthe caller may not"), 403),
        (ValueError("Bad Request: b/bucket/o/a.tar\ninvalid argument"), 400),
    ],
)
def test_what_gcs_refuses_is_not_tried_again(monkeypatch, error, status):
    calls = []

    def refuse(*_: object) -> None:
        calls.append(error)
        raise error

    monkeypatch.setattr(fetch.fsspec, "open", refuse)

    with pytest.raises(DataError, match=f"gs://bucket/a.tar: refused with HTTP status {status}"):
        read_file("gs://bucket/a.tar")

    assert len(calls) == 1


def test_a_server_that_never_recovers_is_given_up_with_a_sentence(faulty_server, tmp_path):
    faulty_server.always["a.tar"] = "503"

    with pytest.raises(DataError, match=r"HTTP status 503 \(4 tries\)") as refused:
        store(faulty_server, tmp_path).path("a.tar", expected=WHOLE)

    assert "what is already fetched is kept" in (refused.value.hint or "")
    assert len(faulty_server.gets) == 4
    assert whole_files(tmp_path) == []


def test_the_pause_that_a_server_asks_for_is_kept(faulty_server, tmp_path):
    faulty_server.faults["a.tar"] = ["429 0.7"]
    begin = time.monotonic()

    store(faulty_server, tmp_path).path("a.tar", expected=WHOLE)

    assert time.monotonic() - begin > 0.7


def test_wrong_bytes_are_fetched_once_more_from_the_start(faulty_server, tmp_path):
    faulty_server.faults["a.tar"] = ["flipped"]

    assert store(faulty_server, tmp_path).path("a.tar", expected=WHOLE).read_bytes() == DATA
    assert faulty_server.gets.count(("a.tar", "bytes=0-15999")) == 2


def test_wrong_bytes_twice_are_final_and_tell_both_digests(faulty_server, tmp_path):
    faulty_server.files["a.tar"] = DATA[::-1]
    found = hashlib.sha256(DATA[::-1]).hexdigest()[:16]

    with pytest.raises(DataError, match=rf"sha256 is {found}\.\.\., the list says .*, twice"):
        store(faulty_server, tmp_path).path("a.tar", expected=WHOLE)

    assert whole_files(tmp_path) == []


def test_a_larger_file_than_the_list_says_is_refused_without_reading_all(faulty_server, tmp_path):
    faulty_server.ranges = False
    faulty_server.files["a.tar"] = DATA * 3

    with pytest.raises(DataError, match="102,400 were expected, twice"):
        store(faulty_server, tmp_path).path("a.tar", expected=WHOLE)


def test_a_redirect_is_followed(faulty_server, tmp_path):
    faulty_server.files["moved-a.tar"] = DATA
    faulty_server.always["a.tar"] = "redirect"

    assert store(faulty_server, tmp_path).path("a.tar", expected=WHOLE).read_bytes() == DATA


def test_a_failed_download_goes_on_where_it_was(faulty_server, tmp_path):
    faulty_server.faults["a.tar"] = ["", "", "", "404"]
    with pytest.raises(DataError, match="no such file"):
        store(faulty_server, tmp_path).path("a.tar", expected=WHOLE)
    assert whole_files(tmp_path) == []
    faulty_server.gets.clear()

    path = store(faulty_server, tmp_path).path("a.tar", expected=WHOLE)

    assert path.read_bytes() == DATA
    assert faulty_server.gets[0] == ("a.tar", "bytes=48000-63999")


def test_a_part_of_another_file_is_noticed_and_thrown_away(faulty_server, tmp_path):
    faulty_server.faults["a.tar"] = ["", "", "404"]
    faulty_server.files["a.tar"] = DATA[::-1]
    with pytest.raises(DataError, match="no such file"):
        store(faulty_server, tmp_path).path("a.tar", expected=WHOLE)
    faulty_server.files["a.tar"] = DATA

    assert store(faulty_server, tmp_path).path("a.tar", expected=WHOLE).read_bytes() == DATA


DOWNLOAD = """
import sys
from convnext_cli.data import fetch
from convnext_cli.data.card import read_card
from convnext_cli.data.fetch import Expected, Store
fetch.BLOCK_BYTES = 16_000
url, cache, size, digest = sys.argv[1:]
expected = Expected(num_bytes=int(size), sha256=digest)
Store(location=url, cache_dir=fetch.Path(cache)).path("a.tar", expected=expected)
"""


def start_download(faulty_server, tmp_path) -> subprocess.Popen:
    arguments = [faulty_server.url, tmp_path / "cache", WHOLE.num_bytes, WHOLE.sha256]
    return subprocess.Popen([sys.executable, "-c", DOWNLOAD, *map(str, arguments)])


def test_a_killed_downloader_leaves_no_half_file_and_the_next_goes_on(faulty_server, tmp_path):
    faulty_server.files["a.tar"] = DATA
    faulty_server.faults["a.tar"] = ["", "", "", "stall"]
    killed = start_download(faulty_server, tmp_path)
    while len(faulty_server.gets) < 4:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert whole_files(tmp_path) == []
    faulty_server.gets.clear()

    path = store(faulty_server, tmp_path).path("a.tar", expected=WHOLE)

    assert path.read_bytes() == DATA
    assert faulty_server.gets[0] == ("a.tar", "bytes=48000-63999")


def test_processes_that_want_a_shard_at_once_download_it_once(faulty_server, tmp_path):
    faulty_server.files["a.tar"] = DATA

    processes = [start_download(faulty_server, tmp_path) for _ in range(3)]

    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert len(faulty_server.gets) == 7
    assert len(whole_files(tmp_path)) == 1


def fill(cache, *names: str, size: int = 1000) -> list[Path]:
    """Whole files in the cache, each used an hour after the one before, long ago."""
    cache.mkdir(exist_ok=True)
    paths = [cache / f"0123456789abcdef-{name}" for name in names]
    for hour, path in enumerate(paths):
        path.write_bytes(bytes(size))
        used = time.time() - 3600 * (len(names) - hour)
        os.utime(path, (used, used))
    return paths


def test_the_files_used_longest_ago_make_room(tmp_path):
    first, *_, last = fill(tmp_path, "a.tar", "b.tar", "c.tar", "d.tar")

    make_room(tmp_path, limit_bytes=2500, keep=first)

    assert sorted(tmp_path.glob("*.tar")) == [first, last]


def test_a_file_that_was_just_used_is_not_evicted(tmp_path):
    first, _ = fill(tmp_path, "a.tar", "b.tar")
    os.utime(first)

    evict(tmp_path, num_bytes=5000, keep=tmp_path / "none")

    assert list(tmp_path.glob("*.tar")) == [first]


def test_what_a_person_keeps_in_the_folder_is_neither_counted_nor_removed(tmp_path):
    cache = tmp_path / "cache"
    (cached,) = fill(cache, "a.tar")
    photo, part, folder = cache / "photo.jpg", cache / ".film.part", cache / f"{'0' * 16}-album"
    for path in (photo, part):
        path.write_bytes(bytes(5000))
        os.utime(path, (1, 1))
    folder.mkdir()
    link = cache / f"{'1' * 16}-photo.jpg"
    link.symlink_to(photo)

    make_room(cache, limit_bytes=1000, keep=tmp_path / "none")
    assert cached.exists()
    make_room(cache, limit_bytes=0, keep=tmp_path / "none")

    assert sorted(cache.glob("[!.]*")) == sorted([photo, folder, link])
    assert part.exists()


def test_a_cache_stays_under_its_limit_while_shards_come(faulty_server, tmp_path):
    limited = store(faulty_server, tmp_path, cache_bytes=250_000)
    _, newer = fill(tmp_path / "cache", "old-1.tar", "old-2.tar", size=120_000)

    path = limited.path("a.tar", expected=WHOLE)

    assert sorted(whole_files(tmp_path)) == sorted([newer.name, path.name])


def test_parts_that_nobody_went_on_with_are_cleared_away(tmp_path):
    stale, fresh = (tmp_path / f".0123456789abcdef-{name}.tar.host.part" for name in "ab")
    for part in (stale, fresh):
        part.write_bytes(b"x")
    os.utime(stale, (1, 1))

    make_room(tmp_path, limit_bytes=10**9, keep=tmp_path / "none")

    assert (stale.exists(), fresh.exists()) == (False, True)


def test_a_clock_that_was_set_back_keeps_no_room_from_new_shards(tmp_path):
    paths = [tmp_path / f"{number:016x}-a.tar" for number in range(3)]
    for path, ahead in zip(paths, (0, 7200, 7300), strict=True):
        path.write_bytes(bytes(5000))
        os.utime(path, (time.time() + ahead,) * 2)

    assert evict(tmp_path, num_bytes=5000, keep=tmp_path / "none") == 5000

    assert [path.exists() for path in paths] == [True, False, True]


def test_an_open_shard_survives_its_eviction(faulty_server, tmp_path):
    file = store(faulty_server, tmp_path).open("a.tar", expected=WHOLE)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()

    assert os.pread(file, len(DATA), 0) == DATA
    os.close(file)


def test_a_shard_that_is_evicted_before_it_is_opened_is_fetched_again(
    faulty_server, tmp_path, monkeypatch
):
    shards = store(faulty_server, tmp_path)
    whole = shards.path("a.tar", expected=WHOLE)
    really_open, tries = os.open, []

    def open_late(path, *arguments, **settings):
        if str(path) == str(whole) and not tries:
            tries.append(path)
            whole.unlink()
        return really_open(path, *arguments, **settings)

    monkeypatch.setattr(os, "open", open_late)

    file = shards.open("a.tar", expected=WHOLE)

    assert os.pread(file, len(DATA), 0) == DATA
    os.close(file)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "cache"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_evicts_and_goes_on(faulty_server, tmp_path, small_disk):
    fill(small_disk, "old-1.tar", "old-2.tar", size=120_000)

    path = store(faulty_server, tmp_path, cache_bytes=10**9).path("a.tar", expected=WHOLE)

    assert path.read_bytes() == DATA


def test_a_disk_that_is_full_of_other_things_is_told(faulty_server, tmp_path, small_disk):
    (small_disk / ".other").write_bytes(bytes(260_000))

    with pytest.raises(WriteError, match=r"No space left on device: .* bytes are missing") as full:
        store(faulty_server, tmp_path, cache_bytes=10**9).path("a.tar", expected=WHOLE)

    assert "data.cache_dir" in (full.value.hint or "")
    assert whole_files(tmp_path) == []


def test_secrets_in_a_url_are_not_told(faulty_server, tmp_path):
    secret = faulty_server.url.replace("http://", "http://user:password@")
    assert without_secrets(f"{secret}/a.tar?X-Amz-Signature=abc") == f"{faulty_server.url}/a.tar"

    with pytest.raises(DataError) as refused:
        Store(location=secret, cache_dir=tmp_path).path("b.tar", expected=WHOLE)

    assert "password" not in str(refused.value)


def test_a_small_file_is_read_through_the_same_troubles(faulty_server):
    faulty_server.files["dataset.json"] = b"{}"
    faulty_server.faults["dataset.json"] = ["500", "reset"]

    content = read_file(f"{faulty_server.url}/dataset.json", backoff_seconds=0.01)

    assert content == b"{}"


@pytest.mark.parametrize("fault", ["stall", "503", "half", "reset", "half without length"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_is_read_on_its_way_is_read_through_the_same_troubles(
    faulty_server, fault, ranges
):
    faulty_server.ranges = ranges
    faulty_server.files["a.tar"] = DATA
    faulty_server.faults["a.tar"] = ["", fault]

    def work(file, size) -> bytes:
        assert size in (len(DATA), None)
        content = file.read(10) + file.read()
        if len(content) != len(DATA):
            raise DataError("cut")
        return content

    content = read_stream(
        f"{faulty_server.url}/a.tar", work, backoff_seconds=0.01, stall_seconds=0.4
    )

    assert content == DATA


def test_a_file_that_its_reader_refuses_twice_is_refused_in_its_words(faulty_server):
    faulty_server.files["a.tar"] = DATA

    def refuse(file, size):
        raise DataError("damaged", hint="copy it again")

    with pytest.raises(DataError, match=r"(?m)^damaged$"):
        read_stream(f"{faulty_server.url}/a.tar", refuse, backoff_seconds=0.01)


def test_a_server_that_is_away_is_not_a_file_that_is_absent(monkeypatch):
    with pytest.raises(DataError, match=r"ClientConnectorError \(2 tries\)"):
        read_file("http://127.0.0.1:1/dataset.json", attempts=2, backoff_seconds=0.01)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match=r"ClientConnectorError \(5 tries\)"):
        read_card("http://127.0.0.1:1")


def test_threads_that_stalled_do_not_keep_a_program_alive(faulty_server, tmp_path):
    faulty_server.faults["a.tar"] = ["stall"]
    before = set(threading.enumerate())  # a compiler's, where another test of this process used one

    store(faulty_server, tmp_path, stall_seconds=0.3).path("a.tar", expected=WHOLE)

    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
