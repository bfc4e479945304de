"""Every strategy learns what one device learns, and goes on from every other's checkpoint.

A launch is torchrun with real processes over gloo; each process trains several runs in a row, for
starting one takes longer than twenty steps.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

RECIPE = """
about: A few steps of the smallest model, for tests.
model: {name: convnextv2_atto, drop_path: 0.0}
data: {image_px: 32, workers: 0}
augment: {rand_augment: null, erasing: null}
mix: {mixup: null, cutmix: null}
batch: {global_images: 8, per_device_images: 2}
optim: {lr: 1.0e-3, lr_images: 8, clip_norm: 1.0, layer_decay: 0.9, layer_decay_kind: single}
schedule: {length: 20st, warmup: 2st}
ema: {decay: 0.9}
evaluate: {every: 10st}
checkpoint: {every: 10st, keep_last: 10}
log: {every_steps: 1, trackers: [csv]}
"""

DRIVER = """
import json, sys
from convnext_cli.__main__ import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["convnext", "train", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""

pytestmark = pytest.mark.timeout(600)

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install '.[deepspeed]'"
)


@functools.cache
def load(path: Path) -> dict:
    return torch.load(path, weights_only=True, mmap=True)


@dataclass(frozen=True)
class Lab:
    """A folder in which runs of one recipe are made; later tests read the runs of earlier ones."""

    root: Path
    data: Path

    def launch(self, runs: dict[str, list[str]], *, processes: int, nodes: int = 1) -> None:
        """Train `runs` (name: overrides) one after another in `processes` processes a node."""
        common = [str(self.root / "tiny.yaml"), "--data", str(self.data), "--device", "cpu"]
        common += ["--runs-dir", str(self.root / "runs")]
        arguments = [[*common, "--name", name, *more] for name, more in runs.items()]
        port = find_free_network_port()
        (self.root / "driver.py").write_text(DRIVER)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command += [f"--nnodes={nodes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        started = [
            subprocess.Popen(
                [*command, f"--node-rank={node}", "driver.py", json.dumps(arguments)],
                cwd=self.root,
                env=os.environ
                | {
                    "OMP_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                    # DeepSpeed builds an operator, which takes a minute, once
                    "TORCH_EXTENSIONS_DIR": str(Path.home() / ".cache" / "torch_extensions"),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for node in range(nodes)
        ]
        for process in started:
            output, _ = process.communicate(timeout=540)
            assert process.returncode == 0, output

    def checkpoint(self, name: str, step: int) -> Path:
        return self.root / "runs" / name / "checkpoints" / f"step={step:08d}.ckpt"

    def read(self, name: str, step: int) -> dict:
        return load(self.checkpoint(name, step))

    def rows(self, name: str, *, after: int = 0) -> list[dict]:
        lines = (self.root / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["step"] > after]

    def assert_same(self, left: str, right: str, *, after: int = 0) -> None:
        """Rows equal to rounding, and all that the last checkpoints hold."""
        ours, theirs = self.rows(left, after=after), self.rows(right, after=after)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        kept = {"train/loss", "train/grad_norm", "val/loss", "val/top1", "val_ema/loss"}
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() & kept == other.keys() & kept
            for key in one.keys() & kept:
                assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), (key, one["step"])
        self.assert_same_checkpoints(self.read(left, 20), self.read(right, 20))

    @staticmethod
    def assert_same_checkpoints(ours: dict, theirs: dict) -> None:
        assert list(ours) == list(theirs)
        assert list(ours["state_dict"]) == list(theirs["state_dict"])
        for key, value in ours["state_dict"].items():
            other = theirs["state_dict"][key]
            assert type(other) is torch.Tensor
            assert torch.allclose(value, other, atol=1e-5), key
        (left,), (right,) = ours["optimizer_states"], theirs["optimizer_states"]
        assert left["param_groups"] == right["param_groups"]
        assert left["state"].keys() == right["state"].keys()
        for index, entry in left["state"].items():
            assert entry.keys() == right["state"][index].keys()
            for key, value in entry.items():
                assert torch.allclose(value, right["state"][index][key], atol=1e-5), (index, key)


def resume(root: Path, name: str, *more: str) -> list[str]:
    return ["--resume", str(root / "runs" / name / "checkpoints" / "step=00000010.ckpt"), *more]


DDP, FSDP = "compute.strategy=ddp", "compute.strategy=fsdp"
SELECTIVE, STAGES, BLOCKS = (
    f"compute.gradient_checkpointing={mode}" for mode in ("selective", "stages", "blocks")
)
FUSED = "compute.kernels=fused"
NHWC = "compute.channels_last=true"
SHORT = ["compute.precision=bf16", "schedule.length=4st"]
V1 = ["model.name=convnext_tiny", "schedule.length=4st"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, tiny_shards) -> Lab:
    """A run `one` by one process that accumulates four passes, and runs by two processes."""
    root = tmp_path_factory.mktemp("strategies")
    (root / "tiny.yaml").write_text(RECIPE)
    made = Lab(root, tiny_shards)
    two = {
        "ddp": [DDP],
        "fsdp": [FSDP],
        "fsdp-to-fsdp": resume(root, "fsdp", FSDP, STAGES, NHWC),
        "fsdp-to-ddp": resume(root, "fsdp", DDP, NHWC),
        "ddp-to-fsdp": resume(root, "ddp", FSDP, SELECTIVE),
        "ddp-fused": [DDP, FUSED, NHWC],
        "fsdp-fused": [FSDP, FUSED, BLOCKS],
        "v1": [DDP, *V1],
        "v1-ddp-fused": [DDP, FUSED, NHWC, *V1],
        "v1-fsdp-fused": [FSDP, FUSED, BLOCKS, *V1],
        "ddp-bf16": [DDP, *SHORT],
        "fsdp-bf16": [FSDP, *SHORT],
    }
    made.launch(two, processes=2)
    made.launch({"one": [], "fsdp-to-one": resume(root, "fsdp", FSDP)}, processes=1)
    return made


def test_two_devices_learn_what_one_learns(lab):
    lab.assert_same("one", "ddp")


def test_devices_that_share_everything_learn_what_one_learns(lab):
    lab.assert_same("one", "fsdp")


@pytest.mark.parametrize("name", ["ddp-fused", "fsdp-fused"])
def test_blocks_in_kernels_between_products_learn_the_same(lab, name):
    lab.assert_same("one", name)
    log = (lab.root / "runs" / name / "train.log").read_text()
    assert "kernels of the stages: positions, positions, positions, positions" in log


@pytest.mark.parametrize("name", ["v1-ddp-fused", "v1-fsdp-fused"])
def test_blocks_that_are_one_operator_learn_the_same(lab, name):
    log = (lab.root / "runs" / name / "train.log").read_text()
    assert "kernels of the stages: recomputed, recomputed, kept, kept" in log
    plain, fused = lab.rows("v1"), lab.rows(name)
    assert [row["step"] for row in fused] == [row["step"] for row in plain] != []
    for one, other in zip(plain, fused, strict=True):
        for key in one.keys() & {"train/loss", "train/grad_norm", "val/loss", "val_ema/loss"}:
            assert other[key] == pytest.approx(one[key], rel=1e-5), (key, one["step"])


def test_clipping_and_averaging_were_at_work(lab):
    rows = [row for row in lab.rows("one") if "train/grad_norm" in row]
    state = lab.read("fsdp", 20)["state_dict"]

    assert all(row["train/grad_norm"] > 1 for row in rows)
    assert not torch.allclose(state["model.head.weight"], state["ema_model.head.weight"])


@pytest.mark.parametrize("name", ["fsdp-to-one", "fsdp-to-ddp", "fsdp-to-fsdp", "ddp-to-fsdp"])
def test_a_checkpoint_goes_on_in_another_form(lab, name):
    lab.assert_same("one", name, after=10)


def test_four_devices_go_on_with_what_two_began_also_with_a_copy_on_each_node(lab):
    runs = {
        "four": resume(lab.root, "fsdp", FSDP),
        "hybrid": resume(lab.root, "ddp", FSDP, "compute.shard_group=node"),
    }
    lab.launch(runs, processes=2, nodes=2)

    for name in runs:
        lab.assert_same("one", name, after=10)


def assert_same_bf16(lab: Lab, left: str, right: str) -> None:
    """The same numbers until rounding to eight bits has had steps to grow in."""
    for one, other in zip(lab.rows(left), lab.rows(right), strict=True):
        for key in one.keys() & {"train/loss", "val/loss", "val_ema/loss"}:
            near = 1e-5 if one["step"] <= 2 else 1e-2
            assert other[key] == pytest.approx(one[key], rel=near), (key, one["step"])


def test_bf16_on_shares_is_bf16_on_whole_weights(lab):
    assert_same_bf16(lab, "ddp-bf16", "fsdp-bf16")


def test_a_sharded_run_is_evaluated_as_any_other(lab, run_process):
    done = run_process(
        *("evaluate", lab.checkpoint("fsdp", 20), "--data", lab.data),
        *("--device", "cpu", "--json"),
    )

    assert done.exit_code == 0, done.stderr
    told, last = json.loads(done.stdout), lab.rows("fsdp")[-1]
    assert told["images"] == 12
    assert told["top1"] == pytest.approx(last["val_ema/top1"])
    assert told["loss"] == pytest.approx(last["val_ema/loss"], abs=1e-5)


@needs_deepspeed
def test_deepspeed_learns_what_one_device_learns_and_its_runs_go_on_elsewhere(lab):
    zero1, zero2, zero3 = (f"compute.strategy=zero{stage}" for stage in (1, 2, 3))
    whole = {"zero1": [zero1], "zero2": [zero2], "zero3": [zero3]}
    halves = {
        "zero3-to-fsdp": resume(lab.root, "zero3", FSDP),
        "ddp-to-zero1": resume(lab.root, "ddp", zero1),
        "fsdp-to-zero3": resume(lab.root, "fsdp", zero3, NHWC),
    }
    bf16 = {"zero1-bf16": [zero1, *SHORT], "zero3-bf16": [zero3, *SHORT]}
    lab.launch(whole | halves | bf16, processes=2)

    for name in whole:
        lab.assert_same("one", name)
    for name in halves:
        lab.assert_same("one", name, after=10)
    for name in bf16:
        assert_same_bf16(lab, "ddp-bf16", name)
