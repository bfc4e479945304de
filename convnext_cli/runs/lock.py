"""One writer for a run's folder: a file that says who, refreshed while that process lives.

A second start is refused while the first lives. A holder that is gone is recognised at once where
its process would be seen, or when it was an earlier attempt of the same Slurm job; on another
machine, or in another container, when its signs of life have stopped, for which a start waits. File
locks are not used: cluster file systems differ in them.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from convnext_cli.errors import RunError, StorageError
from convnext_cli.runs.record import utc_now, writing_to

REFRESH_SECONDS = 10.0
STALE_SECONDS = 60.0


@dataclass(frozen=True)
class Holder:
    """A process that writes to a run's folder."""

    host: str
    pid: int
    started: float
    """When the process began, in seconds since the machine did, for numbers of processes are used
    again; the time of day may be set anew while it runs."""
    job: str | None
    """Slurm's job, where there is one."""
    since: str
    """When it took the lock, ISO 8601 in UTC."""
    pid_space: str | None = None
    """Where the number means that process: since the machine's last start, in that container."""
    attempt: str | None = None
    """How often Slurm had requeued the job; None: never."""

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class RunLock:
    """Holds a folder from `with` to the end of the block; rank 0 only.

    Args:
        path: The file.
        job: Slurm's job id; None: there is none.
        attempt: How often Slurm has requeued the job; None: never.
        say: Called with a line for people when the start has to wait.

    Raises:
        RunError: Another process that lives holds the folder.
        StorageError: The folder cannot be made.
    """

    def __init__(
        self, path: Path, *, job: str | None, attempt: str | None, say: Callable[[str], None]
    ) -> None:
        own = psutil.Process()
        self.path = path
        self.holder = Holder(
            platform.node(),
            own.pid,
            _seconds_from_boot(own),
            job,
            utc_now(),
            pid_space=_read_pid_space(),
            attempt=attempt,
        )
        self._beside = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
        self._say = say
        self._done = threading.Event()

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path.parent}: {error.strerror}",
                hint="choose another folder: --runs-dir DIR",
            ) from error
        with writing_to(self.path):
            while not self._take():
                self._wait_for_end()
        threading.Thread(target=self._refresh, name="run-lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        # the disk is gone: what that ended is told; the folder is not empty, or another start that
        # was refused was faster
        with suppress(OSError):
            if _read(self.path) == self.holder:
                self.path.unlink()
            self.path.parent.rmdir()  # a start that was refused leaves no trace

    def _take(self) -> bool:
        """Make the file if there is none, in one step: it is whole as soon as it has its name."""
        self._beside.write_text(json.dumps(asdict(self.holder)) + "\n", encoding="utf-8")
        try:
            os.link(self._beside, self.path)
        except FileExistsError:
            return False
        finally:
            self._beside.unlink()
        return True

    def _wait_for_end(self) -> None:
        """Remove the lock of a holder that is gone.

        Raises:
            RunError: It lives.
        """
        holder = _read(self.path)
        told, before = False, 0.0
        while holder is not None and not self._is_gone(holder):
            silent = self._silent_seconds()
            elsewhere = holder.host != self.holder.host
            # A container that is started again at once may meet the lock of the one before: only a
            # new sign of life says that it is not.
            lives = silent < before or (elsewhere and silent < 2 * REFRESH_SECONDS)
            if lives or self._sees(holder):
                raise RunError(
                    f"{self.path.parent} is being written by {holder}",
                    hint="wait for it or stop it, or give this run its own folder with --name NAME",
                )
            if not told:
                self._say(
                    f"{self.path.parent} was held by {holder}; no sign of life for"
                    f" {silent:.0f} s, waiting until {STALE_SECONDS:.0f} s"
                )
                told = True
            before = silent
            time.sleep(1.0)
            holder = _read(self.path)
        # Renamed first: of two that find the holder gone, one takes its lock away.
        try:
            self.path.rename(self._beside)
        except FileNotFoundError:
            return
        if _read(self._beside) != holder:  # by now it is that of the other, which was faster
            with suppress(FileExistsError):
                os.link(self._beside, self.path)
        self._beside.unlink()

    def _silent_seconds(self) -> float:
        # by the clock that dates the lock too: a file server's need not be that of this machine
        self._beside.touch()
        now = self._beside.stat().st_mtime
        self._beside.unlink()
        try:
            return now - self.path.stat().st_mtime
        except FileNotFoundError:
            return STALE_SECONDS

    def _sees(self, holder: Holder) -> bool:
        """Whether a process of that number here is the holder's."""
        own = self.holder
        return (holder.host, holder.pid_space) == (own.host, own.pid_space)

    def _is_gone(self, holder: Holder) -> bool:
        if self._sees(holder):
            try:
                alive = psutil.Process(holder.pid)
                return (
                    abs(_seconds_from_boot(alive) - holder.started) > 1.0
                    or alive.status() == psutil.STATUS_ZOMBIE
                )
            except psutil.NoSuchProcess:
                return True
        own = self.holder
        if holder.job is not None and holder.job == own.job and holder.attempt != own.attempt:
            return True  # requeued: Slurm ends an attempt before the next; steps of one may overlap
        return self._silent_seconds() >= STALE_SECONDS

    def _refresh(self) -> None:
        while not self._done.wait(REFRESH_SECONDS):
            try:
                os.utime(self.path)
            except OSError:  # the disk is gone or full: whoever writes data there tells it
                continue


def is_free(path: Path) -> bool:
    """Whether a lock is held by nobody, for certain; leaves it so.

    To look whether the file is there may be answered from what a node remembers of a file system
    that is shared; to make it, only by the file system itself.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
    except OSError:  # it is there, or nothing can be told
        return False
    path.unlink()
    with suppress(OSError):  # it is not empty
        path.parent.rmdir()
    return True


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _read_pid_space() -> str | None:
    """The machine's start and the namespace of this process's number; None where there is neither.

    Source: Linux man-pages, proc_sys_kernel(5) and pid_namespaces(7).
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _seconds_from_boot(process: psutil.Process) -> float:
    # psutil adds one to the other, and a clock that is set moves the second
    return process.create_time() - psutil.boot_time()
