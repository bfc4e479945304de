"""What there is to run on: nodes, devices and this process's place among them.

What launchers say of a process in its environment is read here. torchrun and Lightning's own
launcher set `WORLD_SIZE`, `LOCAL_WORLD_SIZE`, `RANK` and `LOCAL_RANK`; Slurm sets `SLURM_*`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Cluster:
    """Nodes with the same number of devices each; a process drives one device."""

    num_nodes: int = 1
    devices_per_node: int = 1
    device: DeviceKind = "cuda"
    cpus_per_node: int = 1
    rank: int = 0
    """This process's number among all; rank 0 writes."""

    @property
    def world_size(self) -> int:
        """Number of processes, one a device."""
        return self.num_nodes * self.devices_per_node


def count_cpus() -> int:
    """Cores that this process may use: fewer than there are under Slurm or taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_rank(environ: Mapping[str, str] = os.environ) -> int:
    """This process's rank: as torchrun, Lightning's launcher or srun say; 0 where none does."""
    if "RANK" in environ:
        return int(environ["RANK"])
    if "LOCAL_RANK" in environ:  # Lightning's launcher names the node and the local rank only
        local_world = int(environ.get("LOCAL_WORLD_SIZE", environ.get("WORLD_SIZE", "1")))
        return int(environ.get("NODE_RANK", "0")) * local_world + int(environ["LOCAL_RANK"])
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return int(environ["SLURM_PROCID"])
    return 0


def read_local_rank(environ: Mapping[str, str] = os.environ) -> int:
    """This process's number on its node; 0 where no launcher says."""
    return int(environ.get("LOCAL_RANK", environ.get("SLURM_LOCALID", "0")))


def read_job(environ: Mapping[str, str] = os.environ) -> str | None:
    """Slurm's id of this job; None outside of one."""
    return environ.get("SLURM_JOB_ID")


def read_attempt(environ: Mapping[str, str] = os.environ) -> str | None:
    """How often Slurm has requeued this job; None: never, or outside of one."""
    return environ.get("SLURM_RESTART_COUNT")


def read_deadline(environ: Mapping[str, str] = os.environ) -> float | None:
    """When Slurm will end this job, Unix time; None where it does not say."""
    end = environ.get("SLURM_JOB_END_TIME")
    return float(end) if end else None


def read_shape(environ: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """(nodes, devices a node) as torchrun or a multi-task Slurm step say; None where neither."""
    if "WORLD_SIZE" in environ and "LOCAL_WORLD_SIZE" in environ:
        local = int(environ["LOCAL_WORLD_SIZE"])
        return int(environ["WORLD_SIZE"]) // local, local
    if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NUM_NODES" in environ:
        nodes = int(environ["SLURM_STEP_NUM_NODES"])
        return nodes, int(environ["SLURM_NTASKS"]) // nodes
    return None
