"""The exit code that each process leaves in a file, where the launcher that started it asks.

A launcher knows one number for all of its processes; `launch/exits.py` reads the files.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from convnext_cli.plan.cluster import read_rank

EXIT_DIR = "CONVNEXT_EXIT_DIR"
EXIT_RANKS = "CONVNEXT_EXIT_RANKS"

_WAIT_SECONDS = 10.0


def leave_exit_code(
    code: int, environ: Mapping[str, str], *, wait_seconds: float = _WAIT_SECONDS
) -> None:
    """Tell the launcher how this process ends; nothing where no launcher asked.

    With a code other than 0 it waits a moment for the others: a launcher ends all processes as
    soon as one has failed, and rank 0 may still be writing down why it stops.
    """
    if EXIT_DIR not in environ:
        return
    folder = Path(environ[EXIT_DIR])
    try:
        (folder / str(read_rank(environ))).write_text(str(code))
        deadline = time.monotonic() + wait_seconds
        while code and time.monotonic() < deadline:
            if len(list(folder.iterdir())) >= int(environ.get(EXIT_RANKS, "1")):
                return
            time.sleep(0.1)
    except OSError:  # the launcher is gone, and nobody is left to be told
        return
