"""Averaged weights against timm's averages, on whole and on sharded parameters."""

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import init_device_mesh as make_mesh

from convnext_cli.optim.ema import make_averaged, update_averaged


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))


def move(model, *, seed):
    """Give every weight a new value, as an optimizer step would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))


@pytest.mark.parametrize("timm_average", [ModelEmaV2, ModelEmaV3])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_the_average_is_that_of_timm_over_twenty_updates(model, timm_average, decay):
    # in float64, for V2 rounds twice an update: in float32 that alone comes to 4e-7 here
    model.double()
    ours, theirs = make_averaged(model), timm_average(model, decay=decay)

    for seed in range(20):
        move(model, seed=seed)
        update_averaged(ours, model, decay=decay)
        theirs.update(model)

    for name, expected in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected, atol=1e-14, rtol=0)


def test_in_float32_the_average_is_that_of_timm_to_the_bit(model):
    ours, theirs = make_averaged(model), ModelEmaV3(model, decay=0.9999)

    for seed in range(20):
        move(model, seed=seed)
        update_averaged(ours, model, decay=0.9999)
        theirs.update(model)

    for name, expected in theirs.module.state_dict().items():
        assert torch.equal(ours.state_dict()[name], expected)


def test_one_update_is_the_formula(model):
    averaged = make_averaged(model)
    before = [weight.clone() for weight in averaged.parameters()]
    move(model, seed=1)

    update_averaged(averaged, model, decay=0.75)

    for average, old, new in zip(averaged.parameters(), before, model.parameters(), strict=True):
        torch.testing.assert_close(average, 0.75 * old + 0.25 * new.detach(), atol=1e-7, rtol=1e-6)


def test_the_same_updates_give_the_same_bits(model):
    first, second = make_averaged(model), make_averaged(model)

    for seed in range(5):
        move(model, seed=seed)
        update_averaged(first, model, decay=0.999)
        update_averaged(second, model, decay=0.999)

    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_average_of_weights_that_stand_still_is_those_weights_to_the_bit(model):
    averaged = make_averaged(model)

    for _ in range(10):
        update_averaged(averaged, model, decay=0.9999)

    for average, weight in zip(averaged.parameters(), model.parameters(), strict=True):
        assert torch.equal(average, weight)


def test_a_step_that_was_left_out_moves_no_average(model):
    averaged = make_averaged(model)
    before = [weight.clone() for weight in averaged.parameters()]
    move(model, seed=1)

    update_averaged(averaged, model, decay=0.5, left_out=torch.ones(()))

    pairs = zip(averaged.parameters(), before, strict=True)
    assert all(torch.equal(average, old) for average, old in pairs)
    update_averaged(averaged, model, decay=0.5, left_out=torch.zeros(()))
    pairs = zip(averaged.parameters(), before, strict=True)
    assert not any(torch.equal(average, old) for average, old in pairs)


def test_an_update_leaves_the_model_alone(model):
    averaged = make_averaged(model)
    move(model, seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    update_averaged(averaged, model, decay=0.5)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_copy_is_not_trained_is_in_evaluation_mode_and_shares_no_memory(model):
    averaged = make_averaged(model.train())

    assert not averaged.training
    assert model.training
    assert not any(weight.requires_grad for weight in averaged.parameters())
    assert all(weight.requires_grad for weight in model.parameters())
    own = {weight.data_ptr() for weight in model.parameters()}
    assert own.isdisjoint(weight.data_ptr() for weight in averaged.parameters())


def test_running_statistics_are_copied_and_not_averaged():
    model = nn.BatchNorm1d(4)
    averaged = make_averaged(model)
    model(torch.randn(16, 4, generator=torch.Generator().manual_seed(0)))

    update_averaged(averaged, model, decay=0.99)

    assert model.running_mean.abs().max() > 0
    assert torch.equal(averaged.running_mean, model.running_mean)
    assert averaged.num_batches_tracked == 1


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield make_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_weights_have_the_average_of_whole_ones(model, mesh):
    def shard(_, module, device_mesh):
        for name, weight in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(weight.detach(), device_mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(sharded))

    whole = make_averaged(model)
    sharded_model = distribute_module(make_averaged(model), mesh, shard)
    sharded = make_averaged(sharded_model)
    move(model, seed=3)
    with torch.no_grad():
        for mine, theirs in zip(sharded_model.parameters(), model.parameters(), strict=True):
            mine.copy_(distribute_tensor(theirs.detach(), mesh, [Shard(0)]))

    update_averaged(whole, model, decay=0.9)
    update_averaged(sharded, sharded_model, decay=0.9)

    for left, right in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert isinstance(left, DTensor)
        assert torch.equal(left.full_tensor(), right)
