"""`convnext weights`: what a checkpoint is, and the same weights in another layout."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from convnext_cli.cli._console import console, print_facts, print_json
from convnext_cli.cli._inputs import JsonOption, check_folder_of
from convnext_cli.cli._models import WeightsOption
from convnext_cli.errors import CheckpointError, StorageError, quote_path

app = typer.Typer(no_args_is_help=True, help="Inspect checkpoints and convert them.")

Target = Literal["official", "timm", "torchvision", "huggingface", "onnx"]
_FILE_ENDINGS = (".bin", ".ckpt", ".onnx", ".pt", ".pth", ".safetensors")
PathArgument = Annotated[Path, typer.Argument(help="Checkpoint in any published layout, or a run.")]


@app.command()
def inspect(
    path: PathArgument, *, weights: WeightsOption = "auto", json_output: JsonOption = False
) -> None:
    """Say what a checkpoint is: layout, architecture, classes, averaged weights.

    Example: convnext weights inspect convnext_tiny_22k_1k_224.pth
    """
    from convnext_cli.models.weights import count_non_finite, read_weights
    from convnext_cli.training.loading import find_checkpoint

    path = find_checkpoint(path, prefer=weights)
    found = read_weights(path, prefer=weights)
    parameters = sum(value.numel() for value in found.state.values())
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in found.state.values()})
    facts = {
        "path": str(path),
        "layout": found.layout,
        "container": found.container,
        "architecture": found.variant.name,
        "num_classes": found.num_classes,
        "parameters": parameters,
        "dtypes": dtypes,
        "weights": found.source,
        "has_ema": found.has_ema,
        "non_finite": count_non_finite(found.state),
        "image_px": found.card.image_px if found.card else None,
        "step": found.card.step if found.card else None,
    }
    if json_output:
        print_json(facts)
        return
    head = "no head (self-supervised pre-training)"
    rows = {
        "file": str(path),
        "layout": found.layout + (f", under {found.container!r}" if found.container else ""),
        "model": f"{found.variant.name}, {parameters:,} parameters, {', '.join(dtypes)}",
        "head": head if found.num_classes is None else f"{found.num_classes:,} classes",
        "weights": f"{found.source}{'; the file holds raw and averaged' if found.has_ema else ''}",
    }
    if found.card:
        after = f" after {found.card.step:,} steps" if found.card.step is not None else ""
        rows["trained"] = f"at {found.card.image_px} px{after}"
    if facts["non_finite"]:
        rows["warning"] = f"{facts['non_finite']:,} values are NaN or infinite"
    print_facts(rows.items())


@app.command()
def convert(
    path: PathArgument,
    *,
    to: Annotated[Target, typer.Option(help="Layout to write.")],
    out: Annotated[Path, typer.Option(help="File to write (huggingface: folder).")],
    weights: WeightsOption = "auto",
    map_head: Annotated[
        bool, typer.Option("--map-head", help="Turn an ImageNet-22K head into one for 1K by wnid.")
    ] = False,
    image_px: Annotated[
        int | None, typer.Option(help="ONNX: image side (default: as trained, else 224).", min=32)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Write a checkpoint's weights in another layout, bit for bit, or as ONNX.

    Example: convnext weights convert runs/mine --to timm --out model.pth
    """
    _check_out(out, to=to, force=force)
    if image_px is not None and to != "onnx":
        raise CheckpointError(
            f"--image-px {image_px}: weights in the {to} layout take images of any size",
            hint="leave it out; evaluation has its own: convnext evaluate --help",
        )
    from convnext_cli.models.convnext import build_convnext
    from convnext_cli.models.export import check_onnx, export_onnx
    from convnext_cli.models.weights import (
        count_non_finite,
        load_into,
        map_head_to_imagenet1k,
        read_weights,
        write_weights,
    )
    from convnext_cli.training.loading import find_checkpoint

    path = find_checkpoint(path, prefer=weights)
    found = read_weights(path, prefer=weights)
    if found.variant.family == "timm":
        raise CheckpointError(
            f"{path} is a {found.variant.name}, whose layout is timm's own already",
            hint="only ConvNeXt models are converted",
        )
    if map_head:
        found, told = map_head_to_imagenet1k(found)
        console.print(Text(told), soft_wrap=True)
    model = build_convnext(
        found.variant, num_classes=found.num_classes or 1, layer_scale_init=found.layer_scale_init
    )
    load_into(model, found)  # refuses weights that are not whole
    if to == "onnx":
        check_onnx()
        if found.num_classes is None:
            raise CheckpointError(
                f"{path} has no head to export",
                hint=f"fine-tune it first: convnext finetune --from {quote_path(path)} --data DIR",
            )
        if bad := count_non_finite(found.state):
            raise CheckpointError(
                f"{path}: {bad:,} of its values are NaN or infinite, so it gives no logits",
                hint="use an earlier checkpoint of the run",
            )
        px = image_px or (found.card.image_px if found.card else 224)
        difference = export_onnx(model, out, image_px=px)
        console.print(
            Text(f"wrote {out}: {px} px, onnxruntime agrees with torch to {difference:.1e}"),
            soft_wrap=True,
        )
        return
    write_weights(found, out, layout=to)
    console.print(
        Text(f"wrote {out}: {found.variant.name}, {found.source} weights, {to} layout"),
        soft_wrap=True,
    )
    if found.card is not None and to == "torchvision" and out.suffix != ".safetensors":
        console.print(
            "it has no place for the names of classes and for how images are prepared, without"
            " which an evaluation comes to other numbers; a .safetensors keeps both",
            soft_wrap=True,
            style="yellow",
        )


def _check_out(out: Path, *, to: Target, force: bool) -> None:
    """Refuse a place before any work is done for it.

    Raises:
        StorageError: Something is there, its name is not one of the target's, or its folder is
            not there.
    """
    if out.exists() and not force:
        raise StorageError(f"{out} exists already", hint="overwrite it with --force")
    if to == "huggingface":
        if out.suffix in _FILE_ENDINGS or out.is_file():
            raise StorageError(
                f"--out {out}: for --to huggingface it is a folder",
                hint=f"for example --out {quote_path(f'{out.stem}-huggingface')}",
            )
        return
    endings = (".onnx",) if to == "onnx" else (".pth", ".pt", ".safetensors")
    if out.suffix not in endings:
        raise StorageError(
            f"--out {out}: for --to {to} the name ends in {' or '.join(endings)}",
            hint=f"for example --out {quote_path(out.stem + endings[0])}",
        )
    if out.is_dir():
        raise StorageError(
            f"--out {out}: this is a folder", hint=f"for example --out {quote_path(out / out.name)}"
        )
    check_folder_of(out)
