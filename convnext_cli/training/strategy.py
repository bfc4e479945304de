"""How devices share a step, and one form of checkpoint for all of it.

```
ddp             each device holds everything; gradients are averaged as they come
fsdp            FSDP2: each device holds a share of every tensor, of the averaged weights too
zero1 .. zero3  DeepSpeed: a share of the optimizer, of the gradients, of the weights
```

The network computes as under ddp in every precision: weights are exchanged and gradients averaged
in fp32, and autocast casts within the blocks, so that a strategy changes no number but for the
order of sums. A checkpoint is always ddp's: whole tensors, the optimizer's state in the order of
its groups. It is read before the network is shared out, and the optimizer's state is shared out as
it is loaded.
"""

from collections.abc import Generator
from typing import assert_never

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from convnext_cli.plan.cluster import Cluster, adopt_step, read_shape
from convnext_cli.recipe.schema import ShardGroup
from convnext_cli.recipe.schema import Strategy as StrategyName
from convnext_cli.training.graphs import record_network
from convnext_cli.training.sharding import ShardedStrategy, iter_shard_units
from convnext_cli.training.zero import ZeroStrategy

WHOLE_WEIGHTS: frozenset[StrategyName] = frozenset({"ddp", "zero1", "zero2"})
"""Strategies under which every rank holds all weights."""


class ReplicatedStrategy(DDPStrategy):
    """DDP that is made on the stream that trains.

    Lightning makes it on another one, and torch 2.10 and newer then has the two wait for each other
    at every gradient. Source: Lightning-AI/pytorch-lightning#21567.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        device_ids = self.determine_ddp_device_ids()
        return DistributedDataParallel(model, device_ids=device_ids, **self._ddp_kwargs)


def build_strategy(
    cluster: Cluster,
    *,
    strategy: StrategyName = "ddp",
    shard_group: ShardGroup = "all",
    clip_norm: float | None = None,
) -> Strategy:
    """How devices share the work; fresh each time, for Lightning keeps state in it.

    Args:
        cluster: What there is; one device has nobody to share with.
        strategy: See above.
        shard_group: Over which devices fsdp shards.
        clip_norm: For DeepSpeed, which clips by itself.
    """
    if cluster.world_size == 1:
        return SingleDeviceStrategy(device="cuda:0" if cluster.device == "cuda" else "cpu")
    backend = "nccl" if cluster.device == "cuda" else "gloo"
    match strategy:
        case "ddp":
            return ReplicatedStrategy(gradient_as_bucket_view=True, process_group_backend=backend)
        case "fsdp":
            return ShardedStrategy(shard_group=shard_group, process_group_backend=backend)
        case "zero1":
            return ZeroStrategy(stage=1, clip_norm=clip_norm, process_group_backend=backend)
        case "zero2":
            return ZeroStrategy(stage=2, clip_norm=clip_norm, process_group_backend=backend)
        case "zero3":
            return ZeroStrategy(stage=3, clip_norm=clip_norm, process_group_backend=backend)
        case _:
            assert_never(strategy)


def find_environment() -> ClusterEnvironment:
    """Whether a launcher has started all processes, for Lightning; tells torch what srun says.

    Lightning's own look takes each shell of a Slurm job for a task of many, in which a process
    trains alone on its share of the images, and refuses a step without --ntasks-per-node.

    Raises:
        LaunchError: The launcher gives nodes unlike numbers of processes.
    """
    if read_shape() is None:
        return LightningEnvironment()
    adopt_step()
    return TorchElasticEnvironment()


def compile_network(
    network: nn.Module, *, sizes: int = 1, cuda_graphs: bool = False, passes: int = 1
) -> None:
    """Have a network compiled part by part when it first runs.

    Blocks of one shape share a graph, so that compiling takes a stage's time and not a network's,
    and ddp sends the gradients of a block as soon as it is done. FSDP's hooks, which fetch the
    weights of a block, stay outside of what is compiled. Every shape is compiled by itself,
    training and evaluation too, for a graph that leaves a size open is slower.

    Args:
        network: What learns.
        sizes: Sizes that training images have in turn.
        cuda_graphs: Whether it is recorded, too.
        passes: Of an optimizer step.
    """
    from torch._dynamo import config  # noqa: PLC0415  # takes seconds

    parts = list(iter_compile_units(network))
    # at worst, each has a shape of its own, once more for evaluation
    graphs = 2 * len(parts) * (sizes + 1)
    config.recompile_limit = max(config.recompile_limit, graphs)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, graphs)
    config.optimize_ddp = False  # it cuts a graph where DDP's messages end; these are short enough
    for part in parts:
        part.forward = torch.compile(part.forward, dynamic=False)
    if cuda_graphs:
        record_network(network, passes=passes)


def iter_compile_units(network: nn.Module) -> Generator[nn.Module]:
    """The parts that are compiled by themselves: each block, and what lies between stages."""
    blocks = set(iter_shard_units(network))

    def walk(module: nn.Module) -> Generator[nn.Module]:
        between = blocks.isdisjoint(module.modules()) and any(True for _ in module.children())
        if module in blocks or (between and not isinstance(module, nn.ModuleList | nn.ModuleDict)):
            yield module
        else:
            for child in module.children():
                yield from walk(child)

    return walk(network)
