"""What there is to run on: nodes, devices and this process's place among them.

What launchers say of a process in its environment is read here:

```
torchrun          RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE
a step of srun    SLURM_STEP_*; what Slurm says of the job alone holds in a batch script's shell too
Lightning's own   LOCAL_RANK; NODE_RANK where a person has set it on each node
```
"""

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

from convnext_cli.errors import LaunchError

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
    """This process's rank: as torchrun, srun or Lightning's launcher say; 0 where none does."""
    if "LOCAL_WORLD_SIZE" in environ:
        return int(environ["RANK"])
    if _is_in_step(environ):
        return int(environ["SLURM_PROCID"])
    world = int(environ.get("WORLD_SIZE", "1"))
    return int(environ.get("NODE_RANK", "0")) * world + int(environ.get("LOCAL_RANK", "0"))


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
    """(nodes, devices a node) as torchrun or a step of several tasks say; None where neither.

    Raises:
        LaunchError: Nodes have unlike numbers of processes, or nobody says how many.
    """
    if "LOCAL_WORLD_SIZE" in environ:
        ranks, local = int(environ["WORLD_SIZE"]), int(environ["LOCAL_WORLD_SIZE"])
        even = ranks % local == 0
    elif _is_in_step(environ):
        ranks = int(environ["SLURM_STEP_NUM_TASKS"])
        local = ranks // int(environ["SLURM_STEP_NUM_NODES"])
        # 2(x3) where each of three nodes has two, and 2,1 where they differ
        even = "," not in environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    elif {"RANK", "WORLD_SIZE"} <= environ.keys() and "LOCAL_RANK" not in environ:
        if (world := environ["WORLD_SIZE"]) == "1":
            return None
        raise LaunchError(
            f"RANK={environ['RANK']} and WORLD_SIZE={world} are set, but neither LOCAL_RANK nor"
            " LOCAL_WORLD_SIZE: how many processes a node has is not known",
            hint="start one torchrun a node, which sets them: torchrun --module convnext_cli train",
        )
    else:
        return None
    if not even:
        raise LaunchError(
            f"{ranks} processes are shared out unevenly: all nodes need the same number",
            hint="srun --ntasks-per-node=N, or torchrun with the same --nproc-per-node=N on each",
        )
    return ranks // local, local


def check_place(environ: Mapping[str, str], *, nodes: int, devices: int) -> None:
    """Refuse to start where nothing but Lightning's variables tells this process its place.

    Raises:
        LaunchError: The run has no such process, and it would neither say nor write a word; or no
            variable says which of several nodes this is, and it would wait for the others.
    """
    for name, number in (("LOCAL_RANK", devices), ("NODE_RANK", nodes)):
        if int(environ.get(name, "0")) >= number:
            raise LaunchError(
                f"{name}={environ[name]} is set, but it ends at {number - 1} in this run",
                hint=f"if it is left over from another launcher: unset {name}",
            )
    told = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    absent = [name for name in told if name not in environ]
    if nodes > 1 and absent:
        raise LaunchError(
            f"--nodes {nodes}: nothing tells this process which node it is on ({absent[0]} is not"
            " set)",
            hint=f"convnext launch slurm --nodes {nodes}, or set {', '.join(told)} on each node",
        )


def describe_step(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would tell a process of a step of srun, in torchrun's variables."""
    shape = read_shape(environ)
    assert shape is not None
    step = int(environ["SLURM_STEP_ID"])
    # node[03-05,9],other: the first of the names
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", environ["SLURM_STEP_NODELIST"]).partition(",")[0]
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "GROUP_RANK": environ["SLURM_NODEID"],
        "WORLD_SIZE": str(shape[0] * shape[1]),
        "LOCAL_WORLD_SIZE": str(shape[1]),
        "MASTER_ADDR": environ.get("MASTER_ADDR", first),
        # below the ports that systems hand out by themselves; steps at one time have their own
        "MASTER_PORT": environ.get(
            "MASTER_PORT", str(12000 + (int(environ["SLURM_JOB_ID"]) + 7919 * step) % 20000)
        ),
    }


def adopt_step(environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell torch what srun says of this process, where torchrun has told nothing."""
    if "LOCAL_WORLD_SIZE" not in environ:
        environ.update(describe_step(environ))


def _is_in_step(environ: Mapping[str, str]) -> bool:
    return int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
