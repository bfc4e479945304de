"""Accuracy and loss over a whole data set, exact for any batch size and number of ranks.

Shapes: N images, K classes. Padding carries the label -1 and is not counted.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from convnext_cli.errors import Diverged


@dataclass(frozen=True)
class Summary:
    """Scores over all ranks: percent, mean loss, and the number of images counted."""

    top1: float
    top5: float
    loss: float
    images: int


class Scores(Metric):
    """Sums of hits, losses and images; summed over ranks when computed.

    Of equal logits, which are common in bf16, the first class counts as the larger one: the guess
    is `torch.argmax`'s. Non-finite logits are a failure, not a guess of class 0.
    """

    full_state_update = False
    top1_hits: Tensor
    top5_hits: Tensor
    loss_sum: Tensor
    images: Tensor
    non_finite: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        for name in ("top1_hits", "top5_hits", "images", "non_finite"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # float64: a sum over millions of images must not depend on their grouping visibly
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits_NK: Tensor, label_N: Tensor) -> None:
        """Count a batch; no value leaves the device."""
        counted_N = label_N >= 0
        safe_N = label_N.clamp_min(0)
        own_N1 = logits_NK.gather(1, safe_N[:, None])
        first_NK = torch.arange(self.num_classes, device=label_N.device) < safe_N[:, None]
        ahead_NK = (logits_NK > own_N1) | ((logits_NK == own_N1) & first_NK)
        rank_N = ahead_NK.sum(dim=1)
        loss_N = functional.cross_entropy(logits_NK.float(), safe_N, reduction="none")
        self.top1_hits += ((rank_N == 0) & counted_N).sum()
        self.top5_hits += ((rank_N < 5) & counted_N).sum()
        self.loss_sum += torch.where(counted_N, loss_N, 0.0).double().sum()
        self.images += counted_N.sum()
        finite_N = torch.isfinite(logits_NK).all(dim=1)
        self.non_finite += (~finite_N & counted_N).sum()

    def compute(self) -> Tensor:
        """(top-1 hits, top-5 hits, loss sum, images, non-finite images) over all ranks."""
        parts = (self.top1_hits, self.top5_hits, self.loss_sum, self.images, self.non_finite)
        return torch.stack([part.double() for part in parts])

    def compute_summary(self) -> Summary:
        """The scores of all images seen since the last reset; the same on every rank.

        Raises:
            Diverged: Some logits were not finite.
        """
        state: Tensor = self.compute()
        top1, top5, loss, images, non_finite = state.tolist()
        if non_finite:
            raise Diverged(
                f"the model gave non-finite outputs for {int(non_finite)} of {int(images)} images",
                hint="use an earlier checkpoint, or another precision (--precision fp32 or bf16);"
                " while training, a lower optim.lr or optim.clip_norm=1.0",
            )
        counted = max(images, 1.0)
        return Summary(
            top1=100 * top1 / counted,
            top5=100 * top5 / counted,
            loss=loss / counted,
            images=int(images),
        )
