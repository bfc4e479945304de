"""`convnext data order`: which images a step uses, such as those that made a spike."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from convnext_cli.cli._console import console, print_json
from convnext_cli.cli._inputs import LARGEST, JsonOption
from convnext_cli.errors import DataError
from convnext_cli.recipe.files import load_recipe
from convnext_cli.runs.layout import find_run
from convnext_cli.runs.record import read_json

_EXAMPLES = 10


def order(
    directory: Annotated[str, typer.Argument(help="Packed data set: a folder or URL.")],
    *,
    step: Annotated[int, typer.Option(help="Step, counted from 0.", min=0, max=LARGEST)] = 0,
    epoch: Annotated[
        int | None,
        typer.Option(
            help="Epoch of the step (default: steps count through the run).", min=0, max=LARGEST
        ),
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Take seed, batch, order, devices and skips of this run.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The run's seed.", min=0, max=LARGEST)] = 0,
    global_images: Annotated[int, typer.Option(help="Images a step.", min=1)] = 4096,
    kind: Annotated[Literal["full", "window"], typer.Option(help="Same as data.order.")] = "full",
    lanes: Annotated[int, typer.Option(help="Same as data.lanes.", min=1)] = 256,
    world: Annotated[
        int | None, typer.Option(help="Devices (default: the run's, or 1).", min=1)
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="One device's share (default: all).", min=0)
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Print the images of one step, in the order of the batch, of all devices or of one.

    Example: convnext data order packed --step 3 --global-images 8 --world 4 --rank 1 --json
    """
    from convnext_cli.data.augment import EvalView
    from convnext_cli.data.card import read_card
    from convnext_cli.data.fetch import Store, default_cache_dir
    from convnext_cli.data.order import ORDER_VERSION, Order, Skip, same_shard_rate
    from convnext_cli.data.reader import ImageReader

    card = read_card(directory)
    skips: tuple[Skip, ...] = ()
    if run is not None:
        from convnext_cli.training.start import read_skips

        found = find_run(run, Path("runs"))
        recipe = load_recipe(str(found.recipe))
        seed, global_images = recipe.seed, recipe.batch.global_images
        kind, lanes = recipe.data.order, recipe.data.lanes
        skips = read_skips(found)
        plan = read_json(found.plan)
        used = plan.get("world_size")
        world = world or (used if isinstance(used, int) else None)
        if plan.get("data_fingerprint") != card.fingerprint:
            raise DataError(
                f"{found.root} holds a run on the data set {plan.get('data_source')}, and that is"
                f" not what {directory} holds now",
                hint="name that data set, or leave out --run",
            )
    world = world or 1
    reader = ImageReader(
        card,
        store=Store(location=directory, cache_dir=default_cache_dir()),
        split="train",
        view=EvalView(image_px=8),
        seed=seed,
        on_bad="raise",
    )
    try:
        planned = Order(
            shard_images=reader.shard_images,
            seed=seed,
            global_images=global_images,
            lanes=lanes,
            kind=kind,
            skips=skips,
        )
        planned.check_world(world)
        if epoch is None:
            epoch, step = planned.locate(step)
        ids = (
            planned.batch(epoch, step)
            if rank is None
            else planned.share(epoch, step, rank=rank, world=world)
        )
    except ValueError as error:
        raise DataError(
            f"{directory}: {error}",
            hint="take another --step, --world, --rank or --global-images",
        ) from error
    names = reader.names(ids.tolist())
    rate = same_shard_rate(planned, epoch=epoch, steps=[step])
    if json_output:
        print_json(
            {
                "fingerprint": card.fingerprint,
                "order_version": ORDER_VERSION,
                "order": kind,
                "seed": seed,
                "epoch": epoch,
                "step": step,
                "global_images": global_images,
                "lanes": planned.num_lanes,
                "world": world,
                "rank": rank,
                "same_shard_rate": rate,
                "samples": [
                    {"sample": int(sample), "key": key, "label": label}
                    for sample, (key, label) in zip(ids, names, strict=True)
                ],
            }
        )
        return
    whose = "all devices" if rank is None else f"device {rank} of {world}"
    console.print(
        f"epoch {epoch}, step {step} of {planned.steps_per_epoch:,}, {whose}: {len(names):,}"
        f" images; {planned.dropped_images:,} images of the epoch fill no step",
        soft_wrap=True,
    )
    for key, label in names[:_EXAMPLES]:
        console.print(f"  {key}  {card.classes[label]}", soft_wrap=True)
    if len(names) > _EXAMPLES:
        console.print(f"  ... {len(names) - _EXAMPLES:,} more: --json lists them all")
    console.print(f"pairs from the same shard: {rate:.2f} times a uniform shuffle")
