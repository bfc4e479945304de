"""Shards in S3: a bucket on this machine, and a server that speaks enough of S3 to misbehave."""

import hashlib

import pytest

from convnext_cli.data import fetch
from convnext_cli.data.fetch import Expected, Store
from convnext_cli.errors import DataError

DATA = bytes(range(256)) * 400
WHOLE = Expected(num_bytes=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _account(monkeypatch):
    monkeypatch.setattr(fetch, "BLOCK_BYTES", 16_000)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # the one of another test has its server


@pytest.fixture
def bucket(monkeypatch):
    """A bucket with one shard, served by moto."""
    moto = pytest.importorskip("moto.server")
    import s3fs

    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    if not files.exists("bucket"):
        files.mkdir("bucket")
    files.pipe("bucket/a.tar", DATA)
    yield "s3://bucket"
    server.stop()


@pytest.fixture
def faulty_bucket(faulty_server, monkeypatch):
    """The same from a server that does what a test tells it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", faulty_server.url)
    faulty_server.files["bucket/a.tar"] = DATA
    return faulty_server


def store(tmp_path, location="s3://bucket") -> Store:
    return Store(location=location, cache_dir=tmp_path / "cache", attempts=4, backoff_seconds=0.01)


def test_a_shard_is_fetched_by_ranges_and_checked(tmp_path, bucket):
    assert store(tmp_path, bucket).path("a.tar", expected=WHOLE).read_bytes() == DATA


def test_a_missing_key_is_refused_at_once(tmp_path, bucket):
    with pytest.raises(DataError, match=r"s3://bucket/b\.tar: there is no such file"):
        store(tmp_path, bucket).path("b.tar", expected=WHOLE)


def test_another_object_under_the_same_key_is_refused(tmp_path, bucket):
    other = Expected(num_bytes=len(DATA), sha256="0" * 64)

    with pytest.raises(DataError, match=r"its sha256 is .*, the list says 0000000000000000\.\.\."):
        store(tmp_path, bucket).path("a.tar", expected=other)


@pytest.mark.parametrize("fault", ["503", "500", "half", "reset"])
def test_a_store_that_is_too_busy_is_asked_again(tmp_path, faulty_bucket, fault):
    faulty_bucket.faults["bucket/a.tar"] = [fault]

    assert store(tmp_path).path("a.tar", expected=WHOLE).read_bytes() == DATA


def test_a_denied_object_is_refused_at_once(tmp_path, faulty_bucket):
    faulty_bucket.always["bucket/a.tar"] = "403"

    with pytest.raises(DataError, match=r"access denied|refused with HTTP status 403"):
        store(tmp_path).path("a.tar", expected=WHOLE)

    assert len(faulty_bucket.gets) == 1


def test_what_s3_will_not_answer_is_refused_at_once_in_its_words(tmp_path, faulty_bucket):
    faulty_bucket.always["bucket/a.tar"] = "400"  # as for another region than the bucket's

    with pytest.raises(DataError, match=r"refused with HTTP status 400 \(Bad Request\)"):
        store(tmp_path).path("a.tar", expected=WHOLE)

    assert len(faulty_bucket.gets) == 1
