"""Nodes, devices and ranks, from the variables that launchers set."""

import pytest

from convnext_cli.errors import LaunchError
from convnext_cli.plan.cluster import (
    Cluster,
    check_place,
    count_cpus,
    describe_step,
    read_rank,
    read_shape,
)

STEP = {
    "SLURM_JOB_ID": "20007",
    "SLURM_JOB_NODELIST": "gpu-[01-08]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu-[03,05-06],other",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


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
        # and knows nothing of the node before it starts the others
        ({"NODE_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}, 1),
        # srun, a task a device
        (STEP, 5),
        # and a script that tells its tasks some of torchrun's words
        (STEP | {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, 5),
        # one shell inside an allocation is not a rank
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "1"}, 0),
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
        (STEP, (4, 2)),
        # salloc's shell is a step of one task, which knows how many the job has
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        # a pod of Kubeflow that is alone, and Lightning's own launcher in it
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, None),
        # inside an allocation, but not started by srun
        ({"SLURM_NTASKS": "32", "SLURM_JOB_NUM_NODES": "4"}, None),
    ],
)
def test_the_shape_is_what_torchrun_or_a_slurm_step_says(environ, shape):
    assert read_shape(environ) == shape


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4"}, "6 processes are shared out unevenly"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3,2(x2),1"}, "8 processes are shared out unevenly"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "neither LOCAL_RANK nor"),
    ],
)
def test_nodes_that_are_unlike_or_unknown_are_refused(environ, sentence):
    with pytest.raises(LaunchError, match=sentence) as caught:
        read_shape(environ)
    assert "torchrun" in str(caught.value.hint)


def test_a_step_of_srun_is_told_in_the_words_of_torchrun():
    told = describe_step(STEP)

    assert told == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "2",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu-03",  # of the step, which does not begin where its job does
        "MASTER_PORT": "12007",
    }
    assert read_shape(told) == read_shape(STEP)
    assert describe_step(STEP | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != told["MASTER_PORT"]
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert describe_step(STEP | chosen) == told | chosen


@pytest.mark.parametrize(
    ("environ", "nodes", "sentence"),
    [
        ({"LOCAL_RANK": "1"}, 1, "LOCAL_RANK=1 is set, but it ends at 0"),
        ({"NODE_RANK": "1"}, 1, "NODE_RANK=1 is set, but it ends at 0"),
        ({}, 2, "NODE_RANK is not set"),
        ({"NODE_RANK": "1"}, 2, "MASTER_ADDR is not set"),
    ],
)
def test_a_place_that_a_run_does_not_have_is_refused(environ, nodes, sentence):
    with pytest.raises(LaunchError, match=sentence):
        check_place(environ, nodes=nodes, devices=1)


def test_lightnings_own_processes_and_nodes_have_their_place():
    check_place({}, nodes=1, devices=2)
    check_place({"LOCAL_RANK": "1", "NODE_RANK": "0"}, nodes=1, devices=2)
    node = {"NODE_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
    check_place(node, nodes=2, devices=2)
    check_place(node | {"LOCAL_RANK": "1", "WORLD_SIZE": "4"}, nodes=2, devices=2)
