"""A rank that stands still ends, whatever else does not work."""

import signal
import subprocess
import sys

import pytest
from torch import distributed

from convnext_cli.training.watch import is_lost_peer, make_lost_peer_error

PROGRAM = """
import time
from pathlib import Path

from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.runs.interrupt import StopRequest
from convnext_cli.runs.layout import RunDir
from convnext_cli.training.watch import HangWatch

recipe = load_recipe("in1k_tiny", ["guard.start_minutes=0.002"])
plan = make_plan(recipe, Cluster(), name="mine")
watch = HangWatch(RunDir(Path("gone")), plan, request=StopRequest())
watch.start()
time.sleep(10)
"""


def test_a_hang_ends_with_76_where_its_stacks_cannot_be_written(tmp_path):
    (tmp_path / "gone").touch()  # no folder, as of a disk that is gone

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 76, done.stderr
    assert "rank 0 has stood still" in done.stderr
    assert "cannot write gone/stacks/rank=00000.txt: Not a directory" in done.stderr


STUCK_LOADER = PROGRAM.replace(
    "time.sleep(10)",
    """
import threading

import torch

from convnext_cli.data.reader import build_loader


class Stuck(torch.utils.data.IterableDataset):
    def __iter__(self):
        lock = threading.Lock()
        lock.acquire()
        print("waits", flush=True)
        lock.acquire()
        yield torch.zeros(1)


next(iter(build_loader(Stuck(), sampler=None, num_workers=1, pin_memory=False)))
""",
).replace("0.002", "0.1")


def test_a_hang_shows_where_a_loader_process_stands_and_leaves_none_behind(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STUCK_LOADER],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=40,  # until the loader process is gone too, which holds the streams
    )

    assert done.returncode == 76, done.stderr
    assert done.stdout == "waits\n"
    assert "in __iter__" in done.stderr


LONELY = """
from pathlib import Path

from torch.distributed import TCPStore

from convnext_cli.plan.cluster import Cluster
from convnext_cli.plan.resolve import make_plan
from convnext_cli.recipe.files import load_recipe
from convnext_cli.runs.interrupt import StopRequest
from convnext_cli.runs.layout import RunDir
from convnext_cli.training.watch import HangWatch

plan = make_plan(load_recipe("in1k_tiny"), Cluster(num_nodes=2), name="mine")
request = StopRequest()
request.listen()
HangWatch(RunDir(Path("mine")), plan, request=request).start()
print("waits", flush=True)
TCPStore("127.0.0.1", 0, world_size=2, is_master=True)  # as torch's process group does
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_rank_that_still_looks_for_the_others_with_75(tmp_path, number):
    command = [sys.executable, "-W", "ignore", "-c", LONELY]
    lonely = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert lonely.stdout is not None
    with lonely:
        while lonely.stdout.readline().strip() != "waits":
            assert lonely.poll() is None
        lonely.send_signal(number)
        _, told = lonely.communicate(timeout=30)

    assert lonely.returncode == 75, told
    assert f"stopped by {number.name} before the first step" in told


@pytest.mark.parametrize(
    "words",
    [
        "The server socket has failed to listen, message: address already in use",
        "The client socket has timed out after 5000ms while trying to connect to (a, 29500)",
    ],
)
def test_ranks_that_do_not_meet_are_told_where_and_may_try_again(monkeypatch, words):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    error = distributed.DistNetworkError(words)

    assert is_lost_peer(error)
    told = make_lost_peer_error(error, when="after step 0", hint="try again")
    assert (str(told), told.exit_code) == (f"the ranks did not meet at node1:29500 ({words})", 76)
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
