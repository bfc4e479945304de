"""Which strategy a recipe gets, and what is shared together."""

import pytest
import timm
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from convnext_cli.catalog.models import find_variant
from convnext_cli.models.convnext import Block, build_convnext
from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.cost import STRATEGIES
from convnext_cli.training.sharding import ShardedStrategy, iter_shard_units
from convnext_cli.training.strategy import ReplicatedStrategy, build_strategy, compile_network
from convnext_cli.training.zero import ZeroStrategy

ALONE = Cluster(device="cpu")
TWO = Cluster(device="cpu", devices_per_node=2)


def test_every_name_has_its_strategy():
    built = {name: build_strategy(TWO, strategy=name) for name in STRATEGIES}

    assert {name: type(strategy) for name, strategy in built.items()} == {
        "ddp": ReplicatedStrategy,
        "fsdp": ShardedStrategy,
        "zero1": ZeroStrategy,
        "zero2": ZeroStrategy,
        "zero3": ZeroStrategy,
    }
    assert [built[f"zero{stage}"].stage for stage in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_device_shares_with_nobody(name):
    assert isinstance(build_strategy(ALONE, strategy=name), SingleDeviceStrategy)


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_isotropic_small"])
def test_the_weights_of_a_block_are_fetched_together(name):
    network = build_convnext(find_variant(name), num_classes=3)

    units = list(iter_shard_units(network))

    assert units == [part for part in network.modules() if isinstance(part, Block)]


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("resnet18", "BasicBlock", 8), ("deit_tiny_patch16_224", "Block", 12)],
)
def test_the_blocks_of_other_models_are_found_too(name, kind, count):
    units = list(iter_shard_units(timm.create_model(name, pretrained=False)))

    assert [type(unit).__name__ for unit in units] == [kind] * count


def test_a_sharded_network_is_compiled_block_by_block():
    network = build_convnext(find_variant("convnextv2_atto"), num_classes=3)

    compile_network(network, strategy="fsdp")

    assert all("forward" in vars(unit) for unit in iter_shard_units(network))
    assert network._compiled_call_impl is None


@pytest.mark.parametrize(("name", "graphs"), [("ddp", 9), ("fsdp", 36 * 9)])
def test_the_compiler_does_not_give_up_on_images_of_many_sizes(name, graphs):
    with torch.device("meta"):
        network = build_convnext(find_variant("convnext_base"), num_classes=3)

    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        compile_network(network, strategy=name, sizes=8)

        # of each block, one a size in training and one in evaluation
        assert torch._dynamo.config.recompile_limit >= graphs
        assert torch._dynamo.config.accumulated_recompile_limit >= graphs
