"""Nodes, devices and ranks, from the variables that launchers set."""

import pytest

from convnext_cli.plan.cluster import Cluster, count_cpus, read_rank, read_shape


def test_the_world_is_all_devices_of_all_nodes():
    assert Cluster(num_nodes=4, devices_per_node=8).world_size == 32
    assert Cluster().world_size == 1


def test_at_least_one_core_is_there():
    assert count_cpus() >= 1


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, 0),
        # torchrun
        ({"RANK": "13", "LOCAL_RANK": "5", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 13),
        # Lightning's own launcher names the local rank and the node
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, 1),
        # srun, a task a device
        ({"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}, 9),
        # one shell inside an allocation is not a rank
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 0),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, 0),
    ],
)
def test_the_rank_is_what_the_launcher_says(environ, rank):
    assert read_rank(environ) == rank


@pytest.mark.parametrize(
    ("environ", "shape"),
    [
        ({}, None),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, (2, 8)),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, (1, 1)),
        ({"SLURM_NTASKS": "32", "SLURM_STEP_NUM_NODES": "4"}, (4, 8)),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        # inside an allocation, but not started by srun
        ({"SLURM_NTASKS": "32", "SLURM_JOB_NUM_NODES": "4"}, None),
    ],
)
def test_the_shape_is_what_torchrun_or_a_slurm_step_says(environ, shape):
    assert read_shape(environ) == shape
