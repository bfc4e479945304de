"""How mistakes are told: one sentence without a full stop, and a hint whose command is there."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from convnext_cli import errors

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "convnext_cli").rglob("*.py"))
MISTAKES = {
    name
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.UserError)
}


def module_name(path: Path) -> str:
    return str(path.relative_to(ROOT / "convnext_cli"))


def iter_raised(path: Path) -> Iterator[ast.Call]:
    """Every `SomeUserError(...)` that a module writes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name in MISTAKES:
                yield node


def find_hint(call: ast.Call) -> ast.expr | None:
    return next((word.value for word in call.keywords if word.arg == "hint"), None)


def render(node: ast.AST) -> str | None:
    """The text of a string, `{}` where a value goes; None for anything else."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join("{}" if isinstance(p, ast.FormattedValue) else p.value for p in parts)
    return None


def iter_texts(node: ast.AST) -> Iterator[tuple[int, str]]:
    """All whole strings under a node, each f-string as one."""
    text = render(node)
    if text is not None:
        yield node.lineno, text
        return
    for child in ast.iter_child_nodes(node):
        yield from iter_texts(child)


def quotes_a_reason(call: ast.Call) -> bool:
    """Whether the message ends in what the system or a parser said, which names the place."""
    text = render(call.args[0]) or ""
    return re.search(r": (sample )?\{\}( \(\{\} tries\))?$", text) is not None


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_mistake_has_a_hint_or_ends_in_the_reason_of_the_system(path):
    bare = [
        f"{call.lineno}: {render(call.args[0])}"
        for call in iter_raised(path)
        if find_hint(call) is None and not quotes_a_reason(call)
    ]

    assert bare == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_messages_and_hints_are_single_sentences_without_a_full_stop(path):
    for call in iter_raised(path):
        for part in (*call.args[:1], find_hint(call)):
            text = render(part) if part is not None else None
            if text is not None:
                assert text == text.strip(), call.lineno
                assert not re.search(r"[^.]\.$|\n|!$", text), f"{call.lineno}: {text}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_command_that_a_text_names_is_there_with_its_options(path, tree):
    for line, text in iter_texts(ast.parse(path.read_text(encoding="utf-8"))):
        for command in re.findall(r"convnext (?=[a-z-]+\b)[^`()\n,;:]*", text):
            if "convnext_" not in command:
                check_mention(command, tree, where=f"{module_name(path)}:{line}")


def check_mention(command: str, tree, *, where: str) -> None:
    """Commands and options in prose: read up to the first word that can be neither."""
    words = command.replace("{}", "VALUE").split()
    path = words.pop(0)
    while tree.is_group(path):
        if not words:
            return
        path += f" {words.pop(0)}"
        assert path in tree.commands, f"{where}: there is no {path!r}"
    parameters = tree.commands[path].params
    takes_value = {name for p in parameters if not getattr(p, "is_flag", True) for name in p.opts}
    places = [p for p in parameters if p.param_type_name == "argument"]
    room = float("inf") if any(p.nargs == -1 for p in places) else len(places)
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            assert word in tree.options(path), f"{where}: {path} has no {word}"
            if word in takes_value:
                assert words, f"{where}: {word} wants a value"
                words.pop(0)
        elif re.search(r"[A-Z/_.=]", word):
            room -= 1
            assert room >= 0, f"{where}: {path} takes fewer arguments: {command}"
        else:
            return
