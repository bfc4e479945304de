"""A file's bytes from a local path or a URL, through a node-local cache.

```
local folder    -> the file itself, its size checked
URL (fsspec)    -> CACHE/<digest>-<name>, downloaded once per node:
                   lock -> temporary file -> size and sha256 checked -> renamed into place
```

What lies under its final name in the cache is whole and has the right digest: a killed download
leaves a temporary file that the next one of the same host replaces. Failures that may pass (5xx,
429, reset, timeout, a short body) are tried again with growing pauses; those that will not (401,
403, 404, no such protocol) end at once.
"""

import errno
import fcntl
import hashlib
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec

from convnext_cli.errors import DataError, StorageError

BLOCK_BYTES = 4 << 20
ATTEMPTS = 5
_PASSING_STATUS = frozenset({408, 425, 429})


def is_url(location: str) -> bool:
    """Whether a location names a protocol (`s3://`, `https://`) and not a local path."""
    return "://" in location and not location.startswith("file://")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a file must be: its size and, where known, its digest."""

    num_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Store:
    """The files of one data set, wherever it lies; cheap to build, safe to send to workers."""

    location: str
    """Local folder or URL that the files' names are appended to."""

    cache_dir: Path | None = None
    """Node-local folder for what comes from a URL; needed only for one."""

    attempts: int = ATTEMPTS
    """Tries at a download before it is given up."""

    backoff_seconds: float = 0.5
    """Pause before the second try; doubled for each further one, with jitter."""

    def path(self, name: str, *, expected: Expected) -> Path:
        """A local file with these bytes; downloads it first if it must.

        Raises:
            DataError: The file is not there, has another size or digest, or cannot be fetched.
            StorageError: The cache cannot be written.
        """
        if is_url(self.location):
            return self._cached(name, expected=expected)
        path = Path(self.location.removeprefix("file://")) / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(
                f"{path}: {error.strerror or error}; the data set's list of shards names it",
                hint=f"put it back, or pack the data set again into {path.parent}",
            ) from error
        if expected.num_bytes is not None and size != expected.num_bytes:
            raise DataError(
                f"{path}: {size:,} bytes, but the data set's list says {expected.num_bytes:,}",
                hint="copy the shard again, or pack the data set again",
            )
        return path

    def _cached(self, name: str, *, expected: Expected) -> Path:
        url = f"{self.location.rstrip('/')}/{name}"
        if self.cache_dir is None:
            raise DataError(f"{url}: a folder for downloads is needed", hint="set data.cache_dir")
        digest = expected.sha256 or hashlib.sha256(url.encode()).hexdigest()
        path = self.cache_dir / f"{digest[:16]}-{Path(name).name}"
        if _is_complete(path, expected):
            return path
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_name(f"{path.name}.lock")):
                # Another process may have fetched it while this one waited for the lock.
                if not _is_complete(path, expected):
                    self._download(url, path, expected=expected)
        except OSError as error:
            raise StorageError(
                f"{path}: {error.strerror or error}; shards from {self.location} are kept there",
                hint="choose another folder: data.cache_dir=DIR",
            ) from error
        return path

    def _download(self, url: str, path: Path, *, expected: Expected) -> None:
        # The host is in the name because a cache may lie on a file system that nodes share.
        partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
        try:
            for attempt in range(1, self.attempts + 1):
                try:
                    _copy(url, partial, expected=expected)
                except _Passing as error:
                    if attempt == self.attempts:
                        raise DataError(
                            f"{url}: {error} ({attempt} tries)",
                            hint="try again later; what is already fetched is kept",
                        ) from error
                    pause = self.backoff_seconds * 2 ** (attempt - 1)
                    time.sleep(pause * random.uniform(0.5, 1.5))
                else:
                    partial.replace(path)
                    return
        finally:
            with suppress(FileNotFoundError):
                partial.unlink()


class _Passing(Exception):  # noqa: N818  # a kind of failure, never shown
    """A failure that may be gone at the next try."""


def _is_complete(path: Path, expected: Expected) -> bool:
    """Whether the cache holds the file; digests were checked before it got its name."""
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return False
    return expected.num_bytes is None or size == expected.num_bytes


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between the processes of a node; the system frees it if the holder dies."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy(url: str, partial: Path, *, expected: Expected) -> None:
    """Download to a temporary file and check it.

    Raises:
        _Passing: Worth another try.
        DataError: Not worth it.
        OSError: The disk.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with partial.open("wb") as sink:
        for block in _iter_blocks(url):
            digest.update(block)
            num_bytes += len(block)
            sink.write(block)
        sink.flush()
        os.fsync(sink.fileno())
    if expected.num_bytes is not None and num_bytes != expected.num_bytes:
        raise _Passing(f"{num_bytes:,} bytes came, {expected.num_bytes:,} were expected")
    if expected.sha256 is not None and digest.hexdigest() != expected.sha256:
        raise _Passing("its sha256 is not the one in the data set's list")


def _iter_blocks(url: str) -> Iterator[bytes]:
    try:
        with fsspec.open(url, "rb") as source:
            while block := source.read(BLOCK_BYTES):
                yield block
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{url}: this protocol cannot be read ({error})",
            hint="install its fsspec package, such as s3fs, gcsfs or huggingface_hub",
        ) from error
    except FileNotFoundError as error:
        raise DataError(
            f"{url}: there is no such file", hint="check the address and the list of shards"
        ) from error
    except PermissionError as error:
        raise DataError(
            f"{url}: access denied", hint="check the credentials of this machine"
        ) from error
    except Exception as error:  # every fsspec back end raises classes of its own
        status = _status(error)
        if status is not None and 400 <= status < 500 and status not in _PASSING_STATUS:
            raise DataError(
                f"{url}: refused with HTTP status {status}",
                hint="check the address and the credentials of this machine",
            ) from error
        raise _Passing(f"{type(error).__name__}: {error}") from error


def _status(error: Exception) -> int | None:
    """HTTP status of a back end's error, where it has one (aiohttp, requests, botocore)."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return 403
    return None


def read_file(location: str, *, attempts: int = ATTEMPTS, backoff_seconds: float = 0.5) -> bytes:
    """All bytes of one small file at a local path or URL, such as a dataset.json.

    Raises:
        DataError: It is not there or cannot be fetched.
    """
    if not is_url(location):
        try:
            return Path(location.removeprefix("file://")).read_bytes()
        except OSError as error:
            raise DataError(f"{location}: {error.strerror or error}") from error
    for attempt in range(1, attempts + 1):
        try:
            return b"".join(_iter_blocks(location))
        except _Passing as error:
            if attempt == attempts:
                raise DataError(f"{location}: {error} ({attempt} tries)") from error
            time.sleep(backoff_seconds * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError
