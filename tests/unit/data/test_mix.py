# ruff: noqa: NPY002  # the global state is what these tests are about

import numpy as np
import pytest
import torch

from convnext_cli.data.mix import (
    NOT_MIXED,
    BatchMix,
    Box,
    MixDraw,
    cutmix_box,
    denormalise,
    draw_erasing,
    draw_mix,
    erase,
    make_target,
    mix_images,
    normalise,
)
from convnext_cli.data.order import batch_rng

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def some_images(count: int = 6, px: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, px, px), dtype=torch.uint8, generator=generator)


def draws(count: int, **changes) -> list[MixDraw]:
    settings = {"mixup": 0.8, "cutmix": 1.0, "prob": 1.0, "switch_prob": 0.5} | changes
    rng = np.random.default_rng(0)
    return [draw_mix(height=32, width=32, rng=rng, **settings) for _ in range(count)]


def test_normalising_gives_the_textbook_formula_and_can_be_undone():
    images = some_images()

    x = normalise(images, mean=MEAN, std=STD)

    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    torch.testing.assert_close(x, (images / 255 - mean) / std, atol=2e-6, rtol=0)
    assert torch.equal(denormalise(x, mean=MEAN, std=STD), images)


def test_normalising_keeps_channels_last():
    images = some_images().to(memory_format=torch.channels_last)

    x = normalise(images, mean=MEAN, std=STD, dtype=torch.bfloat16)

    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == torch.bfloat16


def test_a_quarter_of_the_images_is_erased_in_boxes_of_the_published_sizes():
    boxes = draw_erasing(4000, height=224, width=224, prob=0.25, rng=np.random.default_rng(0))

    assert 900 < len(boxes) < 1100
    areas = np.array([box.area_px for box in boxes.values()]) / 224**2
    assert 0.019 < areas.min() < 0.03
    assert 0.30 < areas.max() < 0.335
    aspects = [(b.bottom - b.top) / (b.right - b.left) for b in boxes.values()]
    assert 0.29 < min(aspects) < 0.35
    assert 2.9 < max(aspects) < 3.45
    assert all(
        0 <= b.top < b.bottom <= 224 and 0 <= b.left < b.right <= 224 for b in boxes.values()
    )


def test_erasing_changes_only_the_pixels_in_the_boxes():
    x = torch.full((3, 3, 10, 12), 5.0)
    box = Box(top=2, bottom=7, left=1, right=11)

    erased = erase(x.clone(), boxes={1: box}, noise_seed=0)

    changed = erased != 5.0
    assert changed[1, :, 2:7, 1:11].all()
    assert int(changed.sum()) == 3 * box.area_px


def test_erased_pixels_are_standard_normal_noise_that_follows_from_the_seed():
    boxes = {i: Box(top=0, bottom=64, left=0, right=64) for i in range(4)}

    noise = erase(torch.zeros(4, 3, 64, 64), boxes=boxes, noise_seed=7)
    again = erase(torch.zeros(4, 3, 64, 64), boxes=boxes, noise_seed=7)

    assert torch.equal(noise, again)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert not torch.equal(noise[0], noise[1])


def test_half_of_the_batches_are_mixed_by_cutmix_and_half_by_mixup():
    kinds = [draw.kind for draw in draws(1000)]

    assert set(kinds) == {"mixup", "cutmix"}
    assert 430 < kinds.count("cutmix") < 570


def test_lambda_follows_the_beta_distribution_of_its_alpha():
    lams = np.array([draw.lam for draw in draws(4000, cutmix=None)])

    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
    assert abs(lams.mean() - 0.5) < 0.02
    assert abs(lams.var() - 1 / (4 * 2.6)) < 0.005


def test_a_share_of_the_batches_stays_unmixed_where_asked():
    kinds = [draw.kind for draw in draws(1000, prob=0.3)]

    assert 630 < kinds.count("none") < 770


@pytest.mark.parametrize(
    ("changes", "kind"), [({"mixup": None}, "cutmix"), ({"cutmix": None}, "mixup")]
)
def test_one_of_both_alone_is_used_every_time(changes, kind):
    assert {draw.kind for draw in draws(50, **changes)} == {kind}


def test_both_off_mixes_nothing():
    assert draws(3, mixup=None, cutmix=None) == [NOT_MIXED] * 3


def test_the_lambda_of_cutmix_is_the_share_of_pixels_that_stay():
    for draw in draws(200, mixup=None):
        assert draw.box is not None
        assert draw.lam == pytest.approx(1 - draw.box.area_px / (32 * 32))


def test_a_cutmix_box_is_cut_at_the_border():
    assert cutmix_box(0.75, height=20, width=40, center=(0, 39)) == Box(
        top=0, bottom=5, left=29, right=40
    )


def test_mixup_blends_each_image_with_its_mirror_partner():
    x = some_images().float()

    mixed = mix_images(x, MixDraw(kind="mixup", lam=0.3))

    torch.testing.assert_close(mixed[0], 0.3 * x[0] + 0.7 * x[5])
    torch.testing.assert_close(mixed[4], 0.3 * x[4] + 0.7 * x[1])


def test_cutmix_takes_the_patch_of_the_partner_and_nothing_else():
    x = some_images().float()
    box = Box(top=2, bottom=5, left=3, right=9)

    mixed = mix_images(x, MixDraw(kind="cutmix", lam=0.9, box=box))

    assert torch.equal(mixed[1, :, 2:5, 3:9], x[4, :, 2:5, 3:9])
    mixed[1, :, 2:5, 3:9] = x[1, :, 2:5, 3:9]
    assert torch.equal(mixed[1], x[1])


def test_targets_are_smoothed_and_mixed_and_sum_to_one():
    target = make_target(torch.tensor([0, 3]), num_classes=4, smoothing=0.1, lam=0.7)

    on, off = 0.9 + 0.1 / 4, 0.1 / 4
    expected = 0.7 * torch.tensor([on, off, off, off]) + 0.3 * torch.tensor([off, off, off, on])
    torch.testing.assert_close(target[0], expected)
    torch.testing.assert_close(target.sum(1), torch.ones(2))


def test_without_smoothing_and_mixing_targets_are_one_hot():
    target = make_target(torch.tensor([2, 0]), num_classes=3, smoothing=0.0, lam=1.0)

    assert target.tolist() == [[0, 0, 1], [1, 0, 0]]


def paper_mix() -> BatchMix:
    return BatchMix(
        num_classes=10,
        mean=MEAN,
        std=STD,
        erasing=0.25,
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
    )


def test_a_batch_depends_on_its_address_alone_and_touches_no_global_state():
    images, labels = some_images(), torch.arange(6)
    torch.manual_seed(1)
    np.random.seed(1)
    expected_global = (torch.rand(1).item(), np.random.rand())
    torch.manual_seed(1)
    np.random.seed(1)

    x, target = paper_mix()(images, labels, batch_rng(0, step=3, micro=1, rank=2))
    again = paper_mix()(images, labels, batch_rng(0, step=3, micro=1, rank=2))
    other, _ = paper_mix()(images, labels, batch_rng(0, step=4, micro=1, rank=2))

    assert (torch.rand(1).item(), np.random.rand()) == expected_global
    assert torch.equal(x, again[0])
    assert torch.equal(target, again[1])
    assert not torch.equal(x, other)
    assert torch.equal(images, some_images())


def test_with_everything_off_a_batch_is_only_normalised():
    plain = BatchMix(num_classes=10, mean=MEAN, std=STD)

    x, target = plain(some_images(), torch.arange(6), batch_rng(0, step=0))

    assert torch.equal(x, normalise(some_images(), mean=MEAN, std=STD))
    assert torch.equal(target, torch.eye(10)[:6])


def test_an_odd_batch_mixes_its_middle_image_with_itself():
    x = some_images(5).float()

    mixed = mix_images(x, MixDraw(kind="mixup", lam=0.5))

    torch.testing.assert_close(mixed[2], x[2])
