"""The commands, one file each: parse, call, render. Heavy imports live inside the commands."""

from typing import Annotated

import typer

from convnext_cli import __version__
from convnext_cli.cli import (
    bench,
    checkpoints,
    data,
    doctor,
    evaluate,
    finetune,
    launch,
    plan,
    predict,
    recipes,
    runs,
    train,
    weights,
)
from convnext_cli.cli._console import print_text

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug's traceback stays as Python prints it
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:  # noqa: FBT001  # typer's callback form
    if asked:
        print_text(f"convnext {__version__}\n")
        raise typer.Exit


@app.callback()
def convnext(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say it.")
    ] = False,
) -> None:
    """Train ConvNeXt: from a folder of photos to an evaluated, exported model.

    Start here: convnext train quickstart
    """
    del version


app.command()(train.train)
app.command()(finetune.finetune)
app.command()(evaluate.evaluate)
app.command()(predict.predict)
app.command()(plan.plan)
app.command()(doctor.doctor)
app.add_typer(bench.app, name="bench")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(data.app, name="data")
app.add_typer(launch.app, name="launch")
app.add_typer(recipes.app, name="recipes")
app.add_typer(runs.app, name="runs")
app.add_typer(weights.app, name="weights")
