"""The command tree, read and parsed without running a command."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import typer.main


@dataclass(frozen=True)
class CommandTree:
    """All commands by their words, such as `convnext data pack`; groups too."""

    commands: dict[str, Any]

    def is_group(self, path: str) -> bool:
        return hasattr(self.commands[path], "commands")

    def options(self, path: str) -> set[str]:
        parameters = self.commands[path].params
        return {name for parameter in parameters for name in parameter.opts} | {"--help", "-h"}

    def parse(self, line: str) -> tuple[str, dict[str, Any]]:
        """The command's words and its arguments; typer's error where they do not fit."""
        words = shlex.split(line, comments=True)
        path = words.pop(0)
        while self.is_group(path) and words and not words[0].startswith("-"):
            path += f" {words.pop(0)}"
            assert path in self.commands, f"there is no command {path!r}: {line}"
        if self.is_group(path):
            assert set(words) <= {"--help", "--version"}, line
            return path, {}
        words = ["1" if word == "N" else word for word in words]  # a number's placeholder
        return path, self.commands[path].make_context(path, words).params


def _iter_commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _iter_commands(child, f"{path} {name}")


@pytest.fixture(scope="session")
def tree() -> CommandTree:
    from convnext_cli.cli import app

    return CommandTree(dict(sorted(_iter_commands(typer.main.get_command(app), "convnext"))))


def find_commands(text: str) -> list[str]:
    """The `convnext ...` lines of a text's code blocks and of a recipe's head comment."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    matches = (re.match(r"^(?:\$ |# |    )?(convnext [a-z-].*)$", line.rstrip()) for line in lines)
    return [re.split(r" +[|>#]| && |; ", match[1])[0].strip() for match in matches if match]


@pytest.fixture(scope="session")
def commands_in() -> Any:
    """The function `find_commands`."""
    return find_commands
