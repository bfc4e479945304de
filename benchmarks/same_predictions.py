"""Compare the predictions of one model here, in timm and in onnxruntime, on a validation split.

python benchmarks/same_predictions.py DATA CHECKPOINT TIMM_FILE ONNX_FILE
"""

import sys

import numpy as np
import onnxruntime
import timm
import torch

from convnext_cli.data.card import read_card
from convnext_cli.data.fetch import Store
from convnext_cli.data.mix import normalise
from convnext_cli.data.reader import ImageReader
from convnext_cli.training.loading import load_model


def main(data: str, checkpoint: str, timm_file: str, onnx_file: str) -> None:
    ours = load_model(checkpoint)
    theirs = timm.create_model(ours.name, num_classes=ours.num_classes, checkpoint_path=timm_file)
    session = onnxruntime.InferenceSession(onnx_file)
    view = ours.preprocessing.view
    store, card = Store(location=data), read_card(data)
    reader = ImageReader(card, store=store, split="val", view=view, seed=0, on_bad="raise")
    labels, predictions = [], {"here": [], "timm": [], "onnxruntime": []}
    for start in range(0, len(reader), 100):
        samples = [reader[(0, number)] for number in range(start, min(start + 100, len(reader)))]
        images = torch.stack([sample.image_CHW for sample in samples])
        x = normalise(images, mean=ours.preprocessing.mean, std=ours.preprocessing.std)
        with torch.no_grad():
            predictions["here"].append(ours.network(x).argmax(1).numpy())
            predictions["timm"].append(theirs.eval()(x).argmax(1).numpy())
        predictions["onnxruntime"].append(session.run(None, {"images": x.numpy()})[0].argmax(1))
        labels += [sample.label for sample in samples]
    for name, parts in predictions.items():
        same = (np.concatenate(parts) == np.concatenate(predictions["here"])).sum()
        top1 = 100 * (np.concatenate(parts) == np.array(labels)).mean()
        print(f"{name:<12} top-1 {top1:.2f}%, {same} of {len(labels)} predictions as here")
        if same != len(labels):
            sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
