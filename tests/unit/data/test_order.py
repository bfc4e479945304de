import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_cli.data.order import (
    BLOCK_SHARDS,
    Order,
    evaluation_share,
    image_seed,
    mix_rng,
    pass_rng,
    philox,
    same_shard_rate,
)

KINDS = ("full", "window")
WINDOW_V2 = [2956, 928, 367, 1245, 1093, 3731, 3993, 2304]
FULL_V2 = [3717, 3808, 1144, 1643, 2492, 306, 2533, 3586]
SHARDS = (130, 64, 1, 200, 77)  # whole, cut and tiny chunks


def epoch_ids(order: Order, epoch: int) -> np.ndarray:
    return np.concatenate([order.batch(epoch, step) for step in range(order.steps_per_epoch)])


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_uses_each_image_at_most_once_and_drops_less_than_one_batch(kind):
    order = Order(shard_images=SHARDS, seed=3, global_images=32, lanes=8, kind=kind)

    ids = epoch_ids(order, 0)

    assert len(ids) == 472 // 32 * 32
    assert len(np.unique(ids)) == len(ids)
    assert ids.min() >= 0
    assert ids.max() < 472
    assert order.dropped_images == 472 - len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_without_remainder_is_a_permutation(kind):
    order = Order(shard_images=(100, 156), seed=0, global_images=16, lanes=8, kind=kind)

    assert sorted(epoch_ids(order, 4)) == list(range(256))


@pytest.mark.parametrize("kind", KINDS)
def test_the_remainder_is_another_one_each_epoch(kind):
    order = Order(shard_images=(1500,), seed=0, global_images=64, kind=kind)

    left_out = {frozenset(set(range(1500)) - set(epoch_ids(order, epoch))) for epoch in range(4)}

    assert all(len(ids) == 1500 % 64 for ids in left_out)
    assert len(left_out) == 4


@settings(max_examples=40)
@given(
    shards=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    batch=st.integers(1, 48),
    lanes=st.integers(1, 16),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    kind=st.sampled_from(KINDS),
    data=st.data(),
)
def test_the_shares_of_any_world_are_the_same_global_batch(
    shards, batch, lanes, seed, epoch, kind, data
):
    if sum(shards) < batch:
        shards = [*shards, batch]
    order = Order(
        shard_images=tuple(shards), seed=seed, global_images=batch, lanes=lanes, kind=kind
    )
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    world = data.draw(st.sampled_from(order.worlds))

    shares = [order.share(epoch, step, rank=rank, world=world) for rank in range(world)]

    assert {len(share) for share in shares} == {batch // world}
    np.testing.assert_array_equal(np.concatenate(shares), order.batch(epoch, step))


@settings(max_examples=20)
@given(images=st.integers(1, 400), batch=st.integers(1, 64), kind=st.sampled_from(KINDS))
def test_any_sizes_give_epochs_without_repetition(images, batch, kind):
    images = max(images, batch)
    order = Order(shard_images=(images,), seed=1, global_images=batch, lanes=32, kind=kind)

    ids = epoch_ids(order, 1)

    assert len(set(ids.tolist())) == images // batch * batch


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_and_seeds_have_other_orders_and_the_same_ones_repeat(kind):
    def ids(seed, epoch):
        order = Order(shard_images=SHARDS, seed=seed, global_images=16, lanes=8, kind=kind)
        return epoch_ids(order, epoch).tolist()

    assert ids(0, 0) == ids(0, 0)
    assert ids(0, 0) != ids(0, 1)
    assert ids(0, 0) != ids(1, 0)
    assert ids(0, 1) != ids(1, 0)


def test_the_orders_of_version_2_stay_what_they_are():
    window = Order(shard_images=(100,) * 40, seed=7, global_images=8, lanes=4, kind="window")
    full = Order(shard_images=(100,) * 40, seed=7, global_images=8, lanes=4, kind="full")

    # Checkpoints rely on it: if this must change, raise ORDER_VERSION.
    assert window.batch(2, 3).tolist() == WINDOW_V2
    assert full.batch(2, 3).tolist() == FULL_V2


def test_a_large_window_order_reaches_any_step_without_the_ones_before():
    order = Order(shard_images=(10_000,) * 200, seed=0, global_images=4096, kind="window")

    last = order.batch(5, order.steps_per_epoch - 1)

    assert len(np.unique(last)) == 4096


@pytest.mark.parametrize(
    ("global_images", "lanes"), [(4096, 256), (64, 64), (1000, 200), (768, 192), (7, 7), (509, 1)]
)
def test_lanes_are_a_divisor_of_the_batch_that_many_worlds_divide(global_images, lanes):
    order = Order(shard_images=(5000,), seed=0, global_images=global_images)

    assert order.num_lanes == lanes
    assert global_images % lanes == 0


def test_a_world_that_does_not_divide_the_lanes_is_refused_with_those_that_do():
    order = Order(shard_images=(5000,), seed=0, global_images=64, lanes=8)

    with pytest.raises(ValueError, match=r"a world of 3 .* can: 1, 2, 4, 8$"):
        order.share(0, 0, rank=0, world=3)


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(
        ValueError, match="63 training images are fewer than one global batch of 64"
    ):
        Order(shard_images=(63,), seed=0, global_images=64)


def test_a_step_beyond_the_epoch_is_refused():
    order = Order(shard_images=(100,), seed=0, global_images=10)

    with pytest.raises(ValueError, match="epochs have 10 steps"):
        order.batch(0, 10)


def test_the_window_order_reads_from_few_shards_at_a_time():
    order = Order(shard_images=(1000,) * 1000, seed=0, global_images=64, lanes=4, kind="window")

    near = np.concatenate([order.batch(0, step) for step in range(16)])

    # 4 lanes x (16 x 64 images) hold at most 64 chunks, though 1,024 images come from 1,000 shards.
    assert len(np.unique(near // 1000)) <= 68


@settings(max_examples=40)
@given(images=st.integers(1, 300), world=st.integers(1, 9), batch=st.integers(1, 40))
def test_evaluation_counts_each_image_once_in_equally_many_batches(images, world, batch):
    shares = [
        evaluation_share(images, rank=rank, world=world, batch=batch) for rank in range(world)
    ]

    assert len({share.shape for share in shares}) == 1
    assert shares[0].shape[1] == batch
    ids = np.concatenate([share.ravel() for share in shares])
    assert sorted(ids[ids >= 0]) == list(range(images))


def test_random_streams_of_different_addresses_differ():
    addresses = [
        philox(0, purpose="image", major=1, minor=2),
        philox(1, purpose="image", major=1, minor=2),
        philox(0, purpose="batch", major=1, minor=2),
        philox(0, purpose="image", major=2, minor=1),
    ]

    assert len({int(stream.random_raw()) for stream in addresses}) == 4


def test_every_seed_epoch_and_sample_gives_an_image_other_choices():
    seeds = {
        image_seed(seed, epoch=epoch, sample=sample)
        for seed in range(5)
        for epoch in range(5)
        for sample in range(200)
    }

    assert len(seeds) == 5000
    assert image_seed(3, epoch=1 << 40, sample=14_000_000) == image_seed(
        3, epoch=1 << 40, sample=14_000_000
    )


def test_passes_and_ranks_of_a_step_draw_other_numbers():
    draws = {
        float(pass_rng(0, step=5, micro=micro, rank=rank).random())
        for micro in range(3)
        for rank in range(3)
    }

    assert len(draws) == 9


def test_groups_and_steps_mix_with_other_numbers():
    draws = {
        float(mix_rng(0, step=step, group=group).random())
        for step in range(3)
        for group in range(3)
    }

    assert len(draws) == 9


def test_a_node_reads_few_shards_of_an_epoch():
    order = Order(shard_images=(1000,) * 1024, seed=0, global_images=4096, kind="window")

    steps = range(0, order.steps_per_epoch, 4)
    shares = [order.batch(0, step)[: 4096 // 8] // 1000 for step in steps]

    # An eighth of 1024 shards, and a block at either end.
    assert len(np.unique(np.concatenate(shares))) <= 128 + 2 * BLOCK_SHARDS


def test_the_full_order_shuffles_uniformly_and_the_window_order_nearly_so():
    def rate(kind):
        order = Order(shard_images=(1000,) * 1282, seed=0, global_images=4096, kind=kind)
        return same_shard_rate(order, epoch=0, steps=[0, 100, 200])

    assert 0.97 < rate("full") < 1.03
    assert 1.0 < rate("window") < 1.3


def test_images_of_one_shard_alone_have_no_other_shard_to_be_compared_with():
    order = Order(shard_images=(64,), seed=0, global_images=8)

    assert same_shard_rate(order, epoch=0, steps=[0]) == 1.0
