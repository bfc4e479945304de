"""Drop path: what is drawn, and what is done with it."""

import pytest
import torch

from convnext_cli.catalog.models import drop_fracs
from convnext_cli.models.drop_path import add_kept, add_scaled, draw_paths


def draw_last(drop_path, *, images, kind):
    """What the last of three blocks is given."""
    return draw_paths(torch.empty(images, 3), blocks=3, drop_path=drop_path, kind=kind)[-1]


def test_images_are_dropped_at_the_rate_of_each_block_and_keep_the_mean():
    torch.manual_seed(0)
    fracs = drop_fracs(4, drop_path=0.3)

    drawn = draw_paths(torch.empty(20_000, 2), blocks=4, drop_path=0.3, kind="scale")

    assert drawn[0] is None
    for factor_N, frac in zip(drawn[1:], fracs[1:], strict=True):
        torch.testing.assert_close(factor_N.unique(), torch.tensor([0.0, 1 / (1 - frac)]))
        # Four standard errors of 20,000 draws.
        assert (factor_N == 0).float().mean().item() == pytest.approx(frac, abs=0.013)
        assert factor_N.mean().item() == pytest.approx(1.0, abs=0.019)


def test_blocks_drop_independently_of_each_other():
    torch.manual_seed(0)

    factors = draw_paths(torch.empty(20_000, 2), blocks=3, drop_path=0.5, kind="scale")[1:]

    kept = torch.stack(factors) > 0
    assert kept.all(0).float().mean().item() == pytest.approx(0.75 * 0.5, abs=0.014)


@pytest.mark.parametrize("kind", ["scale", "skip"])
def test_without_drop_path_nothing_is_drawn(kind):
    state = torch.get_rng_state()

    drawn = draw_paths(torch.empty(4, 3), blocks=3, drop_path=0.0, kind=kind)

    assert drawn == (None, None, None)
    assert torch.equal(state, torch.get_rng_state())


def test_a_network_of_one_block_drops_nothing():
    assert draw_paths(torch.empty(4, 3), blocks=1, drop_path=0.5, kind="scale") == (None,)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_what_is_dropped_depends_on_no_precision(given, dtype):
    drawn = []
    for x in (torch.empty(64, 3, dtype=given), torch.empty(64, 3)):
        torch.manual_seed(0)
        drawn.append(draw_paths(x, blocks=2, drop_path=0.3, kind="scale")[1])

    assert drawn[0].dtype == dtype
    assert torch.equal(drawn[0] == 0, drawn[1] == 0)


def test_a_branch_is_scaled_in_bfloat16_by_the_exact_factor():
    # 3 * (1 / 0.9) rounds to 3.328125 in bfloat16; 3 * bfloat16(1 / 0.9) would give 3.34375.
    torch.manual_seed(0)
    branch = torch.full((64, 1, 1, 1), 3.0, dtype=torch.bfloat16)

    out = add_scaled(torch.zeros_like(branch), branch, draw_last(0.1, images=64, kind="scale"))

    assert out.dtype == torch.bfloat16
    assert set(out.flatten().tolist()) == {0.0, torch.tensor(3 / 0.9).bfloat16().item()}


def test_a_branch_without_a_factor_is_added():
    x, branch = torch.randn(2, 4, 3, 2, 2)

    assert torch.equal(add_scaled(x, branch, None), x + branch)


def add_branch_of_ones(drop_frac, *, images=8):
    zeros = torch.zeros(images, 1, 1, 1)
    return add_kept(
        zeros, torch.ones_like, draw_last(drop_frac, images=images, kind="skip")
    ).flatten()


def test_skipping_computes_a_fixed_number_of_images_and_no_others():
    torch.manual_seed(0)
    seen = []
    x_NCHW = torch.randn(10, 3, 2, 2).contiguous(memory_format=torch.channels_last)

    def branch(kept_kCHW):
        assert kept_kCHW.is_contiguous(memory_format=torch.channels_last)
        seen.append(len(kept_kCHW))
        return kept_kCHW.double().sin().float()

    out_NCHW = add_kept(x_NCHW, branch, draw_last(0.34, images=10, kind="skip"))

    assert seen == [7]  # of 6.6
    assert out_NCHW.is_contiguous(memory_format=torch.channels_last)
    past = [torch.equal(image, out) for image, out in zip(x_NCHW, out_NCHW, strict=True)]
    assert sum(past) == 3
    for image, out, went_past in zip(x_NCHW, out_NCHW, past, strict=True):
        if not went_past:
            torch.testing.assert_close(out, image + image.sin() * 10 / 7)


def test_skipping_keeps_the_mean_exactly_and_every_image_equally_often():
    torch.manual_seed(0)

    draws = torch.stack([add_branch_of_ones(0.4) for _ in range(4000)])

    assert draws.sum(1).unique().tolist() == [8.0]  # 5 images x 8 / 5, in every single draw
    kept_frac = (draws > 0).float().mean(0)
    # Four standard errors of 4,000 draws around 5 / 8, which is not 1 - 0.4.
    assert kept_frac.tolist() == pytest.approx([5 / 8] * 8, abs=0.031)
    assert draws.mean(0).tolist() == pytest.approx([1.0] * 8, abs=0.05)


@pytest.mark.parametrize(
    ("images", "drop_frac", "kept"), [(1, 0.9, 1), (2, 0.95, 1), (128, 0.5, 64), (128, 0.03, 124)]
)
def test_at_least_one_image_goes_through_a_branch(images, drop_frac, kept):
    assert (add_branch_of_ones(drop_frac, images=images) > 0).sum().item() == kept


def test_skipping_gives_both_ways_their_gradients_in_the_same_memory():
    torch.manual_seed(0)
    x_NCHW = torch.randn(6, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    x_NCHW.requires_grad_()

    out_NCHW = add_kept(x_NCHW, lambda kept: 3 * kept, draw_last(0.5, images=6, kind="skip"))
    out_NCHW.sum().backward()

    gradients = x_NCHW.grad.flatten(1)
    assert gradients.amax(1).tolist() == gradients.amin(1).tolist()
    assert sorted(gradients[:, 0].tolist()) == [1, 1, 1, 7, 7, 7]  # 1, and 3 x 6 / 3 on top
    assert x_NCHW.grad.is_contiguous(memory_format=torch.channels_last)


def test_skipping_scales_bfloat16_by_the_exact_factor():
    kept_k = draw_last(0.1, images=10, kind="skip")
    x_NCHW = torch.zeros(10, 1, 1, 1, dtype=torch.bfloat16)

    out_NCHW = add_kept(x_NCHW, lambda kept: torch.full_like(kept, 3.0), kept_k)

    assert set(out_NCHW.flatten().tolist()) == {0.0, torch.tensor(3 * 10 / 9).bfloat16().item()}
