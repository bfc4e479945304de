"""FSDP2: each device holds a share of every tensor; what is saved is whole.

Source of the shares: `torch.distributed.fsdp.fully_shard`, on the first dimension of each tensor.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, assert_never

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from convnext_cli.recipe.schema import ShardGroup
from convnext_cli.training.task import Classifier


def iter_shard_units(network: nn.Module) -> Generator[nn.Module]:
    """The parts whose weights are fetched together: blocks in a row with their like."""
    for child in network.children():
        parts = list(child.children())
        in_a_row = len(parts) > 1 and len({type(part) for part in parts}) == 1
        if (
            isinstance(child, nn.Sequential | nn.ModuleList)
            and in_a_row
            and any(True for _ in parts[0].children())
            and not isinstance(parts[0], nn.Sequential)
        ):
            yield from parts
        else:
            yield from iter_shard_units(child)


class WholeCheckpointStrategy(DDPStrategy):
    """What strategies have in common whose ranks hold shares: whole checkpoints, written by rank 0.

    The network is shared out in `setup`, after Lightning has read the weights of the checkpoint.
    """

    @property
    def task(self) -> Classifier:
        """What is trained."""
        assert isinstance(self.lightning_module, Classifier)
        return self.lightning_module

    @property
    def networks(self) -> list[nn.Module]:
        """What learns, and its average where there is one."""
        both = (self.task.model, self.task.ema_model)
        return [network for network in both if network is not None]

    def configure_ddp(self) -> None:
        """Put the weights back into contiguous memory, for shares are cut from nothing else.

        The activations stay in channels_last, and the operators see to the rest.
        """
        for network in self.networks:
            network.to(memory_format=torch.contiguous_format)

    def on_validation_start(self) -> None:
        """Have all ranks evaluate with the buffers of rank 0, such as BatchNorm's, as under ddp."""
        for network in self.networks:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def keep(self, value: Tensor) -> Tensor | None:
        """A whole tensor on the CPU on rank 0, where it is written; None elsewhere."""
        return value.detach().to("cpu", copy=True) if self.is_global_zero else None


class ShardedStrategy(WholeCheckpointStrategy):
    """FSDP2 over every device, or over those of a node with a copy on each node.

    Between steps each tensor of both networks is a share (a DTensor); the averaged weights move on
    their shares alone.
    """

    def __init__(self, *, shard_group: ShardGroup, process_group_backend: str) -> None:
        super().__init__(process_group_backend=process_group_backend)
        self.shard_group = shard_group

    def configure_ddp(self) -> None:
        """Share out the networks, which the checkpoint, if any, has filled by now."""
        super().configure_ddp()
        mesh = self._make_mesh()
        for network in self.networks:
            for block in iter_shard_units(network):
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
            # also at the root: after an evaluation its weights would stay whole, apart from their
            # shares, and averaging would move what is thrown away
            fully_shard(network, mesh=mesh, reshard_after_forward=True)

    def _make_mesh(self) -> DeviceMesh:
        kind = self.root_device.type
        match self.shard_group:
            case "all":
                return init_device_mesh(kind, (self.world_size,), mesh_dim_names=("shard",))
            case "node":
                shape = (self.num_nodes, self.num_processes)
                return init_device_mesh(kind, shape, mesh_dim_names=("copy", "shard"))
            case _:
                assert_never(self.shard_group)

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Exchange no gradients in a pass that is not the last of its step."""
        network = self.task.model
        assert isinstance(network, FSDPModule)
        network.set_requires_gradient_sync(requires_gradient_sync=False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(requires_gradient_sync=True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights on rank 0, nothing elsewhere."""
        state = self.task.state_dict()
        return {key: self._gather(value) for key, value in state.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, as the optimizer of one device writes it."""
        state = optimizer.state_dict()
        whole = {
            index: {key: self._gather(value) for key, value in entry.items()}
            for index, entry in state["state"].items()
        }
        return {"state": whole, "param_groups": state["param_groups"]}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Share out the state; every rank has read all of it."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            shares = {
                index: {key: _share_as(value, weights[index]) for key, value in entry.items()}
                for index, entry in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": shares})

    def _gather(self, value: Any) -> Any:  # noqa: ANN401  # a state holds tensors and plain values
        """One tensor, whole and on the CPU on rank 0; one at a time, so that few are in memory."""
        if not isinstance(value, Tensor):
            return value
        return self.keep(value.full_tensor() if isinstance(value, DTensor) else value)


def _share_as(value: Any, weight: Tensor) -> Any:  # noqa: ANN401  # as above
    """This rank's share of a whole tensor; what is no tensor of the weight's shape stays."""
    if not isinstance(value, Tensor) or not isinstance(weight, DTensor):
        return value
    if value.shape != weight.shape:
        return value
    whole = value.to(weight.device).contiguous()
    # every rank has the tensor, so nothing need be sent
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
