"""`convnext`: run the application; show a user's mistake as message, hint and exit code."""

import sys

from rich.text import Text

from convnext_cli.cli import app
from convnext_cli.cli._console import console
from convnext_cli.errors import UserError


def main() -> None:
    """Run the command line; the only place that ends the process."""
    try:
        app()
    except UserError as error:
        # Text, not markup: a message may hold brackets, which rich would take for tags.
        console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        if error.hint:
            console.print(Text.assemble("\n", ("hint: ", "cyan"), error.hint), soft_wrap=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
