"""Processes of `python` that begin with torch and Lightning imported.

These imports are 7 s of a processor, and training a few steps is 3. So a server imports them once
and forks for each command. What comes of it is a process of its own: with its number, arguments,
folder, environment, streams, signals and exit code, and convnext_cli is imported in it anew. Not
for tests of imports, nor of what libraries read when they are imported, such as OMP_NUM_THREADS,
which is 1 here. What such a process starts itself begins as always.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

PRELOADED = ("lightning.pytorch", "timm.data", "torchvision.transforms.v2")
MESSAGE_BYTES = 2**20


class Process:
    """What `subprocess.Popen` is for other commands; its output goes to files.

    Args:
        command: `sys.executable`, then a script or `-m` and a module, then its arguments.
        cwd: Its folder.
        env: Its environment.
        stdout: Where it writes, if not into a file of its own.
        stderr: The same.
    """

    def __init__(
        self,
        command: Sequence[object],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
    ) -> None:
        python, *arguments = map(str, command)
        assert python == sys.executable
        self.stdout = stdout or tempfile.TemporaryFile("w+")  # noqa: SIM115  # communicate closes it
        self.stderr = stderr or tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.returncode: int | None = None
        self._holder, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        files = [there.fileno(), self.stdout.fileno(), self.stderr.fileno()]
        socket.send_fds(_start_server(), [b"begin"], files)
        there.close()
        asked = {"arguments": arguments, "cwd": str(cwd or Path.cwd())}
        asked["env"] = dict(os.environ if env is None else env)
        self._holder.send(json.dumps(asked).encode())
        self.pid: int = json.loads(self._holder.recv(MESSAGE_BYTES))

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        try:
            return self.wait(timeout=0)
        except (BlockingIOError, TimeoutError):
            return None

    def wait(self, timeout: float) -> int:
        """The exit code, once it has ended."""
        if self.returncode is None:
            self._holder.settimeout(timeout)
            self.returncode = json.loads(self._holder.recv(MESSAGE_BYTES))
            self._holder.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 200) -> tuple[str, str]:
        """What it wrote until its end; afterwards its files are closed."""
        try:
            self.wait(timeout)
        except TimeoutError:
            self.kill()
            self.wait(timeout=30)
            raise
        finally:
            told = _read(self.stdout), _read(self.stderr)
        return told


def run(
    command: Sequence[object], *, timeout: float = 200, **more: Any
) -> subprocess.CompletedProcess:
    """What `subprocess.run` is for other commands, with its output as text."""
    process = Process(command, **more)
    stdout, stderr = process.communicate(timeout)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _read(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


def run_ranks(
    command: Sequence[object],
    *,
    world: int,
    port: int,
    env: Mapping[str, str],
    timeout: float = 200,
    grace: float = 30,
) -> subprocess.CompletedProcess:
    """The processes that `torchrun` would start, ended as it ends them.

    When one has failed, the others are sent SIGTERM, and `grace` seconds later SIGKILL.

    Returns:
        The exit code of the first that failed, and what all wrote to stderr.
    """
    first, signals, send_at = 0, [signal.SIGTERM, signal.SIGKILL], time.monotonic() + timeout
    with tempfile.TemporaryFile("w+") as stderr:
        ranks = []
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
            place |= {"LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            whole = {**env, **{name: str(value) for name, value in place.items()}}
            ranks.append(Process(command, env=whole, stdout=stderr, stderr=stderr))
        while None in (codes := [rank.poll() for rank in ranks]):
            if not first and any(codes):
                first, send_at = next(filter(None, codes)), 0
            if signals and time.monotonic() > send_at:
                for rank in ranks:
                    rank.send_signal(signals[0])
                signals, send_at = signals[1:], time.monotonic() + grace
            time.sleep(0.05)
        first = first or next(filter(None, codes), 0)
        stderr.seek(0)
        return subprocess.CompletedProcess(command, first, "", stderr.read())


@functools.cache
def _start_server() -> socket.socket:
    """The end of a socket that takes requests, one a process of tests."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with there:
        server = subprocess.Popen(
            [sys.executable, __file__, str(there.fileno())],
            env=os.environ | settings,
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
        )

    def end() -> None:
        here.close()
        server.wait()

    atexit.register(end)
    return here


def _serve(channel: socket.socket) -> list[str]:
    """Answer requests; in the process that is made for one, return its arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that hold the others
    while True:
        _, files, *_ = socket.recv_fds(channel, 16, 3)
        if not files:
            os._exit(0)
        if os.fork() == 0:
            channel.close()
            return _hold(*files)
        for file in files:
            os.close(file)


def _hold(told: int, stdout: int, stderr: int) -> list[str]:
    """Fork, and tell how the child ended; in the child, return its arguments."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    holder = socket.socket(fileno=told)
    asked = json.loads(holder.recv(MESSAGE_BYTES))
    if pid := os.fork():
        os.close(stdout)
        os.close(stderr)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with suppress(BrokenPipeError):  # the test may be gone
            holder.send(json.dumps(pid).encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            holder.send(json.dumps(code).encode())
        os._exit(0)
    holder.close()
    for file, number in ((stdout, 1), (stderr, 2)):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    return asked["arguments"]


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "what has threads cannot fork"
    arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")
