"""One node: software, GPUs, memory, limits, disks, and the job it is in."""

import os
import platform
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch
from packaging.version import Version

from convnext_cli.doctor.findings import Finding
from convnext_cli.errors import quote_path
from convnext_cli.plan.cluster import count_cpus, read_deadline, read_job
from convnext_cli.runs.record import output_of

_OLDEST_TORCH = Version("2.11")
_OPEN_FILES = 4096
_CHECKPOINTS_BYTES = 30_000_000_000
"""Five of ConvNeXt-XL with moments and averages."""
_SLOW_DISK = 100e6
"""Bytes a second: a checkpoint of ConvNeXt-XL then takes a minute."""
_WRITE_BYTES = 64 << 20
_BATCH_BYTES = 128 * 3 * 224 * 224
_WARM_CELSIUS = 85
_GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
)


def look_at_machine(*, runs_dir: Path, cache_dir: Path, workers: int) -> list[Finding]:
    """Everything about this node that needs no other one.

    Args:
        runs_dir: Where runs are written.
        cache_dir: Where shards from URLs are kept.
        workers: Loader processes a device.
    """
    cuda = torch.cuda.is_available()
    devices = torch.cuda.device_count() if cuda else 1
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    gpus = output_of("nvidia-smi", query, "--format=csv,noheader,nounits")
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return [
        judge_software(torch.__version__),
        *judge_gpus(gpus, torch_sees=torch.cuda.device_count() if cuda else 0),
        *([_look_at_cuda()] if cuda else []),
        *judge_links(output_of("nvidia-smi", "topo", "-m"), gpus=devices if cuda else 0),
        judge_processor(cores=count_cpus(), devices=devices, environ=os.environ),
        judge_memory(psutil.virtual_memory().available, devices=devices),
        judge_shared_memory(shm, devices=devices, workers=workers),
        judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        look_at_disk("run directory", runs_dir, needed_bytes=_CHECKPOINTS_BYTES),
        look_at_disk("cache directory", cache_dir, needed_bytes=_CHECKPOINTS_BYTES),
        judge_job(os.environ, now=time.time(), has_slurm=shutil.which("sbatch") is not None),
    ]


def judge_software(torch_version: str) -> Finding:
    """Python and torch."""
    found = f"Python {platform.python_version()}, torch {torch_version}"
    if Version(torch_version) < _OLDEST_TORCH:
        advice = f"pip install 'torch>={_OLDEST_TORCH}'"
        return Finding("software", "problem", f"{found}: too old", advice)
    return Finding("software", "ok", found)


def judge_gpus(table: str | None, *, torch_sees: int) -> list[Finding]:
    """What nvidia-smi lists, against what torch can use.

    Args:
        table: CSV of nvidia-smi; None: it is not there, or fails.
        torch_sees: GPUs that torch finds.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in (table or "").splitlines()]
    rows = [row for row in rows if len(row) == len(_GPU_FIELDS)]
    if not rows and not torch_sees:
        advice = "for more than a trial, use a machine with an NVIDIA GPU"
        return [Finding("GPUs", "warning", "none: training runs on the CPU", advice)]
    if not torch_sees:
        found = f"nvidia-smi lists {len(rows)}, but torch finds none"
        built = torch.version.cuda or "no CUDA"
        advice = f"this torch is built for {built}: update the driver, or install another torch"
        return [Finding("GPUs", "problem", found, advice)]
    if not rows:
        return [Finding("GPUs", "ok", f"{torch_sees}, and no nvidia-smi to say more")]
    findings = [
        Finding(
            "GPUs", "ok", f"{torch_sees} of {len(rows)} in use: {rows[0][0]}, driver {rows[0][1]}"
        )
    ]
    for number, (_, _, total, used, celsius, errors) in enumerate(rows):
        if errors.isdigit() and int(errors):
            found = f"GPU {number} counts {errors} memory errors that were not corrected"
            advice = f"reset it before a long run, or leave it out: nvidia-smi -q -i {number}"
            findings.append(Finding("GPUs", "problem", found, advice))
        if used.isdigit() and total.isdigit() and int(used) > 0.05 * int(total):
            found = f"GPU {number}: {int(used):,} of {int(total):,} MiB are taken already"
            advice = f"see who uses it: nvidia-smi -i {number}"
            findings.append(Finding("GPUs", "warning", found, advice))
        if celsius.isdigit() and int(celsius) >= _WARM_CELSIUS:
            found = f"GPU {number} is at {celsius} degrees Celsius and will slow down"
            findings.append(Finding("GPUs", "warning", found, "check the cooling of the node"))
    return findings


def _look_at_cuda() -> Finding:
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    found = f"CUDA {torch.version.cuda}, cuDNN {cudnn}, NCCL {nccl}"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding("CUDA", "warning", f"{found}, no bf16", "train with --precision fp16")
    return Finding("CUDA", "ok", f"{found}, bf16")


def judge_links(matrix: str | None, *, gpus: int) -> list[Finding]:
    """How the GPUs of a node are joined, by nvidia-smi's matrix."""
    if gpus < 2 or matrix is None:
        return []
    plain = re.sub(r"\x1b\[[0-9;]*m", "", matrix)
    rows = [line.split() for line in plain.splitlines() if re.match(r"GPU\d+\s", line)]
    kinds = {cell for row in rows for cell in row[1 : 1 + len(rows)] if cell != "X"}
    found = f"GPUs are joined by {', '.join(sorted(kinds))}"
    if "SYS" in kinds:
        advice = "data between some GPUs crosses the processors: export NCCL_P2P_LEVEL=SYS may help"
        return [Finding("links", "warning", found, advice)]
    return [Finding("links", "ok", found)]


def judge_processor(*, cores: int, devices: int, environ: Mapping[str, str]) -> Finding:
    """Cores for each device, and threads."""
    # A list, such as 4,2, says it for each level of nested regions.
    threads = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    found = f"{cores} cores that may be used, {cores / devices:.0f} a device"
    if threads.isdigit() and devices * int(threads) > cores:
        return Finding(
            "processor",
            "warning",
            f"{found}, OMP_NUM_THREADS={threads}",
            "export OMP_NUM_THREADS=1",
        )
    if devices > 1 and cores < 4 * devices:
        return Finding(
            "processor",
            "warning",
            found,
            "ask for more cores: convnext plan says how many the GPUs need",
        )
    return Finding("processor", "ok", found)


def judge_memory(available: int, *, devices: int) -> Finding:
    """Memory of the host: a copy of the state to write, and the loader processes."""
    found = f"{available / 1e9:.0f} GB of memory are free"
    if available < 4e9 * devices:
        return Finding("memory", "warning", found, "ask for 8 GB a device, or use data.workers=2")
    return Finding("memory", "ok", found)


def judge_shared_memory(free: int, *, devices: int, workers: int) -> Finding:
    """Room for the batches that loader processes hand over."""
    batches = 2 * workers + 4  # as data/reader.py makes them
    needed = devices * batches * _BATCH_BYTES
    found = f"{free / 1e9:.1f} GB are free in /dev/shm"
    if free < needed:
        advice = (
            f"{needed / 1e9:.1f} GB are needed for {batches} batches of 128 images at 224 px a"
            " device: docker run --shm-size=16g, or fewer data.workers"
        )
        return Finding("shared memory", "problem", found, advice)
    return Finding("shared memory", "ok", found)


def judge_open_files(soft: int, hard: int) -> Finding:
    """The limit of open files: shards, sockets and loader processes take some each."""
    endless = resource.RLIM_INFINITY
    found = "no limit" if soft == endless else f"at most {soft:,}"
    if soft != endless and soft < _OPEN_FILES:
        advice = "ulimit -n 65536" if hard == endless else f"ulimit -n {hard}"
        if hard != endless and hard < _OPEN_FILES:
            advice = "raise nofile in /etc/security/limits.conf"
        return Finding("open files", "warning", found, advice)
    return Finding("open files", "ok", found)


def look_at_disk(topic: str, folder: Path, *, needed_bytes: int) -> Finding:
    """Free space of a folder, or of the nearest one above it, and how fast it takes 64 MB."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".convnext-doctor-") as file:
            block = os.urandom(1 << 20)
            started = time.perf_counter()
            for _ in range(_WRITE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = _WRITE_BYTES / (time.perf_counter() - started)
    except OSError as error:
        found = f"{there} cannot be written: {error.strerror}"
        place = quote_path(there)
        return Finding(topic, "problem", found, f"choose another: ls -ld {place}; df -h {place}")
    free = shutil.disk_usage(there).free
    return judge_disk(topic, there, free=free, needed_bytes=needed_bytes, bytes_per_second=rate)


def judge_disk(
    topic: str, folder: Path, *, free: int, needed_bytes: int, bytes_per_second: float
) -> Finding:
    """Space and speed of a folder."""
    found = f"{folder}: {free / 1e9:.0f} GB are free, {bytes_per_second / 1e6:.0f} MB/s written"
    if free < needed_bytes:
        advice = f"make room on it: large models want {needed_bytes / 1e9:.0f} GB"
        return Finding(topic, "warning", found, advice)
    if bytes_per_second < _SLOW_DISK:
        return Finding(topic, "warning", found, "use a faster disk, or a longer checkpoint.every")
    return Finding(topic, "ok", found)


def judge_job(environ: Mapping[str, str], *, now: float, has_slurm: bool) -> Finding:
    """The Slurm job, and the time that it has left."""
    job = read_job(environ)
    if job is None:
        there = "not in a job" if has_slurm else "not there; convnext launch local starts runs here"
        return Finding("Slurm", "ok", there)
    found = f"job {job} of {environ.get('SLURM_JOB_NUM_NODES', '1')} nodes"
    deadline = read_deadline(environ)
    if deadline is None:
        advice = "training cannot save before the job's end: export SLURM_JOB_END_TIME (Unix time)"
        return Finding("Slurm", "warning", f"{found}, its time limit is not known", advice)
    minutes = (deadline - now) / 60
    if minutes < 0:
        advice = "leave the shell of that job, or: unset ${!SLURM_*}"
        return Finding("Slurm", "warning", f"{found}, whose time limit is over", advice)
    if minutes < 10:
        advice = "ask for more time: sbatch --time=24:00:00"
        return Finding("Slurm", "warning", f"{found}, {minutes:.0f} minutes are left", advice)
    return Finding("Slurm", "ok", f"{found}, {minutes / 60:.1f} hours are left")


def judge_versions(by_rank: Sequence[tuple[str, str, float]]) -> list[Finding]:
    """Ranks against each other.

    Args:
        by_rank: Host, versions, and Unix time at the same moment.
    """
    versions = {versions: host for host, versions, _ in by_rank}
    times = [clock for _, _, clock in by_rank]
    findings = []
    if len(versions) > 1:
        found = "; ".join(f"{host} has {version}" for version, host in versions.items())
        advice = "install the same environment on every node"
        findings.append(Finding("versions", "problem", found, advice))
    if max(times) - min(times) > 2.0:
        found = f"the clocks of the nodes differ by {max(times) - min(times):.0f} s"
        findings.append(Finding("clocks", "warning", found, "start chrony or ntpd on every node"))
    return findings
