"""ONNX: a network as a file that other runtimes execute, checked when it is written."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from convnext_cli.errors import UserError
from convnext_cli.runs.record import writing_to, written_whole


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
        StorageError: The place cannot be written.
    """
    check_onnx()
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
    return float((torch.from_numpy(theirs) - ours).abs().max())
