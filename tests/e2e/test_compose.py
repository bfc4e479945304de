"""docker/compose.yaml without Docker: what its two containers start, as two processes here."""

import re
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


def test_both_images_are_made_by_the_same_steps_and_run_as_nobody_special():
    for name, packages in (("Dockerfile", "requirements-cuda"), ("Dockerfile.cpu", "requirements")):
        text = (ROOT / "docker" / name).read_text()
        steps = re.findall(r"^RUN bash /opt/src/docker/install.sh (\S+) (\S+)", text, re.MULTILINE)
        assert steps == [("/opt/convnext", f"docker/{packages}.txt")]
        assert text.rindex("USER 10001") < text.index("ENTRYPOINT")


def test_what_the_base_image_brings_is_not_pinned_and_all_else_has_a_hash():
    pinned = {}
    for path in (ROOT / "docker").glob("*.txt"):
        if path.name == "in-base-image.txt":
            continue
        entries = re.split(r"\n(?=\S)", path.read_text().split("make lock\n", 1)[1].strip())
        assert all("==" in entry and "--hash=sha256:" in entry for entry in entries), path
        pinned[path.stem] = {entry.split("==")[0] for entry in entries}

    base = {"torch", "torchvision", "triton"}
    assert base <= pinned["requirements"]
    assert not base & pinned["requirements-cuda"]
    assert {"deepspeed", "lightning", "webdataset"} <= pinned["requirements-cuda"]
