"""What lies behind an accuracy: each class's share, the pairs that are confused, the calibration.

Shapes: N images, K classes, B calibration bins. Padding carries the label -1 and is not counted.

Calibration error: images are sorted into bins by the probability of the predicted class; ECE is
the mean over images of |accuracy - mean probability| of their bin. A probability of exactly 1 has
a bin of its own, as in torchmetrics.

Source: Naeini et al. 2015, Guo et al. 2017 (ECE); bins as torchmetrics
`MulticlassCalibrationError(n_bins=15, norm="l1")`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

NUM_BINS = 15
"""Calibration bins of equal width."""

MAX_DENSE_CLASSES = 2048
"""Up to here the confusion matrix is held whole (32 MiB); beyond, the wrong guesses are listed."""


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """How one class fared."""

    label: int
    images: int
    correct: int

    @property
    def top1(self) -> float | None:
        """Accuracy in percent; None where the class has no image."""
        return 100 * self.correct / self.images if self.images else None


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """Images of one class that were taken for another."""

    label: int
    predicted: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Over all ranks and images."""

    ece: float
    """Expected calibration error, 0 to 1."""
    classes: tuple[ClassCount, ...]
    """By label."""
    confused: tuple[ConfusedPair, ...]
    """Every wrong pair that occurred, most images first, then by label."""


class Diagnostics(Metric):
    """Counts per class, per confused pair and per calibration bin; summed over ranks.

    Every state is a sum of integers, but for the probabilities, which are summed in float64: the
    result does not depend on how images are spread over batches and ranks.
    """

    full_state_update = False
    class_images: Tensor
    class_hits: Tensor
    confusion: Tensor
    wrong_pairs: list[Tensor]
    bin_images: Tensor
    bin_hits: Tensor
    bin_probability: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dense = num_classes <= MAX_DENSE_CLASSES
        counts = {
            "class_images": num_classes,
            "class_hits": num_classes,
            "bin_images": NUM_BINS + 1,
            "bin_hits": NUM_BINS + 1,
        }
        for name, size in counts.items():
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state(
            "bin_probability",
            torch.zeros(NUM_BINS + 1, dtype=torch.float64),
            dist_reduce_fx="sum",
        )
        if self.dense:
            table = torch.zeros(num_classes**2, dtype=torch.int64)
            self.add_state("confusion", table, dist_reduce_fx="sum")
        else:
            self.add_state("wrong_pairs", [], dist_reduce_fx="cat")

    def update(self, logits_NK: Tensor, label_N: Tensor) -> None:
        """Count a batch; no value leaves the device."""
        counted_N = (label_N >= 0).long()
        safe_N = label_N.clamp_min(0)
        guess_N = logits_NK.argmax(dim=1)  # not of the probabilities, of which more are equal
        probability_N = logits_NK.float().softmax(dim=1).amax(dim=1)
        hit_N = (guess_N == safe_N).long() * counted_N
        self.class_images.scatter_add_(0, safe_N, counted_N)
        self.class_hits.scatter_add_(0, safe_N, hit_N)
        edges_B = torch.linspace(0, 1, NUM_BINS + 1, device=probability_N.device)
        # non-finite logits have no bin; `Scores` refuses them
        bin_N = (torch.bucketize(probability_N, edges_B, right=True) - 1).clamp(0, NUM_BINS)
        self.bin_images.scatter_add_(0, bin_N, counted_N)
        self.bin_hits.scatter_add_(0, bin_N, hit_N)
        self.bin_probability.scatter_add_(0, bin_N, probability_N.double() * counted_N)
        pair_N = safe_N * self.num_classes + guess_N
        if self.dense:
            self.confusion.scatter_add_(0, pair_N, counted_N)
        else:
            wrong_N = (counted_N == 1) & (hit_N == 0)
            self.wrong_pairs.append(torch.where(wrong_N, pair_N, -1))

    def compute(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ECE, images per class, hits per class, (pair, images) rows of wrong guesses)."""
        images_B = self.bin_images.double()
        share_B = (self.bin_hits - self.bin_probability).abs() / images_B.sum().clamp_min(1)
        return share_B.sum(), self.class_images, self.class_hits, self._count_wrong()

    def _count_wrong(self) -> Tensor:
        """Rows (pair, images) of every wrong pair that occurred, shape (pairs, 2)."""
        if self.dense:
            wrong = self.confusion.view(self.num_classes, self.num_classes).clone()
            wrong.fill_diagonal_(0)
            pairs = wrong.view(-1).nonzero().view(-1)
            return torch.stack([pairs, wrong.view(-1)[pairs]], dim=1)
        # one tensor after a synchronisation, else a list of them
        listed: Tensor | list[Tensor] = self.wrong_pairs
        if isinstance(listed, list):
            listed = torch.cat([self.class_images[:0], *listed])
        pairs, images = torch.unique(listed[listed >= 0], return_counts=True)
        return torch.stack([pairs, images], dim=1)

    def compute_diagnosis(self) -> Diagnosis:
        """Everything counted since the last reset; the same on every rank."""
        ece, images_K, hits_K, wrong = self.compute()
        rows = sorted(wrong.reshape(-1, 2).tolist(), key=lambda row: (-row[1], row[0]))
        return Diagnosis(
            ece=float(ece),
            classes=tuple(
                ClassCount(label=label, images=images, correct=correct)
                for label, (images, correct) in enumerate(
                    zip(images_K.tolist(), hits_K.tolist(), strict=True)
                )
            ),
            confused=tuple(
                ConfusedPair(
                    label=pair // self.num_classes,
                    predicted=pair % self.num_classes,
                    images=images,
                )
                for pair, images in rows
            ),
        )
