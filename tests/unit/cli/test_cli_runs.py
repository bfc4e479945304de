"""`convnext runs` on runs that the project's own writers made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from convnext_cli.cli.runs import app
from convnext_cli.errors import RunError
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import JsonLines, write_json

cli = CliRunner()
pytestmark = pytest.mark.usefixtures("root")


def make_run(root: Path, *, lr: str = "4e-3", top1: float = 40.0) -> RunDir:
    run = RunDir(root)
    run.checkpoints.mkdir(parents=True)
    run.best.touch()
    run.recipe.write_text(f"model:\n  name: convnext_tiny\noptim:\n  lr: {lr}\n")
    write_json(run.plan, {"total_steps": 2000, "steps_per_epoch": 1000})
    time = "2026-01-01T10:{:02}:00.000+00:00"
    with JsonLines(run.metrics) as lines:
        for step in (500, 1000):
            lines.write({"step": step, "epoch": step / 1000, "time": time.format(step // 100),
                         "train/loss": 6.5, "train/lr": 1e-3, "train/grad_norm": 1.0,
                         "speed/images_per_second": 5123.4})  # fmt: skip
        lines.write({"step": 1000, "epoch": 1.0, "time": time.format(11), "val/top1": top1})
    with JsonLines(run.events) as lines:
        lines.write({"event": "started", "time": time.format(0), "step": 0})
        lines.write({"event": "stopped", "time": time.format(12), "step": 1000})
    return run


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs in `runs` of the current folder."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "baseline")
    make_run(tmp_path / "runs" / "low_lr[draft]", lr="2e-3", top1=41.5)
    return tmp_path / "runs"


def invoke(*arguments: str) -> tuple[str, str]:
    """Run a command that succeeds; its stdout and stderr."""
    result = cli.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_list_shows_people_a_table_on_stderr():
    stdout, stderr = invoke("list")

    assert stdout == ""
    lines = [line.split() for line in stderr.splitlines()]
    assert lines[1] == [
        "baseline", "stopped", "1,000", "/", "2,000", "40.00", "-", "6.5000", "5,123", "12",
        "min", "00", "s",
    ]  # fmt: skip
    assert lines[2][0] == "low_lr[draft]"


def test_list_prints_json_to_stdout(root):
    stdout, stderr = invoke("list", "--json", "--root", str(root))

    summaries = json.loads(stdout)
    assert stderr == ""
    assert [summary["name"] for summary in summaries] == ["baseline", "low_lr[draft]"]
    assert summaries[0] == {
        "name": "baseline", "root": str(root / "baseline"), "state": "stopped", "step": 1000,
        "total_steps": 2000, "epoch": 1.0, "best_top1": 40.0, "best_top1_step": 1000,
        "best_ema_top1": None, "best_ema_top1_step": None, "last_loss": 6.5,
        "images_per_second": 5123.4, "wall_seconds": 720.0, "attempts": 1,
        "checkpoints": [str(root / "baseline" / "checkpoints" / "best.ckpt")],
    }  # fmt: skip


def test_one_damaged_run_does_not_hide_the_others(root):
    (root / "low_lr[draft]" / "plan.json").write_text("{")

    stdout, stderr = invoke("list", "--json")

    assert [summary["name"] for summary in json.loads(stdout)] == ["baseline"]
    assert "left out: runs/low_lr[draft]/plan.json is not JSON" in stderr


def test_an_empty_root_says_so(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()

    assert invoke("list", "--root", str(empty)) == ("", f"no runs in {empty}\n")
    assert invoke("list", "--root", str(empty), "--json")[0] == "[]\n"


def test_a_root_that_is_not_there_is_a_users_error(tmp_path):
    with pytest.raises(RunError, match="no folder") as caught:
        cli.invoke(app, ["list", "--root", str(tmp_path / "x")], catch_exceptions=False)

    assert "--root" in str(caught.value.hint)


def test_show_names_best_result_and_checkpoint(root):
    stdout, stderr = invoke("show", "baseline")

    assert stdout == ""
    assert "40.00% at step 1,000" in stderr
    assert "runs/baseline/checkpoints/best.ckpt" in stderr
    assert json.loads(invoke("show", str(root / "baseline"), "--json")[0])["best_top1"] == 40.0


def test_long_paths_are_not_cut_when_piped(root):
    name = "a" * 150
    make_run(root / name)

    assert f"runs/{name}/checkpoints/best.ckpt" in invoke("show", name)[1]


def test_show_of_a_misspelt_run_hints_at_the_right_one():
    with pytest.raises(RunError) as caught:
        cli.invoke(app, ["show", "baselin"], catch_exceptions=False)

    assert "did you mean 'baseline'?" in str(caught.value.hint)


def test_compare_shows_what_differs_and_nothing_else():
    stdout, stderr = invoke("compare", "baseline", "low_lr[draft]")

    assert stdout == ""
    assert [line.split() for line in stderr.splitlines()] == [
        ["recipe", "baseline", "low_lr[draft]"],
        ["optim.lr", "0.004", "0.002"],
        [],
        ["result", "baseline", "low_lr[draft]"],
        ["best_top1", "40", "41.5"],
    ]


def test_compare_prints_json():
    found = json.loads(invoke("compare", "baseline", "low_lr[draft]", "--json")[0])

    assert found["recipe"] == {"optim.lr": {"baseline": 0.004, "low_lr[draft]": 0.002}}
    assert found["metrics"] == {"best_top1": {"baseline": 40.0, "low_lr[draft]": 41.5}}
    assert found["runs"]["baseline"]["state"] == "stopped"


def test_equal_runs_are_said_to_be_equal(root):
    make_run(root / "again")

    stderr = invoke("compare", "baseline", "again")[1]

    assert "the recipes are the same" in stderr
    assert "the results are the same" in stderr


def test_comparing_a_run_with_itself_is_refused():
    with pytest.raises(RunError, match="one run alone"):
        cli.invoke(app, ["compare", "baseline", "runs/baseline"], catch_exceptions=False)


def test_plot_of_one_run_lies_in_the_run_and_its_path_is_printed():
    stdout, stderr = invoke("plot", "baseline")

    assert (stdout, stderr) == ("runs/baseline/plots/curves.png\n", "")
    with Image.open(stdout.strip()) as image:
        assert image.width >= 1200


def test_plot_of_several_runs_lies_here_or_where_asked():
    assert invoke("plot", "baseline", "low_lr[draft]")[0] == "curves.png\n"

    asked = ("--out", "new/both.png", "--key", "train/grad_norm", "--json")
    found = json.loads(invoke("plot", "baseline", "low_lr[draft]", *asked)[0])

    assert found == {"plot": "new/both.png", "runs": ["runs/baseline", "runs/low_lr[draft]"]}
    assert Path("curves.png").is_file()
    assert Path("new/both.png").is_file()


def test_plot_writes_png_only():
    with pytest.raises(RunError, match=r"found: a\.pdf") as caught:
        cli.invoke(app, ["plot", "baseline", "--out", "a.pdf"], catch_exceptions=False)

    assert caught.value.hint == "use a.png"


@pytest.mark.parametrize("command", ["list", "show", "compare", "plot"])
def test_each_help_has_an_example(command):
    assert f"Example: convnext runs {command}" in invoke(command, "--help")[0]


def test_listing_loads_nothing_heavy():
    script = (
        "import sys; from convnext_cli.cli.runs import app; app(['list'], standalone_mode=False); "
        "print([name for name in ('torch', 'lightning', 'numpy', 'matplotlib', 'timm') "
        "if name in sys.modules])"
    )

    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": repo_root()},
    )  # fmt: skip

    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(9.4, "9 s"), (59.6, "1 min 00 s"), (725, "12 min 05 s"), (11_220, "3 h 07 min"),
     (93_600, "1 d 02 h")],
)  # fmt: skip
def test_durations_read_as_their_two_largest_units(root, seconds, words):
    run = RunDir(root / "baseline")
    start = {"event": "started", "time": "2026-01-01T00:00:00+00:00", "step": 0}
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    end = f"2026-01-{1 + int(days):02}T{int(hours):02}:{int(minutes):02}:{left:09.6f}+00:00"
    run.metrics.unlink()
    run.events.unlink()
    with JsonLines(run.events) as lines:
        lines.write(start)
        lines.write({"event": "finished", "time": end, "step": 2000})

    assert f"{words} in 1 attempt(s)" in invoke("show", "baseline")[1]


def repo_root() -> str:
    return str(Path(__file__).parents[3])


def test_a_home_folder_that_no_shell_has_read_is_found(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own").mkdir()

    done = run_cli("runs", "list", "--root=~/own")

    assert (done.exit_code, done.stderr) == (0, f"no runs in {tmp_path}/own\n")
