import json

import pytest
import torch

from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.manifest import check_checkpoint, manifest_path
from convnext_cli.training.checkpoint import save_interval, write_checkpoint


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "mine")
    run.checkpoints.mkdir(parents=True)
    run.recipe.write_text("about: x\n")
    run.plan.write_text('{"total_steps": 8}')
    for step in (2, 4):
        state = {"state_dict": {"w": torch.ones(100)}, "convnext": {"step": step}}
        write_checkpoint(state, run.checkpoint(step), world_size=2)
    run.last.symlink_to(run.checkpoint(4).name)
    return run


def test_list_says_what_there_is(run, run_cli):
    done = run_cli("checkpoints", "list", "mine")

    assert done.exit_code == 0
    assert "complete" in done.stderr
    assert "last" in done.stderr


def test_a_checkpoint_is_listed_with_all_its_names(run, run_cli):
    run.best.symlink_to(run.checkpoint(4).name)
    run.best_ema.symlink_to(run.checkpoint(4).name)

    for command in ("list", "verify"):
        told = run_cli("checkpoints", command, "mine")
        data = json.loads(run_cli("checkpoints", command, "mine", "--json").stdout)

        assert "last, best, best_ema" in told.stderr
        assert [state["named"] for state in data] == [[], ["last", "best", "best_ema"]]


def test_verify_finds_a_flipped_bit_that_list_does_not(run, run_cli):
    content = bytearray(run.checkpoint(4).read_bytes())
    content[300] ^= 4
    run.checkpoint(4).write_bytes(content)

    assert run_cli("checkpoints", "list", "mine").exit_code == 0
    done = run_cli("checkpoints", "verify", "mine", "--json")

    assert done.exit_code == 2
    assert [state["problem"] is None for state in json.loads(done.stdout)] == [True, False]
    assert "step=00000004.ckpt is damaged" in done.stderr


@pytest.mark.parametrize("removed", ["before", "after"])
def test_what_a_run_that_goes_on_removes_meanwhile_is_not_told(run, run_cli, monkeypatch, removed):
    def check(path, *, deep):
        old = run.checkpoint(2)
        state = check_checkpoint(path, deep=deep) if removed == "after" else None
        old.unlink(missing_ok=True)
        manifest_path(old).unlink(missing_ok=True)
        return state or check_checkpoint(path, deep=deep)

    monkeypatch.setattr("convnext_cli.cli.checkpoints.check_checkpoint", check)

    done = run_cli("checkpoints", "verify", "mine", "--json")

    assert done.exit_code == 0, done.stderr
    assert [state["step"] for state in json.loads(done.stdout)] == [4]


def test_a_run_without_checkpoints_gets_a_sentence(run, run_cli):
    for path in run.checkpoints.iterdir():
        path.unlink()

    done = run_cli("checkpoints", "list", "mine")

    assert done.exit_code == 2
    assert "has no checkpoint yet" in done.stderr


def test_consolidate_wants_the_name_of_one_file(run, run_cli):
    done = run_cli("checkpoints", "consolidate", str(run.root), "--out", "x.pth")

    assert done.exit_code == 2
    assert "x.safetensors" in done.stderr


def test_consolidate_wants_a_folder_that_is_there(run, run_cli):
    done = run_cli("checkpoints", "consolidate", str(run.root), "--out", "nodir/x.safetensors")

    assert done.exit_code == 2
    assert "cannot write nodir/x.safetensors: nodir is no writable folder" in done.stderr


@pytest.mark.parametrize(
    ("cost", "write", "seconds"),
    [
        (0.01, 0.1, 41.6),  # Young's optimum, sqrt(2 x 0.01 x 86400)
        (0.2, 2.0, 60.0),  # no more than a minute is at risk ...
        (2.0, 5.0, 200.0),  # ... but saving takes no more than 1%
        (0.1, 300.0, 600.0),  # and a write ends before the next begins
    ],
)
def test_the_interval_follows_the_cost_of_a_save(cost, write, seconds):
    interval = save_interval(cost_seconds=cost, write_seconds=write, failure_hours=24.0)

    assert interval == pytest.approx(seconds, rel=0.01)
