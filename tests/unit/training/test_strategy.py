"""Which strategy a recipe gets, and what is shared together."""

import os

import pytest
import timm
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from convnext_cli.catalog.models import find_variant
from convnext_cli.models.convnext import Block, ConvNeXt, build_convnext
from convnext_cli.plan.cluster import Cluster, describe_step
from convnext_cli.plan.cost import STRATEGIES
from convnext_cli.training.sharding import ShardedStrategy, iter_shard_units
from convnext_cli.training.strategy import (
    ReplicatedStrategy,
    build_strategy,
    compile_network,
    find_environment,
)
from convnext_cli.training.zero import ZeroStrategy

ALONE = Cluster(device="cpu")
TWO = Cluster(device="cpu", devices_per_node=2)


@pytest.mark.parametrize("tasks", ["1", "4"])
def test_the_shell_of_a_slurm_job_is_no_task_of_many(monkeypatch, tasks):
    # a script of sbatch, where Lightning's own look finds tasks that srun has started
    for name, value in {"JOB_ID": "7", "JOB_NAME": "a", "NTASKS": tasks, "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)

    found = find_environment()

    assert isinstance(found, LightningEnvironment)
    assert not found.creates_processes_externally


def test_a_step_of_srun_needs_no_more_than_its_tasks(monkeypatch):
    step = {"STEP_NUM_TASKS": "4", "STEP_NUM_NODES": "2", "STEP_NODELIST": "a[1-2]", "STEP_ID": "0"}
    own = {"JOB_ID": "7", "NTASKS": "4", "PROCID": "3", "LOCALID": "1", "NODEID": "1"}
    for name, value in (step | own).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in describe_step(os.environ):  # gone after the test, where they are set in it
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    found = find_environment()

    assert isinstance(found, TorchElasticEnvironment)
    assert (found.world_size(), found.global_rank(), found.local_rank()) == (4, 3, 1)
    assert (found.node_rank(), found.main_address) == (1, "a1")


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


@pytest.mark.usefixtures("fresh_compiler")
def test_a_network_is_compiled_block_by_block_and_what_lies_between():
    network = build_convnext(find_variant("convnextv2_atto"), num_classes=3)

    compile_network(network)

    blocks = set(iter_shard_units(network))
    compiled = [part for part in network.modules() if "forward" in vars(part)]
    assert set(compiled) == blocks | set(network.downsample_layers)
    assert network._compiled_call_impl is None


@pytest.mark.usefixtures("fresh_compiler")
def test_a_network_without_blocks_in_a_row_is_compiled_whole():
    network = timm.create_model("inception_v3", pretrained=False, aux_logits=False)

    compile_network(network)

    assert "forward" in vars(network)


@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_of_one_shape_share_a_graph_whatever_they_drop():
    counter = CompileCounter()
    shape = {"depths": (6, 6), "dims": (8, 16)}
    network = ConvNeXt(**shape, num_classes=3, drop_path=0.5, layer_scale_init=1.0)

    with torch._dynamo.config.patch(recompile_limit=100):
        for block in iter_shard_units(network):
            block.forward = torch.compile(block.forward, backend=counter, dynamic=False)
        network(torch.randn(2, 3, 32, 32)).sum().backward()

    # one a stage, and the first block of all, which drops nothing
    assert counter.frame_count == 3


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
def test_gradients_are_sent_while_the_first_blocks_are_still_to_come(tmp_path):
    network = build_convnext(find_variant("convnextv2_atto"), num_classes=3)
    compile_network(network)
    sent: list[bool] = []

    def note(_state, bucket):
        sent.append(network.stages[0][0].dwconv.weight.grad is not None)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        alone = DistributedDataParallel(network, bucket_cap_mb=1)
        alone.register_comm_hook(None, note)
        for _ in range(2):  # the first tells in what order gradients come
            sent.clear()
            network.zero_grad()
            alone(torch.randn(2, 3, 32, 32)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()

    assert len(sent) > 2
    assert not sent[0]


@pytest.mark.usefixtures("fresh_compiler")
def test_no_compiled_part_copies_the_gradient_that_comes_to_it():
    network = ConvNeXt(depths=(2, 2), dims=(16, 32), num_classes=3, layer_scale_init=1.0)
    network.to(memory_format=torch.channels_last)
    parts = [*network.downsample_layers, *iter_shard_units(network)]
    compile_network(network)
    grads: list[torch.Tensor] = []
    for part in parts:
        part.register_forward_hook(lambda *call: call[-1].register_hook(grads.append) and None)
    images = torch.randn(2, 3, 32, 48).to(memory_format=torch.channels_last)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = network(images).float().sum()
    loss.backward()

    assert len(grads) == len(parts) == 6
    for grad in grads:
        assert grad.is_contiguous(memory_format=torch.channels_last), grad.stride()


@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiler_does_not_give_up_on_images_of_many_sizes():
    with torch.device("meta"):
        network = build_convnext(find_variant("convnext_base"), num_classes=3)

    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        compile_network(network, sizes=8)

        # of each of 36 blocks, one a size in training and one in evaluation
        assert torch._dynamo.config.recompile_limit >= 36 * 9
        assert torch._dynamo.config.accumulated_recompile_limit >= 36 * 9
