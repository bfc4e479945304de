"""Fixtures of all tiers; a test belongs to the tier whose folder it is in."""

import contextlib
import io
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TIERS = ("unit", "contracts", "parity", "kernels", "e2e", "cluster", "gpu")

# What a launcher, a cluster or a person set must not reach a test.
USER_SETTINGS = (
    *("CONVNEXT_", "SLURM_", "TORCHELASTIC_", "NCCL_", "PL_", "WANDB_", "MLFLOW_", "HF_"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "COLUMNS", "FORCE_COLOR", "CLICOLOR_FORCE"),
)
TEST_SETTINGS = ("CONVNEXT_GOLDEN", "CONVNEXT_TEST_DATA")

# A machine that is busy is not a failure; pytest's limit ends what hangs.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(TESTS).parts[0]
        if tier in TIERS:
            item.add_marker(tier)
        if tier == "unit":
            item.add_marker(pytest.mark.timeout(60))
        if tier == "gpu":
            import torch

            reason = "this machine has no CUDA device"
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason))
            # torch's own, where a thread of autograd begins with a product
            cublas = "ignore:Attempting to run cuBLAS, but there was no current CUDA context"
            item.add_marker(pytest.mark.filterwarnings(f"{cublas}:UserWarning"))


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in list(os.environ):
        if name.startswith(USER_SETTINGS) and name not in TEST_SETTINGS:
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled yet, and what is set for the compiler is set back."""
    import torch

    torch.compiler.reset()
    with torch._dynamo.config.patch():
        yield
    torch.compiler.reset()


@dataclass(frozen=True)
class CliResult:
    """What a command left: its exit code and its two streams."""

    exit_code: int
    stdout: str
    stderr: str


RunCli = Callable[..., CliResult]


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunCli:
    """Run `convnext ARGUMENTS` in this process, in `tmp_path`, the way the installed script does.

    An exception that `main` lets through is a bug of the command; it goes through here too.
    """
    from convnext_cli.__main__ import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> CliResult:
        monkeypatch.setattr(sys, "argv", ["convnext", *map(str, arguments)])
        out = io.StringIO()
        exit_code = 0
        # stderr is a file, for the watch of a training writes stacks to its descriptor
        with tempfile.TemporaryFile("w+") as err:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main()
                except SystemExit as end:
                    code = end.code
                    exit_code = code if isinstance(code, int) else int(code is not None)
            err.seek(0)
            return CliResult(exit_code, out.getvalue(), err.read())

    return run


@pytest.fixture
def run_process(tmp_path: Path) -> RunCli:
    """The same as `run_cli` in a process of its own, which sees no GPU: for training."""

    def run(*arguments: object, cwd: Path = tmp_path, timeout: float = 240) -> CliResult:
        done = subprocess.run(
            [sys.executable, "-m", "convnext_cli", *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return CliResult(done.returncode, done.stdout, done.stderr)

    return run


def write_shapes(folder: Path, *, images_per_class: int, seed: int) -> None:
    """Discs, squares and crosses, each in its own hue on noise: JPEG class folders, 40 x 32 px."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:32, :40]
    for name, hue in (("cross", (40, 90, 230)), ("disc", (230, 60, 40)), ("square", (50, 200, 60))):
        (folder / name).mkdir(parents=True)
        for number in range(images_per_class):
            pixels = rng.integers(60, 130, (32, 40, 3))
            y, x = rng.integers(10, 22), rng.integers(10, 30)
            near_y, near_x = abs(rows - y), abs(columns - x)
            if name == "disc":
                shape = near_y**2 + near_x**2 < 64
            elif name == "square":
                shape = np.maximum(near_y, near_x) < 7
            else:
                shape = (np.minimum(near_y, near_x) < 3) & (np.maximum(near_y, near_x) < 9)
            pixels[shape] = np.clip(np.array(hue) + rng.integers(-25, 25, 3), 0, 255)
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / name / f"{number:03d}.jpg", quality=92)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Class folders `train` (3 x 16 images) and `val` (3 x 5), which a small model can learn."""
    folder = tmp_path / "images"
    write_shapes(folder / "train", images_per_class=16, seed=1)
    write_shapes(folder / "val", images_per_class=5, seed=2)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images: CONVNEXT_TEST_DATA, or shared/data beside the repository."""
    asked = os.environ.get("CONVNEXT_TEST_DATA")
    folder = Path(asked) if asked else ROOT.parent / "shared" / "data"
    if not any(folder.glob("*.zip")):
        pytest.skip(f"no real images in {folder}; name their folder in CONVNEXT_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`write_shapes` packed: train (39 images in 3 shards) and val (12 in 1); only read it."""
    from convnext_cli.data.pack import PackOptions, pack

    folder = tmp_path_factory.mktemp("tiny")
    write_shapes(folder / "images" / "train", images_per_class=13, seed=1)
    write_shapes(folder / "images" / "val", images_per_class=4, seed=2)
    pack(folder / "images", folder / "shards", options=PackOptions(images_per_shard=16))
    return folder / "shards"


@dataclass
class FaultyServer:
    """An HTTP server on this machine that serves files, and misbehaves as it is told.

    `faults` gives, by file name, what each next GET of it meets; after the last one it is served
    well, but for `always`. HEAD is always answered well, unless the file is missing.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    always: dict[str, str] = field(default_factory=dict)
    gets: list[tuple[str, str | None]] = field(default_factory=list)
    """(name, Range header) of every GET."""
    ranges: bool = True
    leave: threading.Event = field(default_factory=threading.Event)


class _FaultyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faulty: FaultyServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        content = self.faulty.files.get(name)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        if self.faulty.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        self.faulty.gets.append((name, self.headers.get("Range")))
        content = self.faulty.files.get(name)
        waiting = self.faulty.faults.get(name)
        fault = waiting.pop(0) if waiting else self.faulty.always.get(name, "")
        if content is None or fault[:3].isdigit():
            status, _, pause = (fault or "404").partition(" ")
            self.send_response(int(status))
            if pause:
                self.send_header("Retry-After", pause)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "redirect":
            self.send_response(302)
            self.send_header("Location", f"{self.faulty.url}/moved-{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "login":
            content = b"<html>please log in</html>"
        if fault == "flipped":
            content = bytes([content[0] ^ 1]) + content[1:]
        self._answer(content, fault)

    def _answer(self, content: bytes, fault: str) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        status = 200
        if asked and self.faulty.ranges and fault != "login":
            status, content = 206, content[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(status)
        if fault == "half without length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "trickle":
            for byte in content:
                if self.faulty.leave.is_set():
                    break
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
        elif fault in {"reset", "stall", "half", "half without length"}:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            if fault == "stall":
                self.faulty.leave.wait(30)
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
        else:
            self.wfile.write(content)


@pytest.fixture
def faulty_server() -> Iterator[FaultyServer]:
    """A server that does what a test tells it."""
    faulty = FaultyServer()
    handler = type("Handler", (_FaultyHandler,), {"faulty": faulty})

    class QuietServer(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # clients that give up are what is tested

    server = QuietServer(("127.0.0.1", 0), handler)
    faulty.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield faulty
    faulty.leave.set()
    server.shutdown()
    server.server_close()
    thread.join()
