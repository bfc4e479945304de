"""Where commands write: stdout is data, stderr is for people."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from convnext_cli.errors import DISK_FULL, WriteError

console = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""For people; plain text where stderr is not a terminal."""


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Tell what happens now: in a line that changes, or without a terminal in a line each."""
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
    else:
        yield console.print


def print_json(value: object) -> None:
    """Write one JSON document to stdout; a path in it is text."""
    print_text(json.dumps(value, indent=2, default=str) + "\n")


def print_text(text: str) -> None:
    """Write text to stdout, which is for data.

    Raises:
        WriteError: Its disk is full.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries the rest again at its end
        raise WriteError("cannot write to stdout: its disk is full", hint="look: df -h") from error


def print_table(table: Table) -> None:
    """Show a table to people; where stderr is no terminal, as wide as it needs to be."""
    if console.is_terminal:
        console.print(table)
        return
    wide = Console(stderr=True, width=10_000)
    wide.width = max(1, wide.measure(table).maximum)
    with wide.capture() as captured:
        wide.print(table)
    for line in captured.get().removesuffix("\n").split("\n"):  # rich fills up to the widest
        console.print(line.rstrip(), soft_wrap=True)


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Show rows of text to people; columns as in `make_table`, all empty: without a head."""
    table = make_table(*columns)
    table.show_header = any(columns)
    for column in table.columns:
        column.header = Text(str(column.header))  # a name may hold [brackets]
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    print_table(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Show names and what belongs to them to people, a line each."""
    table = make_table("", "")
    table.show_header = False
    for name, text in facts:
        table.add_row(Text(name, style="bold"), Text(text))
    print_table(table)


def count_columns(things: str) -> tuple[ProgressColumn, ...]:
    """What a bar shows of a task that counts things."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(things),
        TimeRemainingColumn(),
    )


def make_table(*columns: str) -> Table:
    """A plain table in the house style; a column whose name starts with `>` is right-aligned."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"),
            justify="right" if right else "left",
            overflow="fold",  # half a path or a number is of no use
        )
    return table
