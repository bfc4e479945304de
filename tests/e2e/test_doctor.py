"""`convnext doctor` on two processes: one list, with the network between them."""

import json
import subprocess
import sys


def test_two_ranks_measure_their_network_and_one_of_them_reports():
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    command = [*torchrun, "--nproc-per-node=2", "--module", "convnext_cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    report = json.loads(done.stdout)
    network = [row for row in report["findings"] if row["topic"] == "all-reduce"]
    assert len(network) == 1, report
    assert network[0]["found"].startswith("2 ranks over gloo: 1 MiB in ")
    assert [row["topic"] for row in report["findings"]].count("software") == 1
