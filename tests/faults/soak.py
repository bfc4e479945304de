"""Kill one run again and again at random moments, and hold what is left against one left alone.

    python tests/faults/soak.py --kills 100 [--seed 0] [--out report.json]

A run of the smallest model on the quick-start images is killed (SIGKILL to its main process, to all
of its processes, or to a loader process) at random times after its start; after the last kill it
runs to its end. Then the whole state and every row have to be equal, to the bit, to those of the
same run undisturbed. Exit code 1 where they are not.
"""

import argparse
import datetime as dt
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from test_faults import RECIPE, differing  # the same recipe and comparison

KEPT = ("step", "train/loss", "train/grad_norm", "val/loss", "val_ema/top1", "train/lr")
LONGEST_SECONDS = 14.0
"""After its start: half of it is spent on loading libraries."""


def make_data(folder: Path) -> Path:
    """The quick-start images, packed."""
    packed = folder / "quickstart"
    code = "from convnext_cli.data.quickstart import pack_quickstart;print(pack_quickstart())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    packed = Path(done.stdout.strip().splitlines()[-1])
    assert (packed / "dataset.json").is_file()
    return packed


def command(folder: Path, data: Path, name: str) -> list[str]:
    start = [sys.executable, "-m", "convnext_cli", "train", str(folder / "soak.yaml")]
    start += ["--data", str(data), "--name", name, "--device", "cpu"]
    return [*start, "--runs-dir", str(folder / "runs")]


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return [{key: json.loads(line).get(key) for key in KEPT} for line in lines]


def count_ready(run: Path) -> int:
    path = run / "events.jsonl"
    return path.read_text().count('"ready"') if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = RECIPE.replace("length: 8st", f"length: {asked.steps}st")
        recipe = recipe.replace("every: 4st", "every: 400st").replace("every: 2st", "every: 5st")
        recipe = recipe.replace("hang_minutes: 0.25", "hang_minutes: 5")
        (folder / "soak.yaml").write_text(recipe.replace("keep_last: 10", "keep_last: 3"))
        data = make_data(folder)
        whole, run = folder / "runs" / "whole", folder / "runs" / "killed"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started = time.monotonic()
        subprocess.run(command(folder, data, "whole"), check=True, **quiet)
        print(f"undisturbed: {time.monotonic() - started:.0f} s", flush=True)
        kinds = {"main": 0, "all": 0, "worker": 0, "ended before": 0}
        recoveries: list[float] = []
        lost: list[int] = []
        kills = 0
        while kills < asked.kills:
            ready = count_ready(run)
            begun = time.monotonic()
            process = subprocess.Popen(
                command(folder, data, "killed"), start_new_session=True, **quiet
            )
            until = begun + rng.uniform(0.5, LONGEST_SECONDS)
            recovered = False
            while time.monotonic() < until and process.poll() is None:
                if not recovered and count_ready(run) > ready:
                    recovered = True
                    recoveries.append(time.monotonic() - begun)
                time.sleep(0.02)
            if process.poll() is not None:
                kinds["ended before"] += 1
                assert process.returncode == 0, process.returncode
                break
            kind = rng.choice(["main", "all", "worker"])
            children = psutil.Process(process.pid).children(recursive=True)
            if kind == "worker" and not children:
                kind = "main"
            reached = max((row["step"] for row in rows(run)), default=0)
            match kind:
                case "main":
                    process.kill()
                case "all":
                    os.killpg(process.pid, signal.SIGKILL)
                case "worker":
                    rng.choice(children).kill()
            process.wait()
            for child in children:
                psutil.wait_procs([child], timeout=30)
            kills += 1
            kinds[kind] += 1
            steps = [
                int(path.stem.partition("=")[2])
                for path in (run / "checkpoints").glob("step=*.ckpt")
                if path.with_suffix(".json").exists()
            ]
            lost.append(max(0, reached - max(steps, default=0)))
            print(f"kill {kills} ({kind}) after step {reached}, lost {lost[-1]}", flush=True)
        subprocess.run(command(folder, data, "killed"), check=True, **quiet)
        name = f"checkpoints/step={asked.steps:08d}.ckpt"
        ours, theirs = (torch.load(r / name, weights_only=True) for r in (run, whole))
        parts = ("state_dict", "optimizer_states", "convnext", "callbacks")
        wrong = [place for part in parts for place in differing(ours[part], theirs[part], part)]
        report = {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "torch": torch.__version__,
            "steps": asked.steps,
            "kills": kills,
            "kinds": kinds,
            "lost_steps_median": statistics.median(lost),
            "lost_steps_max": max(lost),
            "start_seconds_median": round(statistics.median(recoveries), 1),
            "start_seconds_max": round(max(recoveries), 1),
            "state_differs_in": wrong,
            "rows_equal": rows(run) == rows(whole),
        }
    text = json.dumps(report, indent=2)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")
    sys.exit(bool(wrong) or not report["rows_equal"])


if __name__ == "__main__":
    main()
