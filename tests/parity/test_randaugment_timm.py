"""RandAugment on the device, and on the CPU, against timm's Pillow operations."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from convnext_cli.data.order import image_seed, seeded_random
from convnext_cli.data.randaugment import (
    OPS,
    apply_ops,
    apply_ops_pillow,
    build_policy,
    choose_ops,
    draw_ops,
    fill_colour,
)

MEAN, PX = (0.485, 0.456, 0.406), 96
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
WITHOUT_ARGUMENT = {"AutoContrast", "Equalize", "Invert"}
POLICIES = (
    "rand-m9-mstd0.5-inc1",
    "rand-m10-n3-mstd101-inc1",
    "rand-m5-mmax20-p1.0",
    "rand-m9-tweights-inc1",
)

INCREASING = {op.name for op in auto_augment.rand_augment_transform("rand-m9-inc1", {}).ops}
NAMES = INCREASING | {op.name for op in auto_augment.rand_augment_transform("rand-m9", {}).ops}


def photo(seed: int) -> np.ndarray:
    """Blurred noise: detail at several scales, as in a photo."""
    rng = np.random.default_rng(seed)
    result = np.zeros((PX, PX, 3))
    for cells in (4, 12, 40):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        grown = Image.fromarray(noise).resize((PX, PX), Image.Resampling.BICUBIC)
        result += np.asarray(grown) / 3
    return result.astype(np.uint8)


PHOTOS = [photo(seed) for seed in range(3)]
PHOTOS += [(photo(9) // 3 + 40).astype(np.uint8), np.full((PX, PX, 3), 77, dtype=np.uint8)]
BATCH = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in PHOTOS])


def arguments_of(name: str) -> tuple[float, ...]:
    """Arguments from one end of an operation's range to the other."""
    ranges = {
        "Rotate": (-30, -7.3, 0, 12, 29.9),
        "Shear": (-0.3, -0.11, 0, 0.21, 0.3),
        "Posterize": (1, 2, 3, 4, 8),
        "SolarizeAdd": (0, 20, 110, 128),
        "Solarize": (0, 26, 128, 255, 256),
    }
    if name in WITHOUT_ARGUMENT:
        return (0,)
    if name.startswith("Translate"):
        scale = 1 if name.endswith("Rel") else PX
        return tuple(scale * share for share in (-0.45, -0.2, 0, 0.13, 0.45))
    found = next((levels for start, levels in ranges.items() if name.startswith(start)), None)
    return found or (0.1, 0.55, 1.0, 1.3, 1.9)


def timms(name: str, argument: float, image: np.ndarray, interpolation: str) -> np.ndarray:
    whole = name.startswith(("Posterize", "Solarize"))
    arguments = () if name in WITHOUT_ARGUMENT else (int(argument) if whole else argument,)
    settings = {"fillcolor": fill_colour(MEAN), "resample": FILTERS[interpolation]}
    changed = auto_augment.NAME_TO_OP[name](Image.fromarray(image), *arguments, **settings)
    return np.asarray(changed).astype(int)


def largest_and_mean(ours: torch.Tensor, theirs: np.ndarray) -> tuple[int, float]:
    difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs)
    return int(difference.max()), float(difference.mean())


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("name", OPS)
def test_an_operation_on_the_device_gives_timms_pixels(name, interpolation):
    moves = name.startswith(("Rotate", "Shear", "Translate", "AutoContrast"))
    means = []
    for argument in map(float, np.float32(arguments_of(name))):
        row = np.array([[OPS.index(name), argument]], dtype=np.float32)
        ops = np.tile(row, (len(PHOTOS), 1, 1))
        result = apply_ops(BATCH, ops, mean=MEAN, interpolation=interpolation)
        for ours, image in zip(result, PHOTOS, strict=True):
            theirs = timms(name, argument, image, interpolation)
            largest, mean = largest_and_mean(ours, theirs)
            assert largest <= (1 if moves else 0)
            means.append(mean)

    assert np.mean(means) <= (0.05 if moves else 0)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("name", [name for name in OPS if name in NAMES])
def test_an_operation_on_the_cpu_gives_timms_pixels(name, interpolation):
    text = "rand-m9-inc1" if name in INCREASING else "rand-m9"
    policy = build_policy(text, image_px=PX, mean=MEAN, interpolation=interpolation)
    moves = name.startswith(("Shear", "Translate"))
    for argument in map(float, np.float32(arguments_of(name))):
        ops = np.array([[OPS.index(name), argument]], dtype=np.float32)
        for image, pixels in zip(PHOTOS, BATCH, strict=True):
            ours = apply_ops_pillow(pixels, ops, policy=policy)
            largest, mean = largest_and_mean(ours, timms(name, argument, image, interpolation))
            assert largest <= (1 if moves else 0)
            assert mean < (0.3 if moves else 1e-9)


@pytest.mark.parametrize("policy", POLICIES)
def test_both_paths_of_a_drawn_policy_give_timms_pixels(policy):
    ours = build_policy(policy, image_px=PX, mean=MEAN, interpolation="bicubic")

    here, there = [], []
    for sample in range(60):
        image = PHOTOS[sample % 3]
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        with seeded_random(image_seed(0, epoch=0, sample=sample)):
            ops = draw_ops(ours)
        with seeded_random(image_seed(0, epoch=0, sample=sample)):
            drawn = Image.fromarray(image)
            for op in choose_ops(ours.ops, ours):
                drawn = op(drawn)
        theirs = np.asarray(drawn).astype(int)
        here.append(largest_and_mean(apply_ops_pillow(pixels, ops, policy=ours), theirs)[1])
        device = apply_ops(pixels[None], ops[None], mean=MEAN, interpolation="bicubic")[0]
        there.append(largest_and_mean(device, theirs)[1])

    # Equalize and its like turn one grey level of the operation before into several.
    assert np.quantile(here, 0.9) < 0.02
    assert np.quantile(there, 0.9) < 0.02
    assert np.mean(here) < 0.05
    assert np.mean(there) < 0.05


@pytest.mark.parametrize("policy", ["rand-m9-n2", "rand-m9-n2-tweights"])
def test_operations_are_chosen_as_often_as_timm_chooses_them(policy):
    ours = build_policy(policy, image_px=PX, mean=MEAN, interpolation="bicubic")
    names = [op.name for op in ours.ops]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002

    def shares(choose):
        counts = dict.fromkeys(names, 0)
        pairs = [choose() for _ in range(6000)]
        for pair in pairs:
            for op in pair:
                counts[op.name] += 1
        twice = sum(first.name == second.name for first, second in pairs)
        return [count / 12000 for count in counts.values()], twice / 6000

    weights = ours.choice_weights
    theirs, their_twice = shares(
        lambda: np.random.choice(ours.ops, 2, replace=weights is None, p=weights)  # noqa: NPY002
    )
    here, here_twice = shares(lambda: choose_ops(ours.ops, ours))

    np.testing.assert_allclose(here, theirs, atol=0.012)
    assert here_twice == pytest.approx(their_twice, abs=0.02)
