"""`convnext`: run the application; show a user's mistake as message, hint and exit code."""

import errno
import gc
import io
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

from rich.text import Text

from convnext_cli.cli import app
from convnext_cli.cli._console import console
from convnext_cli.errors import UserError, quote_path
from convnext_cli.plan.cluster import read_local_rank, read_rank
from convnext_cli.runs.exit_code import leave_exit_code

_READER_LEFT = 141
"""128 + SIGPIPE: what a shell says of a command whose reader, such as `head`, has seen enough."""

_OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""What torch and Lightning are made of stays; to search it for cycles, again and again as it grows,
is a seventh of the time that a training takes to start."""

_REFUSED_PATHS = (errno.EACCES, errno.ENAMETOOLONG)


def main() -> None:
    """Run the command line; the only place that ends the process."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    code = 1  # whatever else escapes is a bug
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Data has one encoding in every locale, and paths keep their own bytes.
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        code = _run()
    finally:
        leave_exit_code(code, os.environ)
    sys.exit(code)


def _run() -> int:
    try:
        _check_folder()
        app()
    except SystemExit as end:  # typer's own way
        if isinstance(end.__context__, BrokenPipeError):
            return _READER_LEFT
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except UserError as error:
        return _tell(error)
    except OSError as error:  # wherever a path is looked at, it may be closed to this user
        if error.errno not in _REFUSED_PATHS or not isinstance(error.filename, str):
            raise
        hint = (
            f"check the name and your permission: ls -ld {quote_path(Path(error.filename).parent)}"
        )
        return _tell(UserError(f"{error.filename}: {error.strerror}", hint=hint))
    return 0


def _check_folder() -> None:
    """Refuse to run in a folder that was deleted: torch ends the process, blaming one of its files.

    Raises:
        UserError: It is gone, and perhaps another has its name by now.
    """
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UserError(
            "the folder in which this command was started is gone",
            hint='go to another one; if it was made anew: cd "$PWD"',
        ) from error


def _tell(error: UserError) -> int:
    label = "error: "
    if console.quiet and error.of_one_rank and (read_local_rank() == 0 or _has_joined()):
        console.quiet = False
        label = f"error (rank {read_rank()} on {socket.gethostname()}): "
    with suppress(OSError, SystemExit):  # a reader that left does not change what it was
        # Text, not markup: a message may hold brackets, which rich would take for tags.
        console.print(Text.assemble((label, "bold red"), str(error)), soft_wrap=True)
        if error.hint:
            console.print(Text.assemble("\n", ("hint: ", "cyan"), error.hint), soft_wrap=True)
    return error.exit_code


def _has_joined() -> bool:
    """Whether this process trains with others: what it met before, all of its node meet alike."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


if __name__ == "__main__":
    main()
