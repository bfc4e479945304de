"""Known data sets: sizes, normalisation, class lists, and the classes of 22K that 1K has.

A class is named by its WordNet id (wnid); labels count through the sorted wnids, which is the order
of an image folder. The lists are those that timm carries, read without importing it.

Sources: ILSVRC 2012; ImageNet fall 2011 release; 21K-P: Ridnik et al. 2021 and
Alibaba-MIIL/ImageNet21K@442cce2 dataset_preprocessing/processing_instructions.md; Krizhevsky 2009;
timm 1.0.31 data/_info. Winter 2021 whole (19,167 classes) is not listed: the number of
its images has no source here, and packing counts them.
"""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet-1K, per channel, for pixels in 0..1."""

IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet-1K, per channel."""


@dataclass(frozen=True)
class Dataset:
    """Published sizes of a data set."""

    name: str
    num_classes: int
    train_images: int
    val_images: int


DATASETS: Mapping[str, Dataset] = {
    known.name: known
    for known in (
        Dataset("imagenet1k", 1000, 1_281_167, 50_000),
        Dataset("imagenet22k", 21_841, 14_197_122, 0),  # fall 2011
        Dataset("imagenet21k_p", 11_221, 11_797_632, 561_052),  # fall 2011
        Dataset("imagenet21k_p_w21", 10_450, 11_060_223, 522_500),  # winter 2021
        Dataset("cifar10", 10, 50_000, 10_000),
        Dataset("cifar100", 100, 50_000, 10_000),
        Dataset("quickstart", 10, 1437, 360),  # handwritten digits of UCI
    )
}
"""All known data sets by name."""


def imagenet1k_wnids() -> tuple[str, ...]:
    """The 1,000 wnids of ImageNet-1K in label order."""
    return _read_wnids("imagenet_synsets.txt")


def imagenet22k_wnids() -> tuple[str, ...]:
    """The 21,841 wnids of ImageNet-22K (fall 2011), sorted: the order of the published heads."""
    return tuple(sorted(_read_wnids("imagenet22k_synsets.txt")))


@functools.cache
def imagenet_class_names() -> Mapping[str, str]:
    """The words of every ImageNet class, by wnid."""
    lines = _info_file("imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("\t", 1) for line in lines if "\t" in line)
    return {wnid: words.strip() for wnid, words in pairs}


def map_classes(source: Sequence[str], target: Sequence[str]) -> tuple[int | None, ...]:
    """For each target class its label among the source's; None where the source lacks it.

    ImageNet-22K (fall 2011) lacks one class of ImageNet-1K, the teddy bear (n04399382). The list of
    22K indices that circulates with other projects follows another order of the classes, and is
    wrong for 282 of them.
    """
    labels = {name: label for label, name in enumerate(source)}
    return tuple(labels.get(name) for name in target)


@functools.cache
def _read_wnids(name: str) -> tuple[str, ...]:
    return tuple(_info_file(name).read_text(encoding="ascii").split())


def _info_file(name: str) -> Path:
    spec = importlib.util.find_spec("timm")  # finds the package without running it
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("timm is not installed; it carries the lists of classes")
    return Path(spec.origin).parent / "data" / "_info" / name
