"""`predict_images`: what a loaded model sees in image files.

Shapes: N images, C = 3 channels, K classes.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from convnext_cli.data.decode import decode_rgb
from convnext_cli.data.header import BadImage, is_animated_webp
from convnext_cli.data.mix import normalise
from convnext_cli.data.pack import Unreadable, make_jpeg
from convnext_cli.errors import Diverged, quote_path
from convnext_cli.plan.cluster import DeviceKind
from convnext_cli.training.loading import LoadedModel
from convnext_cli.training.report import Guess, Prediction, Unread

_PER_PASS = 16

_CONVERTED = (b"BM", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How BMP, GIF and TIFF files begin, which only the packer reads."""


def predict_images(
    model: LoadedModel, paths: Sequence[Path], *, device: DeviceKind, top: int
) -> Iterator[Prediction | Unread]:
    """What the model sees in each file, in their order; a file that is no image says so.

    Args:
        model: Moved to the device.
        paths: Files of the formats that can be packed.
        device: Where the network runs.
        top: Classes to propose for each image, at most as many as there are.

    Raises:
        Diverged: Some outputs were not finite.
    """
    network = model.network.to(device)
    left = iter(paths)
    while chunk := list(islice(left, _PER_PASS)):
        read = [_read_view(path, model) for path in chunk]
        views = [view for view in read if isinstance(view, Tensor)]
        rows: Iterator[tuple[list[float], list[int]]] = iter(())
        if views:
            x_NCHW = normalise(
                torch.stack(views).to(device),
                mean=model.preprocessing.mean,
                std=model.preprocessing.std,
            )
            with torch.inference_mode():
                logits_NK: Tensor = network(x_NCHW)
            if not torch.isfinite(logits_NK).all():
                raise Diverged(
                    f"{model.path} gave non-finite outputs",
                    hint="see whether its weights are finite, and use an earlier checkpoint if not:"
                    f" convnext weights inspect {quote_path(model.path)}",
                )
            best = logits_NK.float().softmax(1).topk(min(top, model.num_classes), dim=1)
            rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for path, view in zip(chunk, read, strict=True):
            if isinstance(view, Unread):
                yield view
                continue
            probabilities, labels = next(rows)
            yield Prediction(
                image=str(path),
                guesses=tuple(
                    Guess(label=label, name=_name(label, model), probability=probability)
                    for probability, label in zip(probabilities, labels, strict=True)
                ),
            )


def _read_view(path: Path, model: LoadedModel) -> Tensor | Unread:
    try:
        data = path.read_bytes()
        if data.startswith(_CONVERTED) or is_animated_webp(data):
            data, _, _ = make_jpeg(data)
        image_CHW = decode_rgb(data, key=str(path))
    except BadImage as error:
        return Unread(image=str(path), reason=error.reason)
    except Unreadable as error:
        return Unread(image=str(path), reason=str(error))
    except OSError as error:
        return Unread(image=str(path), reason=error.strerror or str(error))
    return model.preprocessing.view(image_CHW)


def _name(label: int, model: LoadedModel) -> str:
    classes = model.likely_classes
    return classes[label] if label < len(classes) else str(label)
