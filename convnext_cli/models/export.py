"""ONNX: a network as a file that other runtimes execute, checked when it is written."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from convnext_cli.errors import CheckpointError, UserError
from convnext_cli.runs.record import writing_to, written_whole

LARGEST_ONNX_BYTES = 2**31 - 2**20
"""What one ONNX file can hold, less room for its outline: protobuf counts bytes in 31 bits."""

TOLERANCE = 1e-3
"""Largest difference of the logits, relative to the largest of them (at least 1)."""


def check_onnx() -> None:
    """Refuse where the packages for ONNX are not installed.

    Raises:
        UserError: One is missing.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not"
            " installed",
            hint="pip install 'convnext[onnx]'",
        )


def export_onnx(model: nn.Module, path: Path, *, image_px: int) -> float:
    """Write a network with inputs `images` (N, 3, H, W) float32 and outputs `logits` (N, K).

    N is free; H and W are `image_px`. Images are normalised by the caller.

    Returns:
        The largest difference between onnxruntime's logits and torch's, for two random images.

    Raises:
        UserError: The packages for ONNX are not installed.
        CheckpointError: The network is too large, or its logits in onnxruntime are others.
        StorageError: The place cannot be written.
    """
    check_onnx()
    num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    if num_bytes > LARGEST_ONNX_BYTES:
        raise CheckpointError(
            f"{path}: the network has {num_bytes / 2**30:.1f} GiB of weights, and one ONNX file"
            " holds 2 GiB",
            hint="convert it to another layout: --to timm, or --to huggingface",
        )
    import onnxruntime  # noqa: PLC0415  # the extra `onnx`

    model = model.eval().float()
    images_NCHW = torch.randn(2, 3, image_px, image_px, generator=torch.Generator().manual_seed(0))
    with writing_to(path), written_whole(path) as beside:
        torch.onnx.export(
            model,
            (images_NCHW,),
            beside,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("images")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(beside, providers=["CPUExecutionProvider"])
        theirs = session.run(None, {"images": images_NCHW.numpy()})[0]
        with torch.no_grad():
            ours = model(images_NCHW)
        difference = float((torch.from_numpy(theirs) - ours).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
            raise CheckpointError(
                f"{path} is not written: onnxruntime's logits differ from torch's by"
                f" {difference:.1e}",
                hint="see whether the weights are finite: convnext weights inspect CKPT",
            )
    return difference
