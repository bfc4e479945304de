"""Sizes of training images over the schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convnext_cli.plan.sizes import TrainSize, count_steps, make_train_sizes


def sizes_of(*, from_px=160, image_px=224, until=0.8, total_steps=1000):
    return make_train_sizes(
        from_px=from_px, image_px=image_px, until=until, total_steps=total_steps
    )


def test_sizes_are_32_px_apart_and_take_equal_times_up_to_the_share():
    assert sizes_of() == (TrainSize(160, 0), TrainSize(192, 400), TrainSize(224, 800))


def test_the_last_step_up_may_be_smaller_and_takes_less_time():
    assert [(size.image_px, size.first_step) for size in sizes_of(from_px=144, until=0.5)] == [
        (144, 0), (176, 200), (208, 400), (224, 500),
    ]  # fmt: skip


def test_without_a_first_size_there_is_one():
    assert sizes_of(from_px=None) == (TrainSize(224, 0),)


def test_sizes_for_which_no_step_is_left_are_passed_over():
    assert sizes_of(from_px=32, total_steps=3) == (
        TrainSize(32, 0), TrainSize(128, 1), TrainSize(224, 2),
    )  # fmt: skip
    assert sizes_of(total_steps=1) == (TrainSize(224, 0),)


@given(
    from_px=st.integers(1, 15).map(lambda n: 32 * n),
    more=st.integers(1, 12).map(lambda n: 32 * n),
    until=st.floats(0.01, 0.99),
    total_steps=st.integers(1, 10**6),
)
def test_sizes_grow_from_step_0_to_the_full_size_and_cover_every_step(
    from_px, more, until, total_steps
):
    sizes = sizes_of(from_px=from_px, image_px=from_px + more, until=until, total_steps=total_steps)

    assert sizes[0].first_step == 0
    assert sizes[-1].image_px == from_px + more
    assert [size.image_px for size in sizes] == sorted({size.image_px for size in sizes})
    steps = count_steps(sizes, total_steps=total_steps)
    assert min(steps) >= 1
    assert sum(steps) == total_steps
    assert steps[-1] == pytest.approx((1 - until) * total_steps, abs=1)
