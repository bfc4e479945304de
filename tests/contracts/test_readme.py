"""Every `convnext` command that the documents print can be typed: it parses."""

from pathlib import Path

import pytest

from convnext_cli.recipe.files import list_recipes, load_recipe, recipes_folder

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "recipes/README.md",
    "slurm/README.md",
)


def check_command(line: str, tree) -> None:
    """The command is there, its options are known, and its recipe takes its overrides."""
    _, arguments = tree.parse(line)
    recipe = arguments.get("recipe")
    if isinstance(recipe, str) and not recipe.isupper() and not arguments.get("fields"):
        if recipe.endswith(".yaml"):
            if not (ROOT / recipe).exists():
                return  # the reader's own
            recipe = str(ROOT / recipe)
        load_recipe(recipe, arguments.get("overrides") or ())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_of_a_document_parse(document, tree, commands_in):
    path = ROOT / document
    if not path.exists():
        pytest.skip(f"there is no {document}")

    for line in commands_in(path.read_text(encoding="utf-8")):
        check_command(line, tree)


def test_the_readme_begins_with_the_quick_start(commands_in):
    commands = commands_in((ROOT / "README.md").read_text(encoding="utf-8"))

    assert commands[0] in {"convnext train quickstart", "convnext train recipes/quickstart.yaml"}


@pytest.mark.parametrize("name", list_recipes())
def test_the_command_at_the_head_of_a_recipe_parses_and_is_its_own(name, tree, commands_in):
    text = (recipes_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    head = commands_in(text.partition("\nabout:")[0])

    assert head
    for line in head:
        check_command(line, tree)
    assert any(name in line for line in head)
