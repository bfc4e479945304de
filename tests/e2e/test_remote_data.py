"""Training on shards behind a URL: the same run as from a folder, whatever the server does."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

RECIPE = """
about: A few steps of the smallest model on shards behind a URL, for tests.
model: {name: convnextv2_atto}
data: {image_px: 32, workers: 1, order: window, lanes: 4}
augment: {rand_augment: null, erasing: 0.25}
batch: {global_images: 8, per_device_images: 8}
optim: {lr: 1.0e-3, lr_images: 8}
schedule: {length: 6st, warmup: 2st}
ema: {decay: null}
evaluate: {every: null}
checkpoint: {every: 2st, keep_last: 10}
log: {every_steps: 1, trackers: [csv]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def command_of(recipe: Path, data: object, name: str) -> list[str]:
    command = [sys.executable, "-m", "convnext_cli", "train", str(recipe), "--data", str(data)]
    command += ["--name", name, "--runs-dir", str(recipe.parent / "runs"), "--device", "cpu"]
    return [*command, f"data.cache_dir={recipe.parent / 'cache'}"]


def train(recipe: Path, data: object, name: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command_of(recipe, data, name), capture_output=True, text=True, timeout=240
    )


def losses(recipe: Path, name: str) -> list[float]:
    lines = (recipe.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]


@pytest.fixture(scope="module")
def local_losses(tmp_path_factory, tiny_shards) -> list[float]:
    """Those of the run from a folder."""
    recipe = tmp_path_factory.mktemp("local") / "tiny.yaml"
    recipe.write_text(RECIPE)
    done = train(recipe, tiny_shards, "local")
    assert done.returncode == 0, done.stderr
    return losses(recipe, "local")


@pytest.fixture
def remote(faulty_server, tiny_shards):
    """The tiny shards behind a server."""
    faulty_server.files |= {path.name: path.read_bytes() for path in tiny_shards.iterdir()}
    return faulty_server


def test_a_server_full_of_faults_changes_nothing(recipe, remote, local_losses):
    for number in range(3):
        remote.faults[f"train-00000{number}.tar"] = [["500"], ["half"], ["flipped", "reset"]][
            number
        ]
    remote.faults["dataset.json"] = ["503"]

    far = train(recipe, remote.url, "far")

    assert far.returncode == 0, far.stderr
    assert losses(recipe, "far") == local_losses
    whole = {name for name, _ in remote.gets if name.startswith("train") and name.endswith(".tar")}
    assert whole == {f"train-00000{number}.tar" for number in range(3)}


def test_a_shard_that_is_refused_ends_the_run_with_a_sentence(recipe, remote):
    remote.always["train-000001.tar"] = "403"

    done = train(recipe, remote.url, "refused")

    assert done.returncode == 2
    assert "train-000001.tar: refused with HTTP status 403" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_end_of_the_prefetcher_does_not_end_the_run(recipe, remote):
    remote.faults["train-000002.tar"] = ["429 3"]  # the prefetcher still has something to do
    process = subprocess.Popen(
        command_of(recipe, remote.url, "killed"), stderr=subprocess.PIPE, text=True
    )
    killed = []
    while process.poll() is None and not killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                if "spawn_main" in " ".join(child.cmdline()) and remote.gets:
                    child.send_signal(signal.SIGKILL)
                    killed.append(child.pid)
        time.sleep(0.01)
    _, told = process.communicate(timeout=200)

    assert killed
    assert process.returncode == 0, told
    assert len(losses(recipe, "killed")) == 6


@pytest.fixture
def bucket(tiny_shards, monkeypatch):
    """The tiny shards in an S3 bucket on this machine."""
    moto = pytest.importorskip("moto.server")
    import s3fs

    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    name = f"shards-{time.time_ns()}"  # the server remembers the buckets of another test
    files.mkdir(name)
    files.put(f"{tiny_shards}/", f"{name}/tiny/", recursive=True)
    yield f"s3://{name}/tiny"
    server.stop()


def test_an_s3_bucket_is_trained_on_like_a_folder(recipe, bucket, local_losses):
    far = train(recipe, bucket, "far")

    assert far.returncode == 0, far.stderr
    assert losses(recipe, "far") == local_losses


@pytest.mark.usefixtures("bucket")
def test_what_is_not_in_a_bucket_is_one_sentence(run_cli, recipe):
    absent = run_cli("train", recipe, "--data", "s3://nowhere/tiny", "--device", "cpu")

    assert absent.exit_code == 2
    assert "it is not a packed data set" in absent.stderr
