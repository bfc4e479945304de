"""A file's bytes from a local path or a URL, through a node-local cache.

```
local folder    -> the file itself, its size checked
URL (fsspec)    -> CACHE/<digest>-<name>, downloaded once per node:
                   lock -> .part, by ranges -> size and sha256 checked -> renamed into place
```

What lies under its final name in the cache is whole and has the right digest. A download that was
killed or failed leaves its part, and the next one goes on from there; a digest that does not fit
throws the part away and fetches once more from the start. Failures that may pass (5xx, 429 with
its Retry-After, reset, timeout, a short body, a server that stalls or crawls) are tried again with
growing pauses; those that will not (400, 401, 403, 404, a certificate, no such protocol) end at
once.

Where the cache is full, the files used longest ago make room. A file that a process has open stays
readable until it is closed.
"""

import fcntl
import hashlib
import io
import os
import random
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.core import url_to_fs

from convnext_cli.errors import DISK_FULL, DataError, StorageError, WriteError
from convnext_cli.runs.record import sync

BLOCK_BYTES = 8 << 20
ATTEMPTS = 8
DEADLINE_SECONDS = 1800.0
"""After so long a download is given up, whatever else is left to try."""
STALL_SECONDS = 60.0
"""No block may take longer: 140 kB/s at least."""
SLOWEST_BYTES_PER_SECOND = 16_384
"""Of a server that gives no ranges, over `STALL_SECONDS`."""
RESERVE_BYTES, RESERVE_FRAC = 10_000_000_000, 0.05
"""What a cache without a limit leaves free on its disk: the lesser of both."""

_PASSING_STATUS = frozenset({408, 425, 429})
_GCSFS_WORDS = (("Forbidden: ", 403), ("Bad Request: ", 400))
"""How gcsfs tells of some statuses. Source: gcsfs/retry.py `validate_response`."""
_LONGEST_PAUSE_SECONDS = 60.0
_OLD_SECONDS = 86_400.0
_IN_USE_SECONDS = 5.0
_WHOLE = f"{'[0-9a-f]' * 16}-*"
"""Names of whole files in a cache, as a pattern."""

Result = TypeVar("Result")


def is_url(location: str) -> bool:
    """Whether a location names a protocol (`s3://`, `https://`) and not a local path."""
    return "://" in location and not location.startswith("file://")


def default_cache_home() -> Path:
    """Where all that can be made again is kept: `XDG_CACHE_HOME` or ~/.cache, then convnext."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "convnext"


def default_cache_dir() -> Path:
    """Where shards from a URL are kept, in `default_cache_home`."""
    return default_cache_home() / "shards"


def without_secrets(url: str) -> str:
    """A URL for messages: no user, no password, no query, where signatures and tokens are."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a file must be: its size and, where known, its digest."""

    num_bytes: int | None = None
    sha256: str | None = None
    version: str = ""
    """Tells apart what may lie at the same address at another time, where no digest is known."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """The files of one data set, wherever it lies; cheap to build, safe to send to workers."""

    location: str
    """Local folder or URL that the files' names are appended to."""

    cache_dir: Path | None = None
    """Node-local folder for what comes from a URL, with `~` for home; needed only for one."""

    cache_bytes: int | None = None
    """Largest size of that folder; None: the disk, but for a reserve."""

    attempts: int = ATTEMPTS
    """Tries at a download before it is given up."""

    backoff_seconds: float = 0.5
    """Longest pause before the second try; doubled for each further one."""

    stall_seconds: float = STALL_SECONDS
    """A block that takes longer counts as a failure."""

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

    def open(self, name: str, *, expected: Expected) -> int:
        """An open file descriptor of the same file, which eviction cannot take away any more.

        Raises:
            DataError: As `path`.
            StorageError: As `path`.
        """
        while True:
            path = self.path(name, expected=expected)
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if not is_url(self.location):
                    raise
                # Evicted since: fetched again.

    def _cached(self, name: str, *, expected: Expected) -> Path:
        url = f"{self.location.rstrip('/')}/{name}"
        if self.cache_dir is None:
            raise DataError(
                f"{without_secrets(url)}: a folder for downloads is needed",
                hint="set data.cache_dir",
            )
        address = hashlib.sha256(f"{url}\n{expected.version}".encode()).hexdigest()
        cache_dir = self.cache_dir.expanduser()
        path = cache_dir / f"{(expected.sha256 or address)[:16]}-{Path(name).name}"
        try:
            if not _is_complete(path, expected):
                cache_dir.mkdir(parents=True, exist_ok=True)
                with _locked(path.with_name(f".{path.name}.lock")):
                    # Another process may have fetched it while this one waited for the lock.
                    if not _is_complete(path, expected):
                        self._download(url, path, expected=expected)
                        make_room(cache_dir, limit_bytes=self.cache_bytes, keep=path)
        except OSError as error:
            kind = WriteError if error.errno in DISK_FULL else StorageError
            raise kind(
                f"{path}: {error.strerror or error}; shards from {without_secrets(self.location)}"
                f" are kept there",
                hint="choose another folder: data.cache_dir=DIR",
            ) from error
        return path

    def _download(self, url: str, path: Path, *, expected: Expected) -> None:
        """Fetch, check and rename; called by the holder of the file's lock."""
        # The host is in the name because a cache may lie on a file system that nodes share.
        part = path.with_name(f".{path.name}.{socket.gethostname()}.part")
        wrong: list[str] = []

        def fetch() -> None:
            try:
                _fetch(url, part, expected=expected, stall_seconds=self.stall_seconds)
            except _WrongBytes as error:
                part.unlink(missing_ok=True)
                wrong.append(str(error))
                if len(wrong) > 1:
                    raise DataError(
                        f"{without_secrets(url)}: {error}, twice",
                        hint="the file is not the one of the data set's list: copy it there again",
                    ) from error
                raise _Passing(str(error)) from error
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                self._free_for(part, expected=expected, error=error)
                raise _Passing("the disk was full") from error

        _retry(fetch, what=url, attempts=self.attempts, backoff_seconds=self.backoff_seconds)
        part.replace(path)
        sync(path.parent)

    def _free_for(self, part: Path, *, expected: Expected, error: OSError) -> None:
        """Evict as much as is missing.

        Raises:
            WriteError: There is nothing to evict, or not enough.
        """
        free = shutil.disk_usage(part.parent).free
        held = part.stat().st_size if part.exists() else 0
        missing = max(BLOCK_BYTES, (expected.num_bytes or 0) - held) - free
        freed = evict(part.parent, num_bytes=missing, keep=part)
        if freed < missing:
            part.unlink(missing_ok=True)
            raise WriteError(
                f"{part.parent}: {error.strerror}: {missing:,} bytes are missing for a shard,"
                f" {free:,} are free",
                hint="free some, or keep shards elsewhere: data.cache_dir=DIR",
            ) from error


class _Passing(Exception):  # noqa: N818  # a kind of failure, never shown
    """A failure that may be gone at the next try."""

    def __init__(self, message: str, *, pause_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.pause_seconds = pause_seconds
        """What the server asks for."""


class _NoRanges(_Passing):
    """A server gives a file only as a whole."""


class _WrongBytes(Exception):  # noqa: N818  # as above
    """A whole file that is not the expected one."""


def _is_complete(path: Path, expected: Expected) -> bool:
    """Whether the cache holds the file, which is marked as used now.

    Its digest was checked before it got its name.
    """
    try:
        size = path.stat().st_size
        os.utime(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return expected.num_bytes is None or size == expected.num_bytes


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between the processes of a node; the system frees it if the holder dies."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _list_files(cache_dir: Path, pattern: str = _WHOLE) -> list[tuple[float, int, Path]]:
    """(time of the last use, bytes, path) of files of the cache, those used longest ago first.

    A person's files may lie beside them: only a regular file with a name of the cache's is its own.
    """
    found = []
    for path in cache_dir.glob(pattern):
        try:
            status = path.lstat()
        except FileNotFoundError:  # evicted by another process
            continue
        if S_ISREG(status.st_mode):
            found.append((status.st_mtime, status.st_size, path))
    return sorted(found)


def make_room(cache_dir: Path, *, limit_bytes: int | None, keep: Path) -> None:
    """Evict what is over the limit, and parts that nobody has gone on with for a day."""
    files = _list_files(cache_dir)
    used = sum(size for _, size, _ in files)
    if limit_bytes is not None:
        over = used - limit_bytes
    else:
        disk = shutil.disk_usage(cache_dir)
        over = int(min(RESERVE_BYTES, RESERVE_FRAC * disk.total)) - disk.free
    evict(cache_dir, num_bytes=over, keep=keep)
    for used_at, _, part in _list_files(cache_dir, f".{_WHOLE}.part"):
        if time.time() - used_at > _OLD_SECONDS:
            part.unlink(missing_ok=True)


def evict(cache_dir: Path, *, num_bytes: int, keep: Path) -> int:
    """Delete the files used longest ago until so many bytes are free; how many came free.

    One file stays in any case, and those used in the last seconds: a process is about to open them.
    """
    freed = 0
    if num_bytes <= 0:
        return freed
    with _locked(cache_dir / ".evict.lock"):
        for used, size, path in _list_files(cache_dir):
            if freed >= num_bytes:
                break
            # a time in the future is that of a clock which was set back since
            if path != keep and abs(time.time() - used) >= _IN_USE_SECONDS:
                path.unlink(missing_ok=True)
                freed += size
    return freed


def _fetch(url: str, part: Path, *, expected: Expected, stall_seconds: float) -> None:
    """Download what is missing of a file, and check the whole.

    Raises:
        _WrongBytes: It is whole, and not what was expected.
        OSError: The disk; or the network, which `_retry` sorts.
    """
    digest = hashlib.sha256()
    held = _hash_part(part, digest) if part.exists() else 0
    num_bytes = expected.num_bytes
    if num_bytes is not None and held > num_bytes:
        raise _WrongBytes(f"{held:,} bytes came, {num_bytes:,} were expected")
    with _disk():
        sink = part.open("ab")
    with sink:
        for block in _iter_blocks(url, sink, num_bytes=num_bytes, stall_seconds=stall_seconds):
            if sink.tell() == 0:  # the source began anew
                digest, held = hashlib.sha256(), 0
            digest.update(block)
            held += len(block)
            with _disk():
                sink.write(block)
                sink.flush()
            if num_bytes is not None and held > num_bytes:
                raise _WrongBytes(f"{held:,} bytes came, {num_bytes:,} were expected")
        with _disk():
            os.fsync(sink.fileno())
    if num_bytes is not None and held < num_bytes:
        raise _Passing(f"{held:,} bytes came, {num_bytes:,} were expected")
    if expected.sha256 is not None and digest.hexdigest() != expected.sha256:
        raise _WrongBytes(
            f"its sha256 is {digest.hexdigest()[:16]}..., the list says {expected.sha256[:16]}..."
        )


class _DiskError(OSError):
    """Writing failed: the disk's error, not the network's."""


@contextmanager
def _disk() -> Iterator[None]:
    """Mark the errors of the block as the disk's."""
    try:
        yield
    except OSError as error:
        raise _DiskError(error.errno, error.strerror) from error


def _hash_part(part: Path, digest: Any) -> int:  # noqa: ANN401  # hashlib has no public type
    held = 0
    with part.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            held += len(block)
    return held


def _iter_blocks(
    url: str, sink: BinaryIO, *, num_bytes: int | None, stall_seconds: float
) -> Iterator[bytes]:
    """What is missing of a file, from where the sink stands.

    A source that gives no ranges is read from its begin; the sink is emptied first.
    """
    files, path = _within(stall_seconds, lambda: url_to_fs(url))
    at = sink.tell()
    with closing(
        _within(
            stall_seconds,
            lambda: files.open(path, "rb", block_size=BLOCK_BYTES, cache_type="none"),
        )
    ) as source:
        end = source.size if num_bytes is None else num_bytes
        by_ranges = source.size is not None
        while by_ranges and at < end:
            stop = min(at + BLOCK_BYTES, end)
            try:
                block = _within(stall_seconds, partial(_read_range, source, at, stop))
            except ValueError:  # fsspec's word for a server that ignores ranges
                by_ranges = False
                break
            if len(block) != stop - at:
                raise _Passing(f"{len(block):,} bytes came of a range of {stop - at:,}")
            yield block
            at = stop
    if not by_ranges:
        sink.seek(0)
        sink.truncate()
        yield from _iter_stream(files, path, stall_seconds=stall_seconds)


def _read_range(source: Any, start: int, stop: int) -> bytes:  # noqa: ANN401  # of any library
    source.seek(start)
    block: bytes = source.read(stop - start)
    return block


def _iter_stream(files: Any, path: str, *, stall_seconds: float) -> Iterator[bytes]:  # noqa: ANN401
    with closing(_within(stall_seconds, lambda: files.open(path, "rb", block_size=0))) as source:
        begin, came = time.monotonic(), 0
        while block := _within(stall_seconds, lambda: source.read(BLOCK_BYTES)):
            yield block
            came += len(block)
            seconds = time.monotonic() - begin
            if seconds > stall_seconds:
                if came < SLOWEST_BYTES_PER_SECOND * seconds:
                    raise _Passing(f"the server crawls: {came:,} bytes in {seconds:.0f} s")
                begin, came = time.monotonic(), 0


def _within(seconds: float, work: Callable[[], Result]) -> Result:
    """The result of some work, or a failure if it takes too long.

    A thread does it, because no fsspec back end ends by itself where a server stalls; one that
    hangs for good is left behind.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise _Passing(f"nothing came for {seconds:g} s")
    if errors:
        raise errors[0]
    return results[0]


def _retry(
    work: Callable[[], Result], *, what: str, attempts: int, backoff_seconds: float
) -> Result:
    """Do some work over a network until it succeeds or will not.

    Raises:
        DataError: It will not, or the tries are used up.
        OSError: The disk.
    """
    shown = without_secrets(what)
    begin = time.monotonic()
    for attempt in range(1, attempts + 1):
        try:
            return work()
        except (DataError, StorageError, _DiskError):
            raise
        except Exception as error:  # noqa: BLE001  # every fsspec back end raises its own
            failure = error if isinstance(error, _Passing) else _classify(error, shown)
            late = time.monotonic() - begin > DEADLINE_SECONDS
            if attempt == attempts or late:
                tries = "1 try" if attempt == 1 else f"{attempt} tries"
                raise DataError(
                    f"{shown}: {failure} ({tries})",
                    hint="try again later; what is already fetched is kept",
                ) from _unmask(error)  # whose kind says to others whether the file is absent
            pause = random.uniform(0, backoff_seconds * 2 ** (attempt - 1))
            time.sleep(min(_LONGEST_PAUSE_SECONDS, max(pause, failure.pause_seconds)))
    raise AssertionError


def _classify(error: Exception, shown: str) -> _Passing:
    """A failure worth another try.

    Raises:
        DataError: It is not worth one.
    """
    error = _unmask(error)
    status = _status(error)
    if status is None and isinstance(error, ImportError | ValueError):
        raise DataError(
            f"{shown}: this protocol cannot be read ({error})",
            hint="install its fsspec package: pip install 'convnext[s3]' or 'convnext[gcs]'",
        ) from error
    if isinstance(error, FileNotFoundError) or status == 404:
        raise DataError(
            f"{shown}: there is no such file", hint="check the address and the list of shards"
        ) from error
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        raise DataError(
            f"{shown}: access denied", hint="check the credentials of this machine"
        ) from error
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error)):
        raise DataError(
            f"{shown}: the server's certificate is not trusted",
            hint="check the address, and the certificates of this machine",
        ) from error
    passing = status in _PASSING_STATUS or isinstance(error, TimeoutError)  # S3's has status 400
    if status is not None and 400 <= status < 500 and not passing:
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise DataError(
            f"{shown}: refused with HTTP status {status}{why}",
            hint="check the address and the credentials of this machine",
        ) from error
    told = f"HTTP status {status}" if status is not None else f"{type(error).__name__}"
    return _Passing(told, pause_seconds=_retry_after(error))


def _unmask(error: Exception) -> Exception:
    """What was met, where fsspec's HTTP back end says of any failure that there is no such file."""
    cause = error.__cause__
    http = isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp")
    return cause if http and isinstance(cause, Exception) and _status(cause) != 404 else error


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        nested = getattr(seen, "certificate_error", None)
        if isinstance(nested, BaseException):
            yield nested
        seen = seen.__cause__ or seen.__context__


def _status(error: Exception) -> int | None:
    """HTTP status of a back end's error, where it has one (aiohttp, requests, s3fs, gcsfs)."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    # botocore's error, which s3fs translates
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        value = response["ResponseMetadata"].get("HTTPStatusCode")
        return value if isinstance(value, int) else None
    return next((code for word, code in _GCSFS_WORDS if str(error).startswith(word)), None)


def _retry_after(error: Exception) -> float:
    """Seconds that a server asks to wait; 0 where it says nothing that can be understood."""
    headers = getattr(error, "headers", None) or {}
    try:
        return max(0.0, float(headers.get("Retry-After", 0)))
    except (TypeError, ValueError):
        return 0.0


def read_file(
    location: str,
    *,
    attempts: int = 5,
    backoff_seconds: float = 0.5,
    stall_seconds: float = STALL_SECONDS,
) -> bytes:
    """All bytes of one small file at a local path or URL, such as a dataset.json.

    Raises:
        DataError: It is not there or cannot be fetched.
    """
    if not is_url(location):
        try:
            return Path(location.removeprefix("file://")).read_bytes()
        except OSError as error:
            raise DataError(f"{location}: {error.strerror or error}") from error

    def read() -> bytes:
        with fsspec.open(location, "rb") as file:
            content: bytes = file.read()
            return content

    return _retry(
        lambda: _within(stall_seconds, read),
        what=location,
        attempts=attempts,
        backoff_seconds=backoff_seconds,
    )


def read_stream(
    url: str,
    work: Callable[[BinaryIO, int | None], Result],
    *,
    attempts: int = 5,
    backoff_seconds: float = 0.5,
    stall_seconds: float = STALL_SECONDS,
) -> Result:
    """What some work makes of a file at a URL, which it reads once and forward.

    Args:
        url: Where the file is.
        work: Called with the file and its size, None where that is not known; each try anew.
        attempts: Tries before it is given up.
        backoff_seconds: As of a `Store`.
        stall_seconds: As of a `Store`.

    Raises:
        DataError: The file is not there or cannot be fetched; or the work's own, twice.
    """
    whole = False
    damaged: list[DataError] = []

    def read() -> Result:
        nonlocal whole
        files, path = _within(stall_seconds, lambda: url_to_fs(url))
        form = {"block_size": 0} if whole else {"block_size": BLOCK_BYTES, "cache_type": "none"}
        with closing(_within(stall_seconds, lambda: files.open(path, "rb", **form))) as source:
            size = getattr(source, "size", None)
            forward = _Remote(source, size=size, stall_seconds=stall_seconds)
            try:
                return work(io.BufferedReader(forward, BLOCK_BYTES), size)
            except _NoRanges:
                whole = True
                raise
            except DataError as error:  # perhaps only on its way here
                if damaged:
                    raise
                damaged.append(error)
                raise _Passing(str(error)) from error

    return _retry(read, what=url, attempts=attempts, backoff_seconds=backoff_seconds)


class _Remote(io.RawIOBase):
    """A file over a network; a read that stalls, or ends before the file does, may pass."""

    def __init__(self, source: Any, *, size: int | None, stall_seconds: float) -> None:  # noqa: ANN401
        self._source = source
        self._left = size
        self._stall_seconds = stall_seconds

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  # memory of any kind
        """Read what comes next."""
        try:
            block = _within(self._stall_seconds, partial(self._source.read, len(buffer)))
        except ValueError as error:  # as in `_iter_blocks`
            raise _NoRanges("no ranges are given") from error
        if self._left is not None:
            self._left -= len(block)
            if not block and self._left:
                raise _Passing(f"{self._left:,} bytes did not come")
        buffer[: len(block)] = block
        return len(block)
