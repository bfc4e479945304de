"""Per-class counts, confused pairs and calibration, against torchmetrics."""

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

from convnext_cli.training.diagnosis import MAX_DENSE_CLASSES, ConfusedPair, Diagnosis, Diagnostics

CLASSES = 7


def draw(images: int, *, classes: int = CLASSES, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,)."""
    generator = torch.Generator().manual_seed(3)
    logits_NK = scale * torch.randn((images, classes), generator=generator)
    return logits_NK, torch.randint(classes, (images,), generator=generator)


def diagnose(logits_NK: Tensor, label_N: Tensor, *, batch: int, classes: int) -> Diagnosis:
    metric = Diagnostics(classes)
    for start in range(0, len(label_N), batch):
        metric.update(logits_NK[start : start + batch], label_N[start : start + batch])
    return metric.compute_diagnosis()


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 40.0])
def test_calibration_error_is_that_of_torchmetrics(scale: float):
    logits_NK, label_N = draw(2000, scale=scale)
    theirs = MulticlassCalibrationError(CLASSES, n_bins=15, norm="l1")
    expected = theirs(logits_NK.softmax(1), label_N)

    ours = diagnose(logits_NK, label_N, batch=64, classes=CLASSES)

    assert ours.ece == pytest.approx(float(expected), abs=2e-6)


def test_certain_and_wrong_is_an_error_of_one():
    logits_NK = torch.tensor([[200.0, 0.0], [200.0, 0.0]])

    assert diagnose(logits_NK, torch.tensor([1, 1]), batch=2, classes=2).ece == 1.0


def test_class_accuracies_are_those_of_torchmetrics():
    logits_NK, label_N = draw(500)
    expected = MulticlassAccuracy(CLASSES, average="none")(logits_NK, label_N)

    ours = diagnose(logits_NK, label_N, batch=33, classes=CLASSES)

    assert [row.top1 for row in ours.classes] == pytest.approx((100 * expected).tolist())


def test_a_class_without_images_has_no_accuracy():
    ours = diagnose(torch.eye(3), torch.tensor([0, 1, 1]), batch=3, classes=3)

    assert [row.top1 for row in ours.classes] == [100.0, 50.0, None]


def test_confused_pairs_are_the_matrix_of_torchmetrics_without_its_diagonal():
    logits_NK, label_N = draw(500)
    matrix = MulticlassConfusionMatrix(CLASSES)(logits_NK, label_N)

    ours = diagnose(logits_NK, label_N, batch=100, classes=CLASSES).confused

    wrong = {
        (i, j): int(matrix[i, j])
        for i in range(CLASSES)
        for j in range(CLASSES)
        if i != j and matrix[i, j]
    }
    assert {(pair.label, pair.predicted): pair.images for pair in ours} == wrong
    assert [pair.images for pair in ours] == sorted(wrong.values(), reverse=True)


def test_many_classes_are_counted_like_few():
    classes = MAX_DENSE_CLASSES + 1
    logits_NK = torch.zeros((6, classes))
    guesses = [5, 5, 9, classes - 1, 0, 2]
    logits_NK[torch.arange(6), torch.tensor(guesses)] = 9.0
    label_N = torch.tensor([7, 7, 9, 3, 0, -1])

    ours = diagnose(logits_NK, label_N, batch=4, classes=classes)

    assert ours.confused == (
        ConfusedPair(label=7, predicted=5, images=2),
        ConfusedPair(label=3, predicted=classes - 1, images=1),
    )
    assert sum(row.images for row in ours.classes) == 5
    assert ours.classes[9].correct == 1


@pytest.mark.parametrize("classes", [CLASSES, MAX_DENSE_CLASSES + 5])
def test_padding_and_the_size_of_batches_change_nothing(classes: int):
    logits_NK, label_N = draw(90, classes=classes)
    padded_NK = torch.cat([logits_NK, torch.randn((10, classes))])
    padded_N = torch.cat([label_N, torch.full((10,), -1)])

    whole = diagnose(logits_NK, label_N, batch=90, classes=classes)
    parts = diagnose(padded_NK, padded_N, batch=8, classes=classes)

    assert parts.classes == whole.classes
    assert parts.confused == whole.confused
    assert parts.ece == pytest.approx(whole.ece, abs=1e-12)
