"""`convnext`: run the application; show a user's mistake as message, hint and exit code."""

import os
import sys
from contextlib import suppress

from rich.text import Text

from convnext_cli.cli import app
from convnext_cli.cli._console import console
from convnext_cli.errors import UserError
from convnext_cli.runs.exit_code import leave_exit_code

_READER_LEFT = 141
"""128 + SIGPIPE: what a shell says of a command whose reader, such as `head`, has seen enough."""


def main() -> None:
    """Run the command line; the only place that ends the process."""
    code = 1  # whatever else escapes is a bug
    try:
        code = _run()
    finally:
        leave_exit_code(code, os.environ)
    sys.exit(code)


def _run() -> int:
    try:
        app()
    except SystemExit as end:  # typer's own way
        if isinstance(end.__context__, BrokenPipeError):
            return _READER_LEFT
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except UserError as error:
        with suppress(OSError, SystemExit):  # a reader that left does not change what it was
            _show(error)
        return error.exit_code
    return 0


def _show(error: UserError) -> None:
    # Text, not markup: a message may hold brackets, which rich would take for tags.
    console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble("\n", ("hint: ", "cyan"), error.hint), soft_wrap=True)


if __name__ == "__main__":
    main()
