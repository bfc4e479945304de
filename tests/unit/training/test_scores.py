import pytest
import torch
from torch.nn import functional

from convnext_cli.errors import UserError
from convnext_cli.training.diagnosis import Diagnostics
from convnext_cli.training.scores import Scores


def random_batch(images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator)
    return logits, torch.randint(classes, (images,), generator=generator)


def test_scores_equal_their_definitions_for_any_batch_size():
    logits, labels = random_batch(103, 12)
    wanted_top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
    wanted_top5 = 100 * (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    wanted_loss = functional.cross_entropy(logits.double(), labels).item()

    for size in (1, 10, 103):
        scores = Scores(12)
        for start in range(0, 103, size):
            scores.update(logits[start : start + size], labels[start : start + size])
        summary = scores.compute_summary()

        assert summary.images == 103
        assert summary.top1 == pytest.approx(wanted_top1, abs=1e-9)
        assert summary.top5 == pytest.approx(wanted_top5, abs=1e-9)
        assert summary.loss == pytest.approx(wanted_loss, abs=1e-5)


def test_padding_is_not_counted():
    logits, labels = random_batch(16, 4)
    padded = torch.cat([labels, torch.full((5,), -1)])
    scores, plain = Scores(4), Scores(4)

    scores.update(torch.cat([logits, torch.full((5, 4), 9.0)]), padded)
    plain.update(logits, labels)

    assert scores.compute_summary() == plain.compute_summary()


def test_of_equal_logits_the_first_class_counts_everywhere():
    logits, labels = random_batch(2000, 100)
    logits, labels = logits.bfloat16().float(), torch.where(labels < 50, logits.argmax(1), labels)
    order = logits.argsort(dim=1, descending=True, stable=True)
    scores, diagnostics = Scores(100), Diagnostics(100)

    scores.update(logits, labels)
    diagnostics.update(logits, labels)

    summary = scores.compute_summary()
    hits = order == labels[:, None]
    assert summary.top1 == pytest.approx(100 * hits[:, 0].double().mean().item(), abs=1e-9)
    assert summary.top5 == pytest.approx(100 * hits[:, :5].any(1).double().mean().item(), abs=1e-9)
    correct = sum(each.correct for each in diagnostics.compute_diagnosis().classes)
    assert summary.top1 == pytest.approx(100 * correct / summary.images, abs=1e-9)


def test_two_classes_have_a_top5_of_all():
    logits, labels = random_batch(8, 2)
    scores = Scores(2)

    scores.update(logits, labels)

    assert scores.compute_summary().top5 == 100


def test_nan_outputs_are_a_failure_and_not_class_0():
    scores = Scores(3)
    scores.update(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.int64))

    with pytest.raises(UserError, match="non-finite outputs for 4 of 4 images"):
        scores.compute_summary()
