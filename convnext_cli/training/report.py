"""What an evaluation came to, as plain values: for JSON, tables and people. Imports no torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any

WORST_PAIRS = 20
"""Confused pairs that a report names."""


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """How one class of the data set fared."""

    label: int
    name: str
    images: int
    correct: int
    top1: float | None
    """Accuracy in percent; None where the class has no image."""


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """Images of one class that were taken for another."""

    name: str
    taken_for: str
    images: int
    share: float
    """Of the images of the first class, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A model on one split of a data set, over all devices. Accuracies are in percent."""

    model: str
    checkpoint: str
    weights: str
    """raw or ema."""
    parameters: int
    image_px: int
    crop: str
    crop_frac: float
    interpolation: str
    view_reason: str
    """Where the preprocessing comes from, in a few words."""
    data: str
    split: str
    precision: str
    images: int
    top1: float
    top5: float
    loss: float
    """Mean cross-entropy."""
    ece: float
    """Expected calibration error, 0 to 1, over 15 bins."""
    images_per_second: float
    worst_pairs: tuple[PairRow, ...]
    """The most frequent confusions."""
    per_class: tuple[ClassRow, ...]
    """By label."""

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the fields."""
        return dataclasses.asdict(self)

    def to_timm_row(self) -> dict[str, str]:
        """The columns of timm's result tables, parameters in millions."""
        return {
            "model": self.model.removeprefix("timm:"),
            "top1": f"{self.top1:.3f}",
            "top1_err": f"{100 - self.top1:.3f}",
            "top5": f"{self.top5:.3f}",
            "top5_err": f"{100 - self.top5:.3f}",
            "param_count": f"{self.parameters / 1e6:.2f}",
            "img_size": str(self.image_px),
            "crop_pct": f"{self.crop_frac:g}",
            "interpolation": self.interpolation,
        }


TIMM_COLUMNS = (
    "model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct",
    "interpolation",
)  # fmt: skip
"""The columns of timm's result tables, in their order."""


@dataclass(frozen=True, kw_only=True)
class Guess:
    """One class that a model proposes for an image."""

    label: int
    name: str
    """As the checkpoint or ImageNet calls it; the label where neither does."""
    probability: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model sees in one image, the most probable class first."""

    image: str
    guesses: tuple[Guess, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values: the image, and its predictions with label, name and probability."""
        guesses = [dataclasses.asdict(guess) for guess in self.guesses]
        return {"image": self.image, "predictions": guesses}


@dataclass(frozen=True, kw_only=True)
class Unread:
    """A file that is no image that can be used."""

    image: str
    reason: str
