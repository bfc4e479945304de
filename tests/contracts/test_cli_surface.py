"""The commands and options are those of tests/golden/cli.txt; `make golden` writes it anew."""

import os
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "cli.txt"
OF_TYPER = {"--help", "--install-completion", "--show-completion"}
READERS = {"list", "show", "diff", "check", "compare", "inspect", "plan", "evaluate", "predict"}


def render_surface(tree) -> str:
    lines = []
    for path, command in tree.commands.items():
        arguments, options = ["COMMAND"] if tree.is_group(path) else [], []
        for parameter in command.params:
            if parameter.param_type_name == "argument":
                word = (parameter.metavar or parameter.name.upper()).removesuffix("...")
                word += " ..." if parameter.nargs == -1 else ""
                arguments.append(word if parameter.required else f"[{word}]")
            elif OF_TYPER.isdisjoint(parameter.opts):
                names = "/".join([*parameter.opts, *parameter.secondary_opts])
                value = "" if parameter.is_flag else f" {parameter.metavar or 'VALUE'}"
                options.append(f"    {names}{value}" + ("  required" if parameter.required else ""))
        lines += [" ".join([path, *arguments]), *sorted(options)]
    return "\n".join(lines) + "\n"


def test_the_commands_and_options_are_the_recorded_ones(tree):
    if os.environ.get("CONVNEXT_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(render_surface(tree))

    assert GOLDEN.read_text() == render_surface(tree)


def test_every_command_option_and_argument_has_a_help(tree):
    for path, command in tree.commands.items():
        assert command.help, path
        for parameter in command.params:
            assert parameter.help, f"{path} {parameter.name}"


def test_every_command_shows_an_example_of_itself_that_parses(tree):
    for path, command in tree.commands.items():
        if not tree.is_group(path):
            _, mark, example = command.help.partition("Example: ")
            assert mark, path
            parsed, _ = tree.parse(example.splitlines()[0].partition(", or: ")[0])
            assert parsed == path


def test_what_reads_can_write_json(tree):
    for path in tree.commands:
        # `data show` makes a picture.
        if path.rpartition(" ")[2] in READERS and path != "convnext data show":
            assert "--json" in tree.options(path), path


def test_a_command_takes_at_most_two_kinds_of_arguments(tree):
    for path, command in tree.commands.items():
        kinds = [p.name for p in command.params if p.param_type_name == "argument"]
        assert len(kinds) <= 2, path
