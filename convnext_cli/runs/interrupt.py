"""The wish to stop that a signal or the time limit of a job expresses; the only signal handlers.

The handlers set a flag and nothing else. `training/preempt.py` has all ranks agree on it between
two optimizer steps. They are installed at the start of the command, before anything heavy is
loaded, so that a signal in the first seconds is kept as well.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C, the end of a job, Slurm's warning, and a terminal or connection that is gone."""

_MARGIN_SECONDS = 30.0


def list_heeded() -> tuple[signal.Signals, ...]:
    """`SIGNALS`, but for SIGHUP where nohup has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return tuple(number for number in SIGNALS if not (ignored and number == signal.SIGHUP))


def leave_to_main() -> None:
    """Ignore `SIGNALS` in a process that helps the main one, but for SIGTERM, which ends it.

    Batch systems and terminals send them to every process of a job.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """What this process was asked.

    Args:
        deadline: Unix time at which the job will be ended; None: nobody says. One that is over is
            not heeded: this process lives, so it is another job's, in whose shell tmux began, or
            the job was given more time.
    """

    def __init__(self, *, deadline: float | None = None) -> None:
        over = deadline is not None and deadline <= time.time()
        self.deadline = None if over else deadline
        self.received: signal.Signals | None = None
        self._arrivals: int | None = None

    def listen(self) -> None:
        """Install the handlers; does nothing outside the main thread, where Python has none."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in list_heeded():
            signal.signal(number, self._receive)
        self._arrivals, told = os.pipe()
        for end in (self._arrivals, told):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def read_arrived(self) -> signal.Signals | None:
        """The signal that came, also while the main thread is not in Python; for another thread.

        A handler in Python does not run as long as a library waits in its own code; the number of
        the signal is written to a pipe at once.
        """
        if self.received is None and self._arrivals is not None:
            with suppress(BlockingIOError):
                numbers = [n for n in os.read(self._arrivals, 4096) if n in SIGNALS]
                return signal.Signals(numbers[-1]) if numbers else None
        return self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is signal.SIGINT and number == signal.SIGINT:
            # Whoever presses Ctrl-C twice wants out; the newest whole checkpoint is still there.
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def reason(self, *, needed_seconds: float) -> str | None:
        """Why to stop now, in a few words; None: go on.

        Args:
            needed_seconds: What another step and a save may take.
        """
        if self.received is not None:
            return self.received.name
        if self.deadline is None or time.time() + needed_seconds + _MARGIN_SECONDS < self.deadline:
            return None
        return "the time limit of the job"
