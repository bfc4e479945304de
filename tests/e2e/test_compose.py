"""docker/compose.yaml without Docker: what its two containers start, as two processes here."""

import subprocess
import sys
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import find_free_network_port
from ruamel.yaml import YAML

from convnext_cli.runs.layout import RunDir

ROOT = Path(__file__).parents[2]


def test_the_two_nodes_of_the_compose_file_train_together(tmp_path):
    services = YAML(typ="safe").load(ROOT / "docker" / "compose.yaml")["services"]
    port = str(find_free_network_port())
    nodes = []
    for service in services.values():
        words = [*service["entrypoint"], *service["command"]]
        assert words[0] == "python"
        here = {"--master-addr=node0": "--master-addr=127.0.0.1"}
        here["--master-port=29500"] = f"--master-port={port}"
        assert here.keys() <= set(words)
        command = [sys.executable, *(here.get(word, word) for word in words[1:])]
        command += ["schedule.length=4st", "schedule.warmup=1st"]
        nodes.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
    told = [node.communicate(timeout=180)[1] for node in nodes]

    assert [node.returncode for node in nodes] == [0, 0], told
    assert RunDir(tmp_path / "runs" / "quickstart").newest_step() == 4
    assert "2 x 1 cpu" in told[0], told[0]
