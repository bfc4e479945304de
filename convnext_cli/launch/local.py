"""`convnext train` on the devices of this machine, by torchrun; again after what can be mended."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from convnext_cli.errors import Stopped
from convnext_cli.launch.exits import choose_exit_code, read_exit_codes
from convnext_cli.runs.exit_code import EXIT_DIR, EXIT_RANKS
from convnext_cli.runs.interrupt import list_heeded

# torchrun's own report of an exit code is a page; the process that failed has said why already.
# So it ends with the exit code of that one; 128 + n where signal n ended it, as shells have it.
_TORCHRUN = """\
import logging, sys
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
try:
    run.main()
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)
"""


class LocalLaunch:
    """Runs the processes of one machine, one a device.

    A signal to this process goes on to them, and from then on nothing is started again.

    Args:
        arguments: What stands after `convnext`.
        num_processes: Number of devices.
    """

    def __init__(self, arguments: Sequence[str], *, num_processes: int) -> None:
        self.arguments = tuple(arguments)
        self.num_processes = num_processes
        self.received: signal.Signals | None = None
        self._torchrun: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """One attempt; returns the exit code of the whole.

        Raises:
            Stopped: A signal came before the processes listened for it.
        """
        command = [
            *(sys.executable, "-c", _TORCHRUN, "--standalone", "--max-restarts=0"),
            *(f"--nproc-per-node={self.num_processes}", "--module", "convnext_cli"),
            *self.arguments,
        ]
        before = {number: signal.signal(number, self._pass_on) for number in list_heeded()}
        try:
            with tempfile.TemporaryDirectory(prefix="convnext-exits-") as folder:
                environ = os.environ | {EXIT_DIR: folder, EXIT_RANKS: str(self.num_processes)}
                environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a warning
                # A session of its own: Ctrl-C would reach torchrun too, which then ends all.
                self._torchrun = subprocess.Popen(command, env=environ, start_new_session=True)
                if self.received is not None:  # while it began
                    self._torchrun.terminate()
                launcher_code = self._torchrun.wait()
                codes = read_exit_codes(Path(folder))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        ended_by = -launcher_code if launcher_code < 0 else launcher_code - 128
        if not codes and self.received and ended_by in {self.received, signal.SIGTERM}:
            raise Stopped(
                f"stopped by {self.received.name} before the first step; nothing was lost",
                hint="run the same command again to go on",
            )
        return choose_exit_code(codes, num_ranks=self.num_processes, launcher_code=launcher_code)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Tell the workers, not torchrun: it would kill them after half a minute."""
        del frame
        self.received = signal.Signals(number)
        if self._torchrun is None:
            return
        try:
            torchrun = psutil.Process(self._torchrun.pid)
            workers = torchrun.children()
            for process in workers:
                # Python tells of SIGINT by a traceback as long as nothing else is made of it.
                process.send_signal(number if _listens(process.pid) else signal.SIGTERM)
            if not workers:
                torchrun.terminate()
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return


def _listens(pid: int) -> bool:
    """Whether a process has installed its handlers; until then SIGTERM ends it without a word."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():  # gone, or not on Linux
        return True
    caught = int(status.read_text(encoding="utf-8").partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)
