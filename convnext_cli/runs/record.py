"""What a run writes down: JSON lines, JSON files, a CSV, and the environment it ran in.

```
metrics.jsonl   {"step": 50, "epoch": 0.16, "time": "2025-01-01T10:00:00.000+00:00",
                 "train/loss": 6.91, "train/lr": 0.0001, ...}       rows are sparse
events.jsonl    {"event": "started" | "checkpoint" | "stopped" | ..., "time": ..., "step": ...}
```

Numbers that are not finite are written as null, because JSON has no word for them; the CSV
says `nan`. Everything here is for rank 0 only: two writers of one file would mix their lines.
"""

import csv
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import psutil

from convnext_cli.errors import RunError, StorageError, WriteError, quote_path
from convnext_cli.plan.cluster import count_cpus

_PACKAGES = (
    "convnext", "deepspeed", "fsspec", "lightning", "matplotlib", "mlflow", "numpy",
    "pillow", "pydantic", "safetensors", "tensorboard", "timm", "torch", "torchmetrics",
    "torchvision", "triton", "wandb", "webdataset",
)  # fmt: skip
_VARIABLES = re.compile(
    r"(SLURM|CUDA|NCCL|GLOO|TORCH|PYTORCH|TORCHELASTIC|OMP|MKL|KMP|HF|WANDB|MLFLOW|CONVNEXT)_.*"
    r"|(LOCAL_|GROUP_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|PYTHONHASHSEED|TMPDIR"
)
_SECRET_WORDS = "token|secret|key|password|passwd|credential|signature"
_SECRET = re.compile(_SECRET_WORDS, re.IGNORECASE)
_SECRET_ASSIGNMENT = re.compile(rf"([\w.\-]*({_SECRET_WORDS})[\w.\-]*)=[^&\s]+", re.IGNORECASE)
_URL_USER = re.compile(r"(?P<scheme>\w+://)[^/@\s]+@")
_REDACTED = "<redacted>"
_FIRST_COLUMNS = ("step", "epoch", "time")


def utc_now() -> str:
    """The time now as ISO 8601 in UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class JsonLines:
    """A file that grows by one JSON object a line; each is flushed, so that a kill loses none.

    Opening creates the folder and the file. A last line that a kill cut short is removed first,
    so that the next row does not stick to it.

    Args:
        path: The file; created when absent.

    Raises:
        WriteError: The file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            _mend_last_line(path)
            self._file = self._open()

    def write(self, row: Mapping[str, object]) -> None:
        """Append one row and hand it to the operating system.

        Raises:
            WriteError: The disk is full or gone.
        """
        text = json.dumps(_jsonable(row), allow_nan=False, ensure_ascii=False)
        line = text.encode(errors="backslashreplace") + b"\n"
        with writing_to(self.path):
            while line:
                line = line[self._file.write(line) :]

    def truncate_after(self, step: int, *, key: str | None = None) -> int:
        """Drop the rows of later steps, and return how many were dropped.

        A resume from `step` calls it, so that the steps taken again do not appear twice. Rows
        without a step stay. The file is replaced at once: a kill leaves the old or the new one.

        Args:
            step: The last one that stays.
            key: Its rows with this key are dropped too.

        Raises:
            RunError: A line is not a JSON object.
            WriteError: The file cannot be written.
        """
        kept, dropped = [], 0
        for row, line in _iter_lines(self.path):
            row_step = row.get("step")
            again = row_step == step and key is not None and key in row
            if isinstance(row_step, int) and (row_step > step or again):
                dropped += 1
            else:
                kept.append(line)
        if dropped:
            with writing_to(self.path):
                self._file.close()
                _write_whole(self.path, b"".join(line + b"\n" for line in kept))
                self._file = self._open()
        return dropped

    def _open(self) -> io.FileIO:
        # without a buffer: what a full disk refused would be tried again by close, which raises
        return self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_event(path: Path, event: str, **more: object) -> None:
    """Append what has happened, with the time, to a file such as `events.jsonl`.

    Raises:
        WriteError: The file cannot be written.
    """
    with JsonLines(path) as events:
        events.write({"event": event, "time": utc_now(), **more})


def read_jsonl(path: Path) -> list[dict[str, object]]:
    """The rows of a JSON-lines file, oldest first; none when the file is absent.

    A last line that a kill cut short is left out.

    Raises:
        RunError: Another line is not a JSON object, or the file cannot be read.
    """
    return [row for row, _ in _iter_lines(path)]


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file.

    Raises:
        RunError: The file is absent or unreadable, or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}", hint=hint_aside(path.parent)) from error
    if not isinstance(value, dict):
        raise RunError(
            f"{path} holds no JSON object, but a {type(value).__name__}",
            hint=hint_aside(path.parent),
        )
    return value


def hint_aside(folder: Path) -> str:
    """What to do with a folder of which a file cannot be made out."""
    return f"move what is damaged aside: mv {quote_path(folder)} {quote_path(f'{folder}.damaged')}"


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file so that a kill leaves the old one or the new one, never half of it.

    Raises:
        WriteError: The file cannot be written.
    """
    text = json.dumps(_jsonable(value), indent=2, allow_nan=False, ensure_ascii=False)
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, text.encode(errors="backslashreplace") + b"\n")


def write_csv(rows_path: Path, table_path: Path) -> None:
    """Write the rows of a JSON-lines file as CSV: the same keys, the union of them as columns.

    The whole table is written anew, because a later row may bring a new column. A key that a row
    lacks is an empty cell; a number that was not finite is `nan`.

    Raises:
        RunError: The rows cannot be read.
        WriteError: The table cannot be written.
    """
    rows = read_jsonl(rows_path)
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in _FIRST_COLUMNS if key in keys]
    columns += [key for key in keys if key not in _FIRST_COLUMNS]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({key: "nan" if value is None else value for key, value in row.items()})
    with writing_to(table_path):
        table_path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(table_path, text.getvalue().encode())


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file to, which becomes `path` at the end of the block.

    At every instant `path` holds what was there or the new file, whole and durable; after an error
    nothing is left beside it.
    """
    # In the same folder, so that the rename stays inside one file system and is atomic.
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_whole(path: Path, content: bytes) -> None:
    with written_whole(path) as beside:
        beside.write_bytes(content)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Tell a disk that cannot be written as a user's error that names `path`.

    Raises:
        StorageError: A file lies where a folder must be.
        WriteError: The block met another `OSError`.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, (NotADirectoryError, FileExistsError)):
            file = next((place for place in (path, *path.parents) if place.is_file()), None)
            if file is not None:
                raise StorageError(
                    f"cannot write {path}: {file} is a file, not a folder",
                    hint=f"name another place, or look: ls -l {quote_path(file)}",
                ) from error
        there = (folder for folder in path.parents if os.access(folder, os.F_OK))
        folder = quote_path(next(there, path.parent))
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}",
            hint=f"check space and permission: df -h {folder}; ls -ld {folder}",
        ) from error


def record_environment(
    *, variables: Mapping[str, str] | None = None, command: Sequence[str] | None = None
) -> dict[str, object]:
    """What a reader needs to know about the machine and the software to run this again.

    Knows nothing of torch: GPUs are asked of `nvidia-smi`. What is not there is None or empty.
    Values of variables and of `name=value` arguments whose name speaks of a token, secret, key or
    password are redacted, and so are users in URLs.

    Args:
        variables: The process environment; None for that of this process.
        command: The command line; None for that of this process.
    """
    variables = os.environ if variables is None else variables
    command = sys.argv if command is None else command
    return {
        "time": utc_now(),
        "command": _redact_command(command),
        "folder": str(Path.cwd()),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": _package_versions(),
        "git": {"package": _git_state(Path(__file__)), "folder": _git_state(Path.cwd())},
        "hostname": platform.node(),
        "cpu": {
            "model": _cpu_model(),
            "count": os.cpu_count(),
            "usable": count_cpus(),
        },
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": _list_gpus(),
        "variables": {
            name: _REDACTED if _SECRET.search(name) else redact_text(value)
            for name, value in sorted(variables.items())
            if _VARIABLES.fullmatch(name)
        },
    }


def _iter_lines(path: Path) -> Iterator[tuple[dict[str, object], bytes]]:
    """Rows with their bytes; a broken last line ends the file, a broken other line is an error."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for number, line in filled:
        row = _parse_line(line)
        if row is not None:
            yield row, line
        elif number != filled[-1][0]:
            raise RunError(
                f"{path} line {number} is not a JSON object: {line[:60].decode(errors='replace')}",
                hint=f"remove that line: sed -i {number}d {quote_path(path)}",
            )


def _parse_line(line: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except ValueError:  # also bytes that are no UTF-8
        return None
    return value if isinstance(value, dict) else None


def _mend_last_line(path: Path) -> None:
    """Cut a broken last line off, and end a whole one that lacks its newline."""
    content = path.read_bytes()
    body = content.rstrip(b"\n")
    if not body:
        return
    start = body.rfind(b"\n") + 1
    if _parse_line(body[start:]) is None:
        os.truncate(path, start)
    elif body == content:
        with path.open("ab") as file:
            file.write(b"\n")


def _jsonable(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [_jsonable(item) for item in value]
        case Path():
            return str(value)
        case _:
            return value


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    return versions


def _git_state(path: Path) -> dict[str, object] | None:
    """Commit and cleanliness of the repository of a folder, or of the one that tracks a file."""
    folder = path if path.is_dir() else path.parent
    git = ("git", "--no-optional-locks", "-C", str(folder))
    # A package below site-packages may lie inside somebody's repository without being part of it.
    if path.is_file() and output_of(*git, "ls-files", "--error-unmatch", path.name) is None:
        return None
    commit = output_of(*git, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = output_of(*git, "status", "--porcelain", "--untracked-files=no")
    return {
        "root": output_of(*git, "rev-parse", "--show-toplevel"),
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
    }


def _list_gpus() -> list[dict[str, object]]:
    fields = ("name", "memory.total", "driver_version", "uuid")
    text = output_of(
        "nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"
    )
    rows = [[cell.strip() for cell in line.split(",")] for line in (text or "").splitlines()]
    return [
        {
            "name": name,
            "memory_mib": int(memory) if memory.isdigit() else None,
            "driver": driver,
            "uuid": uuid,
        }
        for name, memory, driver, uuid in (row for row in rows if len(row) == len(fields))
    ]


def output_of(*command: str) -> str | None:
    """What a program prints, stripped; None when it is absent, fails or hangs."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        result = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _cpu_model() -> str | None:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or None


def _redact_command(command: Iterable[str]) -> list[str]:
    redacted, secret_follows = [], False
    for argument in command:
        name, equals, _ = argument.partition("=")
        if secret_follows:
            redacted.append(_REDACTED)
        elif equals and _SECRET.search(name):
            redacted.append(f"{name}={_REDACTED}")
        else:
            redacted.append(redact_text(argument))
        secret_follows = (
            argument.startswith("-") and "=" not in argument and bool(_SECRET.search(argument))
        )
    return redacted


def redact_text(text: str) -> str:
    """The text without users in URLs, and without what is assigned to the name of a secret."""
    without_users = _URL_USER.sub(rf"\g<scheme>{_REDACTED}@", text)
    return _SECRET_ASSIGNMENT.sub(rf"\1={_REDACTED}", without_users)
