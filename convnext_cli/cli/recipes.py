"""`convnext recipes`: list, show, diff and check recipes."""

from typing import Annotated

import typer
from rich.text import Text

from convnext_cli.cli._console import console, make_table, print_json, print_table, print_text
from convnext_cli.cli._inputs import JsonOption, OverridesArgument
from convnext_cli.errors import RecipeError, UserError
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import (
    explain_fields,
    find_recipe,
    flatten_keys,
    list_recipes,
    load_recipe,
    nearest_field,
    render_recipe,
    render_value,
)
from convnext_cli.recipe.schema import Recipe

app = typer.Typer(no_args_is_help=True, help="List, show, compare and check recipes.")


@app.command("list")
def list_(*, json_output: JsonOption = False) -> None:
    """List the shipped recipes with what they train and the published accuracy.

    Example: convnext recipes list
    """
    recipes = {name: load_recipe(name) for name in list_recipes()}
    if json_output:
        print_json(
            [
                {
                    "name": name,
                    "model": recipe.model.name,
                    "image_px": recipe.data.image_px,
                    "published_top1": recipe.published_top1,
                    "about": recipe.about,
                }
                for name, recipe in recipes.items()
            ]
        )
        return
    table = make_table("recipe", ">top-1", "about")
    for name, recipe in recipes.items():
        top1 = "" if recipe.published_top1 is None else f"{recipe.published_top1:.1f}"
        table.add_row(Text(name, style="bold"), top1, Text(recipe.about))
    print_table(table)


@app.command("show")
def show(
    recipe: Annotated[str | None, typer.Argument(help="Recipe, or with --fields a key.")] = None,
    overrides: OverridesArgument = None,
    *,
    fields: Annotated[bool, typer.Option("--fields", help="Explain the keys instead.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Show a recipe with everything it extends written out, or explain the keys.

    Example: convnext recipes show in1k_tiny, or: convnext recipes show --fields optim.lr
    """
    if fields:
        if overrides:
            raise RecipeError(
                f"--fields explains one key or section at a time, found {overrides[0]} as well",
                hint="all of them: convnext recipes show --fields",
            )
        _show_fields(recipe, json_output=json_output)
        return
    if recipe is None:
        raise RecipeError("which recipe?", hint="see them: convnext recipes list")
    loaded = load_recipe(recipe, overrides or ())
    if json_output:
        print_json(loaded.model_dump(mode="json"))
    else:
        print_text(render_recipe(loaded))


def _show_fields(key: str | None, *, json_output: bool) -> None:
    help_of = explain_fields()
    if key is None or key in help_of:
        chosen = [name for name in help_of if key in {None, name}]
    else:
        chosen = [name for name in help_of if name.startswith(f"{key}.")]
    if not chosen:
        near = nearest_field(str(key))
        raise RecipeError(
            f"no key {key} in a recipe",
            hint=f"did you mean {near}?" if near else "see all: convnext recipes show --fields",
        )
    if json_output:
        print_json({name: help_of[name] for name in chosen})
        return
    table = make_table("key", "default", "meaning")
    defaults = flatten_keys(Recipe(about="").model_dump(mode="json"))
    for name in chosen:
        default = "" if name == "about" else render_value(defaults[name])
        meaning = Text(help_of[name].replace("\n", " "))
        table.add_row(Text(name, style="bold"), Text(default), meaning)
    print_table(table)


@app.command("diff")
def diff(
    first: Annotated[str, typer.Argument(help="Recipe.")],
    second: Annotated[str, typer.Argument(help="Recipe.")],
    *,
    json_output: JsonOption = False,
) -> None:
    """Show where two recipes differ, key by key.

    Example: convnext recipes diff in1k_tiny in1k_base
    """
    left, right = (
        flatten_keys(load_recipe(name).model_dump(mode="json")) for name in (first, second)
    )
    differing = {key: (left[key], right[key]) for key in left if left[key] != right[key]}
    if json_output:
        print_json({key: {first: a, second: b} for key, (a, b) in differing.items()})
        return
    if not differing:
        console.print(f"{first} and {second} do not differ", soft_wrap=True)
        return
    table = make_table("key", first, second)
    for key, (a, b) in differing.items():
        table.add_row(key, Text(render_value(a)), Text(render_value(b)))
    print_table(table)


@app.command("check")
def check(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="Recipes; none: all shipped ones.")
    ] = None,
    *,
    json_output: JsonOption = False,
) -> None:
    """Check that recipes load and plan; exit code 2 if one does not.

    Example: convnext recipes check my_recipe.yaml
    """
    problems: dict[str, str | None] = {}
    for name in recipes or list_recipes():
        try:
            _check_one(name)
        except UserError as error:
            problems[name] = f"{error} (hint: {error.hint})" if error.hint else str(error)
        else:
            problems[name] = None
    if json_output:
        print_json(problems)
    else:
        for name, problem in problems.items():
            text = Text(f"{name}: {problem or 'ok'}", style="red" if problem else "")
            console.print(text, soft_wrap=True)
    bad = [name for name, problem in problems.items() if problem]
    if bad:
        raise RecipeError(f"{len(bad)} of {len(problems)} recipes do not hold: {', '.join(bad)}")


def _check_one(name: str) -> None:
    """Load a recipe and, where its data set's size is known, plan it on one device."""
    recipe = load_recipe(name)
    if recipe.data.dataset is not None:
        make_plan(recipe, Cluster(), name=find_recipe(name).stem)
