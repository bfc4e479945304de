"""The views and the mixing against timm's, given the same random draws."""

# ruff: noqa: NPY002  # the global state is what these tests are about

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data import auto_augment as timm_policy
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from convnext_cli.data.augment import EvalView, TrainView, draw_crop, draw_erased
from convnext_cli.data.mix import NOT_MIXED, Box, MixDraw, cutmix_box, make_target, mix_images
from convnext_cli.data.order import image_seed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo(height: int = 150, width: int = 200, seed: int = 0) -> Image.Image:
    """Blurred noise: detail at several scales, as in a photo."""
    rng = np.random.default_rng(seed)
    result = np.zeros((height, width, 3))
    for cells in (4, 12, 40):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        grown = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        result += np.asarray(grown) / 3
    return Image.fromarray(result.astype(np.uint8))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def mean_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().mean())


@pytest.fixture
def _posterize_keeps_a_bit(monkeypatch):
    """timm asks Pillow for 0 bits, which Pillow 13 refuses; ours keeps 1 there."""
    name = "PosterizeIncreasing"
    original = timm_policy.LEVEL_TO_ARG[name]

    def at_least_one(level, settings):
        return (max(1, original(level, settings)[0]),)

    monkeypatch.setitem(timm_policy.LEVEL_TO_ARG, name, at_least_one)


@pytest.fixture
def _ops_chosen_as_ours(monkeypatch):
    """timm chooses the operations by numpy's random state, ours by Python's."""

    def choose(ops, layers, *, replace, p):
        assert replace
        assert p is None
        return random.choices(ops, k=layers)

    monkeypatch.setattr(np.random, "choice", choose)


def seed_as_view(seed: int) -> None:
    """Put the global state where our view puts it, for timm to draw from."""
    random.seed(seed)
    random.random()  # the view draws its flip first,
    random.random()  # then whether it erases


@pytest.mark.parametrize("size", [(150, 200), (300, 90), (64, 64), (10, 12)])
def test_crop_boxes_equal_timms(size):
    image = photo(*size)
    for seed in range(50):
        random.seed(seed)
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(
            image, (0.08, 1.0), (3 / 4, 4 / 3)
        )
        random.seed(seed)
        box = draw_crop(image.height, image.width, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))

        assert (box.top, box.left, box.height, box.width) == (top, left, height, width)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_and_resize_give_timms_pixels(interpolation):
    theirs_of = create_transform(
        96,
        is_training=True,
        hflip=0.0,
        color_jitter=None,
        interpolation=interpolation,
        use_prefetcher=True,
    )
    view = TrainView(image_px=96, interpolation=interpolation, hflip=0.0, rand_augment=None)

    for sample in range(20):
        image = photo(seed=sample)
        ours = view(to_tensor(image), seed=image_seed(0, epoch=0, sample=sample))
        seed_as_view(image_seed(0, epoch=0, sample=sample))
        theirs = torch.as_tensor(np.asarray(theirs_of(image)))

        assert mean_difference(ours, theirs) < 0.2
        assert int((ours.int() - theirs.int()).abs().max()) <= 2


@pytest.mark.usefixtures("_posterize_keeps_a_bit", "_ops_chosen_as_ours")
def test_the_published_train_view_gives_timms_pixels():
    theirs_of = create_transform(
        96,
        is_training=True,
        hflip=0.0,  # timm draws flips from torch
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        mean=MEAN,
        use_prefetcher=True,
    )
    view = TrainView(image_px=96, hflip=0.0, color_jitter=0.4, mean=MEAN)

    differences = []
    for sample in range(80):
        image = photo(seed=sample % 7)
        ours = view(to_tensor(image), seed=image_seed(0, epoch=1, sample=sample))
        seed_as_view(image_seed(0, epoch=1, sample=sample))
        theirs = torch.as_tensor(np.asarray(theirs_of(image)))
        differences.append(mean_difference(ours, theirs))

    # Solarize, posterize and equalize turn one grey level of the resize into many.
    assert np.median(differences) < 0.1
    assert np.quantile(differences, 0.9) < 1.0
    assert max(differences) < 5.0


@pytest.mark.parametrize(
    ("image_px", "crop", "crop_frac", "timm_options"),
    [
        (96, "center", 0.875, {"crop_pct": 0.875}),
        (96, "center", 0.95, {"crop_pct": 0.95}),
        (96, "warp", 0.875, {"crop_pct": 1.0, "crop_mode": "squash"}),
    ],
)
@pytest.mark.parametrize("size", [(150, 200), (333, 120), (40, 50)])
def test_the_eval_view_gives_timms_pixels(image_px, crop, crop_frac, timm_options, size):
    image = photo(*size)
    theirs_of = create_transform(
        image_px, is_training=False, interpolation="bicubic", use_prefetcher=True, **timm_options
    )

    ours = EvalView(image_px=image_px, crop=crop, crop_frac=crop_frac)(to_tensor(image))

    theirs = torch.as_tensor(np.asarray(theirs_of(image)))
    # Both filters round to whole grey levels between the two passes, torch in another order.
    assert mean_difference(ours, theirs) < 0.2
    assert int((ours.int() - theirs.int()).abs().max()) <= 2


@pytest.mark.parametrize("seed", range(8))
def test_mixing_and_targets_equal_timms(seed):
    timm_mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 20, 28, generator=generator)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])

    np.random.seed(seed)
    lam, use_cutmix = timm_mix._params_per_batch()
    box = None
    if use_cutmix:
        (top, bottom, left, right), lam = cutmix_bbox_and_lam(x.shape, lam)
        box = Box(top=int(top), bottom=int(bottom), left=int(left), right=int(right))
    draw = MixDraw(kind="cutmix" if use_cutmix else "mixup", lam=float(lam), box=box)
    np.random.seed(seed)
    their_x, their_target = timm_mix(x.clone(), labels)

    # timm mixes image i with image 5 - i, this project neighbours: so they are laid side by side.
    paired = torch.tensor([0, 5, 1, 4, 2, 3])
    ours_x = mix_images(x[paired], [draw] * 6)
    ours = make_target(labels[paired], num_classes=5, smoothing=0.1, draws=[draw] * 6)
    torch.testing.assert_close(ours_x, their_x[paired])
    torch.testing.assert_close(ours, their_target[paired])


def test_cutmix_boxes_and_lambdas_equal_timms():
    for seed in range(100):
        lam = float(np.random.default_rng(seed).beta(1, 1))
        np.random.seed(seed)
        (top, bottom, left, right), their_lam = cutmix_bbox_and_lam((2, 3, 30, 50), lam)
        np.random.seed(seed)
        center = (int(np.random.randint(0, 30)), int(np.random.randint(0, 50)))

        box = cutmix_box(lam, height=30, width=50, center=center)

        assert (box.top, box.bottom, box.left, box.right) == (top, bottom, left, right)
        assert 1 - box.area_px / (30 * 50) == pytest.approx(float(their_lam))


def test_targets_without_mixing_equal_timms():
    labels = torch.tensor([1, 0, 2])

    theirs = mixup_target(labels, 3, lam=1.0, smoothing=0.2)

    ours = make_target(labels, num_classes=3, smoothing=0.2, draws=[NOT_MIXED] * 3)
    torch.testing.assert_close(ours, theirs)


def test_erased_boxes_are_distributed_as_timms():
    count, px = 3000, 48
    random.seed(0)
    torch.manual_seed(0)
    theirs = RandomErasing(0.25, mode="pixel", max_count=1, device="cpu")(
        torch.full((count, 3, px, px), 9.0)
    )
    their_areas = (theirs[:, 0] != 9).sum((1, 2)).numpy()
    random.seed(0)
    top, bottom, left, right = np.array([draw_erased(px, prob=0.25)[:4] for _ in range(count)]).T
    our_areas = ((bottom - top) * (right - left))[bottom > 0]

    their_share = (their_areas > 0).mean()
    assert len(our_areas) / count == pytest.approx(their_share, abs=0.03)
    quantiles = np.linspace(0.05, 0.95, 7)
    np.testing.assert_allclose(
        np.quantile(our_areas, quantiles),
        np.quantile(their_areas[their_areas > 0], quantiles),
        atol=0.03 * px * px,
    )
