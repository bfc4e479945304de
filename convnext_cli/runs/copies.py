"""Copies of a run's checkpoints and tables at a URL, through fsspec.

```
URL/NAME/recipe.yaml, plan.json, metrics.jsonl, ...   small files, at each copy
URL/NAME/checkpoints/step=00000312.ckpt               then its manifest: a copy without one is torn
URL/NAME/checkpoints/links.json                       what last, best and best_ema are
```

A copy holds what the run's folder holds: what is removed there is removed here, after the new ones
have arrived, but for what the run went back from, which goes first. A copy that fails does not
end a run: it is told, and the next one makes up for it.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from convnext_cli.errors import DISK_FULL, CheckpointError, RunError, WriteError, quote_path
from convnext_cli.runs.layout import RunDir, checkpoint_step
from convnext_cli.runs.manifest import check_checkpoint, manifest_path, read_manifest
from convnext_cli.runs.record import redact_text, write_event, writing_to, written_whole

_LINKS = "links.json"
_BUCKETS = ("s3://", "s3a://", "gs://", "gcs://")
"""Of places that have no folders, only names that hold /."""
_QUIET_SECONDS = 5.0
"""For which the end of a run waits without a word."""


class RemoteFolder:
    """The copy of one run.

    Args:
        url: Its folder, with the run's name.

    Raises:
        RunError: Nothing can read such URLs, the package for them is not installed, or nobody
            answers there.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.shown = redact_text(self.url)
        """For messages and rows: without a password."""
        try:
            files, root = url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise RunError(
                f"{self.shown}: {error}",
                hint="give a URL of fsspec, such as s3://BUCKET/FOLDER with the extra s3",
            ) from error
        except Exception as error:  # some log in here, and each raises its own
            raise self._make_error(error) from error
        self._files: Any = files
        self._root: str = root

    def list_steps(self) -> list[int]:
        """The steps whose copies are complete, oldest first.

        Raises:
            RunError: The place cannot be read: no credentials, no network.
        """
        names = self._names()
        steps = ((checkpoint_step(Path(name)), name) for name in names)
        return sorted(step for step, name in steps if step is not None and _beside(name) in names)

    def push(self, run: RunDir) -> None:
        """Make this folder hold what the run's folder holds."""
        if not self.url.startswith(_BUCKETS):  # its back end would make a bucket, mistyped or not
            self._files.makedirs(f"{self._root}/checkpoints", exist_ok=True)
        # listed before the rows are copied: a copy must not go on from a step whose rows it lacks
        wanted = {
            step: path
            for path in run.list_checkpoints()
            if (step := checkpoint_step(path)) is not None and manifest_path(path).is_file()
        }
        there = self._names()
        for name in sorted(there):
            step = checkpoint_step(Path(name).with_suffix(".ckpt"))
            if step is None or not name.endswith(".json"):
                continue
            # What the run went back from must not meet the new rows and skips; of a step that was
            # taken again, a half-replaced copy has to be torn.
            replaced = step in wanted and not self._holds(manifest_path(wanted[step]))
            if replaced or step > max(wanted, default=0):
                self._files.rm_file(f"{self._root}/checkpoints/{name}")
                there.remove(name)
        for path in _small_files(run):
            if path.is_file():
                with self._written_whole(path.name) as place:
                    self._files.put_file(str(path), place)
        for path in wanted.values():
            manifest = manifest_path(path)
            if path.name in there and manifest.name in there:
                continue
            try:
                for one in (path, manifest):
                    self._files.put_file(str(one), f"{self._root}/checkpoints/{one.name}")
            except FileNotFoundError:
                if path.exists():
                    raise
                continue  # meanwhile there are newer ones
        links = {link.name: link.resolve().name for link in run.links if link.exists()}
        content = json.dumps(links).encode()
        with self._written_whole(f"checkpoints/{_LINKS}") as place:
            self._files.pipe_file(place, content)
        kept = {name for path in wanted.values() for name in (path.name, manifest_path(path).name)}
        for name in there - kept:
            if checkpoint_step(Path(name).with_suffix(".ckpt")) is None:
                continue  # not of a run
            self._files.rm_file(f"{self._root}/checkpoints/{name}")

    def pull(self, run: RunDir) -> int:
        """Bring a run back to where it can go on; returns the step of its newest whole checkpoint.

        Raises:
            CheckpointError: There is no copy, or none of them is whole.
            RunError: The place cannot be read.
        """
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        steps = self.list_steps()
        links: dict[str, str] = {}
        if _LINKS in self._names():
            links = json.loads(self._read(self._files.cat_file, f"checkpoints/{_LINKS}"))
        newest = None
        for step in reversed(steps):
            if self._pull_checkpoint(run.checkpoint(step)):
                newest = step
                break
        if newest is None:
            raise CheckpointError(
                f"{self.shown} has no whole checkpoint",
                hint="give the URL of checkpoint.copy_to with the name of the run at its end",
            )
        for path in _small_files(run):
            if self._read(self._files.exists, path.name):
                self._read(self._files.get_file, path.name, str(path))
        known = {run.checkpoint(step).name for step in steps}
        for link in run.links:
            target = links.get(link.name)
            if target not in known:  # the file is from elsewhere, and may say anything
                continue
            path = run.checkpoints / target
            if path.exists() or self._pull_checkpoint(path):
                link.symlink_to(target)
        return newest

    @contextmanager
    def _written_whole(self, name: str) -> Iterator[str]:
        """Where to write a file, of which a kill leaves the old or the new; buckets see to it."""
        if isinstance(self._files, LocalFileSystem):
            with written_whole(Path(self._root, name)) as beside:
                yield str(beside)
        else:
            yield f"{self._root}/{name}"

    def _holds(self, manifest: Path) -> bool:
        """Whether the copy of a manifest is of the same bytes."""
        copied = self._files.cat_file(f"{self._root}/checkpoints/{manifest.name}")
        ours = read_manifest(manifest.with_suffix(".ckpt"))
        try:
            return ours is not None and json.loads(copied)["sha256"] == ours.sha256
        except (ValueError, TypeError, KeyError):
            return False

    def _pull_checkpoint(self, path: Path) -> bool:
        for one in (path, manifest_path(path)):
            self._read(self._files.get_file, f"checkpoints/{one.name}", str(one))
        if check_checkpoint(path).problem is None:
            return True
        path.unlink()
        manifest_path(path).unlink()
        return False

    def _names(self) -> set[str]:
        try:
            found = self._files.ls(f"{self._root}/checkpoints", detail=False)
        except FileNotFoundError:
            return set()
        except Exception as error:  # each fsspec back end raises its own
            raise self._make_error(error) from error
        return {str(name).rstrip("/").rpartition("/")[2] for name in found}

    def _read(self, call: Callable[..., Any], name: str, *more: str) -> Any:  # noqa: ANN401  # theirs
        """What a call to the back end says of a file of the copy; the disk here may be full."""
        try:
            return call(f"{self._root}/{name}", *more)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            raise self._make_error(error) from error

    def _make_error(self, error: Exception) -> RunError:
        return RunError(
            f"{self.shown} cannot be read: {' '.join(str(error).split())} ({type(error).__name__})",
            hint="check the URL, and the credentials for it on this machine",
        )


class Copier:
    """Copies a run in a thread of its own, one copy at a time.

    Args:
        run: What is copied.
        folder: Where to.
        say: Called with a line for people when a copy fails.
    """

    def __init__(self, run: RunDir, folder: RemoteFolder, *, say: Callable[[str], None]) -> None:
        self.run = run
        self.folder = folder
        self.say = say
        self._copy: threading.Thread | None = None
        self._behind = False
        self._failed = False

    def start(self) -> None:
        """Copy what there is now; while a copy is under way, the next one makes up for it."""
        if self._copy is not None and self._copy.is_alive():
            self._behind = True
            return
        self._behind = False
        # not waited for by Python itself: whoever presses Ctrl-C twice wants out
        self._copy = threading.Thread(target=self._push, name="copies", daemon=True)
        self._copy.start()

    def finish(self) -> None:
        """Wait until everything is copied or has failed."""
        if self._copy is not None:
            self._copy.join(_QUIET_SECONDS)
            if self._copy.is_alive():
                self.say(
                    f"waiting for copies to {self.folder.shown}; after Ctrl-C twice, the same"
                    " command makes up for them"
                )
            self._copy.join()
        if self._behind:
            self.start()
            self.finish()
            return
        if self._failed:
            self.say(
                f"{self.folder.shown} lacks what was saved last; the same command again copies it"
            )

    def _push(self) -> None:
        self._failed = False
        try:
            self.folder.push(self.run)
        except Exception as error:  # noqa: BLE001  # each fsspec back end raises its own
            self._failed = True
            self.say(f"could not copy to {self.folder.shown}: {error}")
            why = f"{type(error).__name__}: {error}"
            with suppress(WriteError):  # of this disk, which training tells
                write_event(self.run.events, "copy_failed", url=self.folder.shown, why=why)


def fetch_run(url: str, runs_dir: Path) -> tuple[RunDir, int]:
    """Bring a run back from its copies into `runs_dir`; returns it and the step it goes on from.

    Raises:
        RunError: There is a folder of that name, or the copies cannot be read.
        CheckpointError: There is no whole copy.
        WriteError: The disk refuses it.
    """
    folder = RemoteFolder(url)
    run = RunDir(runs_dir / folder.url.rpartition("/")[2])
    if run.root.exists():
        raise RunError(
            f"{run.root} is there already",
            hint="move it away, or fetch beside it: convnext checkpoints fetch"
            f" {quote_path(url)} --runs-dir OTHER",
        )
    with writing_to(run.root):
        runs_dir.mkdir(parents=True, exist_ok=True)
        # beside its place, for half of a run is taken for one that goes on without its rows
        with TemporaryDirectory(dir=runs_dir, prefix=f".{run.name}.") as beside:
            whole = RunDir(Path(beside) / run.name)
            step = folder.pull(whole)
            whole.root.rename(run.root)
    return run, step


def _small_files(run: RunDir) -> tuple[Path, ...]:
    return (run.recipe, run.plan, run.environment, run.metrics, run.events, run.skips)


def _beside(name: str) -> str:
    return manifest_path(Path(name)).name
