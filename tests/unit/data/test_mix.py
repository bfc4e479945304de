# ruff: noqa: NPY002  # the global state is what these tests are about

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._inductor.utils import run_and_get_code

from convnext_cli.data.augment import Choices
from convnext_cli.data.build import build_batch_mix
from convnext_cli.data.mix import (
    NOT_MIXED,
    BatchMix,
    Box,
    MixDraw,
    compile_mix,
    cutmix_box,
    denormalise,
    draw_mix,
    erase,
    make_target,
    mix_fused,
    mix_images,
    noise_bank,
    normalise,
)
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.schema import Compute, Data, Model, Recipe

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

    x = normalise(images, mean=MEAN, std=STD)

    assert x.is_contiguous(memory_format=torch.channels_last)


def erased_boxes(*rows: tuple[int, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.int32)


def test_erasing_changes_only_the_pixels_in_the_boxes():
    x = torch.full((3, 3, 10, 12), 5.0)
    boxes = erased_boxes((0,) * 6, (2, 7, 1, 11, 3, 4), (0,) * 6)

    erased = erase(x.clone(), erased_N6=boxes, noise=noise_bank(0, x.device))

    changed = erased != 5.0
    assert changed[1, :, 2:7, 1:11].all()
    assert int(changed.sum()) == 3 * 5 * 10


def test_erased_pixels_are_standard_normal_noise_cut_from_their_own_place():
    bank = noise_bank(7, torch.device("cpu"))
    boxes = erased_boxes(*((0, 64, 0, 64, 300 * n, 1000) for n in range(4)))

    noise = erase(torch.zeros(4, 3, 64, 64), erased_N6=boxes, noise=bank)

    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert torch.equal(noise[1, :, :, :24], bank[:, 300:364, 1000:])
    assert torch.equal(noise[1, :, :, 24:], bank[:, 300:364, :40])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(bank, noise_bank(8, torch.device("cpu")))


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


def test_mixup_blends_each_image_with_its_neighbour_by_its_own_lambda():
    x = some_images().float()
    lams = (0.3, 0.3, 0.6, 0.6, 1.0, 1.0)

    mixed = mix_images(x, [MixDraw(kind="mixup", lam=lam) for lam in lams])

    torch.testing.assert_close(mixed[0], 0.3 * x[0] + 0.7 * x[1])
    torch.testing.assert_close(mixed[3], 0.6 * x[3] + 0.4 * x[2])
    assert torch.equal(mixed[4], x[4])


def test_cutmix_takes_the_patch_of_the_partner_and_nothing_else():
    x = some_images().float()
    box = Box(top=2, bottom=5, left=3, right=9)
    patched, plain = MixDraw(kind="cutmix", lam=0.9, box=box), MixDraw(kind="mixup", lam=0.5)

    mixed = mix_images(x, [patched, patched, plain, plain, NOT_MIXED, NOT_MIXED])

    assert torch.equal(mixed[1, :, 2:5, 3:9], x[0, :, 2:5, 3:9])
    mixed[1, :, 2:5, 3:9] = x[1, :, 2:5, 3:9]
    assert torch.equal(mixed[1], x[1])
    torch.testing.assert_close(mixed[2], (x[2] + x[3]) / 2)
    assert torch.equal(mixed[5], x[5])


def test_targets_are_smoothed_and_mixed_and_sum_to_one():
    draw = MixDraw(kind="mixup", lam=0.7)

    target = make_target(torch.tensor([0, 3]), num_classes=4, smoothing=0.1, draws=[draw] * 2)

    on, off = 0.9 + 0.1 / 4, 0.1 / 4
    expected = 0.7 * torch.tensor([on, off, off, off]) + 0.3 * torch.tensor([off, off, off, on])
    torch.testing.assert_close(target[0], expected)
    torch.testing.assert_close(target.sum(1), torch.ones(2))


def test_without_smoothing_and_mixing_targets_are_one_hot():
    labels = torch.tensor([2, 0])

    target = make_target(labels, num_classes=3, smoothing=0.0, draws=[NOT_MIXED] * 2)

    assert target.tolist() == [[0, 0, 1], [1, 0, 0]]


def choices_of(count: int, *, erased: bool = False) -> Choices:
    box = (1, 9, 2, 12, 5, 6) if erased else (0,) * 6
    return Choices(np.zeros((count, 0, 0), dtype=np.float32), erased_boxes(*[box] * count))


def paper_mix(**changes) -> BatchMix:
    settings = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "group_images": 4}
    return BatchMix(num_classes=10, seed=0, mean=MEAN, std=STD, **(settings | changes))


def test_a_batch_depends_on_its_address_alone_and_touches_no_global_state():
    images, labels = some_images(), torch.arange(6)
    torch.manual_seed(1)
    np.random.seed(1)
    expected_global = (torch.rand(1).item(), np.random.rand())
    torch.manual_seed(1)
    np.random.seed(1)

    x, target = paper_mix()(images, labels, choices_of(6, erased=True), step=3, first=8)
    again = paper_mix()(images, labels, choices_of(6, erased=True), step=3, first=8)
    other, _ = paper_mix()(images, labels, choices_of(6, erased=True), step=4, first=8)

    assert (torch.rand(1).item(), np.random.rand()) == expected_global
    assert torch.equal(x, again[0])
    assert torch.equal(target, again[1])
    assert not torch.equal(x, other)
    assert torch.equal(images, some_images())


def test_images_of_a_group_share_a_draw_and_groups_have_their_own():
    draws = paper_mix().draw(step=0, first=2, count=400, px=32)

    assert draws[0] == draws[1]
    assert draws[2] == draws[5]
    assert draws[1] != draws[2]
    assert len(set(draws)) == 101


def test_how_a_batch_is_cut_into_passes_changes_nothing():
    images, labels = some_images(12), torch.arange(12) % 10
    whole = paper_mix()(images, labels, choices_of(12, erased=True), step=1, first=0)

    parts = [
        paper_mix()(
            images[at : at + size],
            labels[at : at + size],
            choices_of(size, erased=True),
            step=1,
            first=at,
        )
        for at, size in ((0, 2), (2, 6), (8, 4))
    ]

    for field, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(field), expected)


@pytest.mark.parametrize(("first", "count"), [(1, 4), (0, 5)])
def test_a_pass_that_parts_a_pair_is_refused(first, count):
    with pytest.raises(ValueError, match="are not whole pairs"):
        paper_mix()(some_images(count), torch.arange(count), choices_of(count), step=0, first=first)


def test_with_everything_off_a_batch_is_only_normalised():
    plain = paper_mix(mixup=None, cutmix=None, label_smoothing=0.0)

    x, target = plain(some_images(5), torch.arange(5), choices_of(5), step=0, first=0)

    assert torch.equal(x, normalise(some_images(5), mean=MEAN, std=STD))
    assert torch.equal(target, torch.eye(10)[:5])


MIXES = {
    "both": paper_mix(group_images=2),  # groups of mixup beside groups of cutmix
    "sometimes": paper_mix(group_images=2, prob=0.5),
    "nothing": paper_mix(mixup=None, cutmix=None, label_smoothing=0.0),
}


def some_batch(step: int, *, count: int = 8, px: int = 16):
    """Channels-last pixels, as the loader makes them, of which some images are erased."""
    images = some_images(count, px).roll(step, 0).to(memory_format=torch.channels_last)
    boxes = np.zeros((count, 6), dtype=np.int32)
    for place in range(step % 3, count, 3):
        boxes[place] = (1, 9, 2 + place % 5, 12, 1020, 1021 + step)  # over both edges of the noise
    return images, torch.arange(count) % 10, Choices(np.zeros((count, 0, 0), np.float32), boxes)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_in_operations_of_fixed_shapes_a_batch_is_the_same_to_the_bit(mix, monkeypatch):
    monkeypatch.setattr("convnext_cli.data.mix.compile_mix", lambda: mix_fused)
    for step in range(6):
        batch = some_batch(step)

        x, target = replace(mix, compiled=True)(*batch, step=step, first=0)

        expected_x, expected_target = mix(*batch, step=step, first=0)
        assert torch.equal(x, expected_x)
        assert torch.equal(target, expected_target)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_once_a_batch_is_the_same_but_for_rounding_whatever_was_drawn(
    backend, monkeypatch
):
    mix = MIXES["sometimes"]
    torch._dynamo.reset()
    compile_mix.cache_clear()
    if backend != "inductor":
        compiled = torch.compile(mix_fused, fullgraph=True, dynamic=False, backend=backend)
        monkeypatch.setattr("convnext_cli.data.mix.compile_mix", lambda: compiled)
    graphs = torch._dynamo.utils.counters["stats"]
    kinds = set()
    for step in range(6):
        batch = some_batch(step)
        before = graphs["unique_graphs"]

        x, target = replace(mix, compiled=True)(*batch, step=step, first=0)

        expected_x, expected_target = mix(*batch, step=step, first=0)
        torch.testing.assert_close(x, expected_x, atol=2e-6, rtol=0)
        torch.testing.assert_close(target, expected_target, atol=1e-6, rtol=0)
        assert graphs["unique_graphs"] - before == (step == 0)
        kinds |= {draw.kind for draw in mix.draw(step=step, first=0, count=8, px=16)}
    assert kinds == {"none", "mixup", "cutmix"}


def test_compiled_the_images_are_made_in_one_pass_in_the_format_that_is_asked():
    mix = paper_mix(compiled=True, channels_last=True, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compile_mix.cache_clear()

    (x, _), (code,) = run_and_get_code(mix, *some_batch(0), step=0, first=0)

    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)
    made = re.findall(r"buf\d+ = empty_strided_cpu\(\((\d+, \d+(?:, \d+)*)\)", code)
    assert sorted(made) == ["8, 10", "8, 3, 16, 16"]


def test_the_images_are_rounded_as_autocast_would_round_them_and_no_other_number_changes():
    torch.manual_seed(0)
    stem = torch.nn.Conv2d(3, 4, 4, 4).to(memory_format=torch.channels_last)
    batch = some_batch(0)

    x, target = paper_mix()(*batch, step=0, first=0)
    rounded = replace(paper_mix(), dtype=torch.bfloat16, channels_last=True)
    rounded_x, rounded_target = rounded(*batch, step=0, first=0)

    assert rounded_x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(rounded_x, x.to(torch.bfloat16))
    assert torch.equal(rounded_target, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(stem(rounded_x), stem(x.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize(
    ("model", "device", "precision", "dtype"),
    [
        ("convnext_tiny", "cuda", "auto", torch.bfloat16),
        ("convnext_tiny", "cuda", "fp16", torch.float16),
        ("convnext_tiny", "cpu", "auto", torch.float32),
        ("resnet50", "cuda", "auto", torch.float32),  # of timm: who knows what it begins with
    ],
)
def test_images_come_as_the_network_of_the_plan_takes_them(model, device, precision, dtype):
    recipe = Recipe(
        about="test",
        model=Model(name=model),
        data=Data(dataset="imagenet1k"),
        compute=Compute(precision=precision),
    )

    mix = build_batch_mix(make_plan(recipe, Cluster(device=device), name="test"))

    assert mix.dtype == dtype
    assert mix.channels_last == mix.compiled == (device == "cuda")
