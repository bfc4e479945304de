"""`slurm/multinode.sh` with its variables filled in, and sbatch.

A job file is the head that sbatch reads, the variables, and then the script as it is shipped: what
happens on the nodes is written once.
"""

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from convnext_cli.errors import LaunchError
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import writing_to


@dataclass(frozen=True)
class SlurmJob:
    """What is asked of Slurm, and what runs there."""

    recipe: str
    name: str
    folder: Path
    """Where `convnext train` runs; relative paths start here."""
    runs_dir: Path = Path("runs")
    extra: tuple[str, ...] = ()
    """More arguments of `convnext train`."""
    data: str | None = None
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_gpu: int = 12
    hours_minutes_seconds: str = "24:00:00"
    sbatch_options: tuple[str, ...] = ()
    """More options of sbatch, such as `--partition=gpu`."""
    venv: Path | None = None
    container: str | None = None
    mounts: str | None = None
    cache: str | None = None
    restarts: int = 3

    @property
    def file(self) -> Path:
        """Where the job file lies: beside the run that it makes."""
        return RunDir(self.runs_dir / self.name).launch / "job.sh"


def slurm_folder() -> Path:
    """The folder of the shipped scripts: inside the wheel, or beside the package."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "_slurm"
    return shipped if shipped.is_dir() else package.parent / "slurm"


def _read_script(job: SlurmJob) -> tuple[str, list[str], str]:
    """The first line of the shipped script, the options of sbatch of a job, and the rest."""
    script = (slurm_folder() / "multinode.sh").read_text(encoding="utf-8")
    shebang, _, rest = script.partition("\n")
    shipped = re.match(r"(#SBATCH .*\n)+", rest)
    assert shipped is not None
    asked = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.gpus_per_node}",
        f"--gpus-per-node={job.gpus_per_node}",
        f"--cpus-per-task={job.cpus_per_gpu}",
        f"--time={job.hours_minutes_seconds}",
        f"--chdir={job.folder}",
        f"--output={job.file.parent / 'job-%j.log'}",
    ]
    names = tuple(option.partition("=")[0] for option in asked)
    kept = [line.removeprefix("#SBATCH ") for line in shipped[0].splitlines()]
    options = [*asked, *(line for line in kept if not line.startswith(names)), *job.sbatch_options]
    return shebang, options, rest[shipped.end() :]


def render_job(job: SlurmJob) -> str:
    """The text of a job file; depends on the job and the shipped script alone."""
    shebang, options, body = _read_script(job)
    variables = {
        "RECIPE": job.recipe,
        "DATA": job.data,
        "NAME": job.name,
        "RUNS_DIR": str(job.runs_dir),
        "EXTRA": shlex.join(job.extra),
        "NODES": str(job.nodes),
        "GPUS": str(job.gpus_per_node),
        "VENV": None if job.venv is None else str(job.venv),
        "CONTAINER": job.container,
        "MOUNTS": job.mounts,
        "CACHE": job.cache,
        "RESTARTS": str(job.restarts),
    }
    lines = [
        shebang,
        *(f"#SBATCH {_quote(option)}" for option in options),
        "#",
        f"# Written by `convnext launch slurm`; by hand: sbatch {shlex.quote(str(job.file))}",
        *(f"export {name}={shlex.quote(value or '')}" for name, value in variables.items()),
    ]
    return "\n".join(lines) + "\n" + body


def _quote(option: str) -> str:
    """An option as sbatch reads it from a file: quotes around a value that is not plain."""
    name, _, value = option.partition("=")
    if shlex.quote(value) == value or not value:
        return option
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"'


def _split(option: str) -> list[str]:
    """An option as sbatch takes it from a shell: a value after a space is a word of its own."""
    return [option] if "=" in option.partition(" ")[0] else option.split(maxsplit=1)


def find_sbatch() -> str:
    """The path of sbatch.

    Raises:
        LaunchError: There is none.
    """
    path = shutil.which("sbatch")
    if path is None:
        raise LaunchError(
            "there is no sbatch on this machine",
            hint="run this on a login node of the cluster, or see the job file with --dry-run",
        )
    return path


def submit(job: SlurmJob) -> str:
    """Write the job file and hand it to sbatch; returns the job's number.

    Raises:
        LaunchError: There is no sbatch, or it refused the job.
        StorageError: The job file cannot be written.
    """
    sbatch = find_sbatch()
    with writing_to(job.file):
        job.file.parent.mkdir(parents=True, exist_ok=True)
        job.file.write_text(render_job(job), encoding="utf-8")
    # Also here, for SBATCH_PARTITION and its like in the environment go before those in a file.
    _, options, _ = _read_script(job)
    words = [word for option in options for word in _split(option)]
    done = subprocess.run(
        [sbatch, "--parsable", *words, str(job.file)],
        cwd=job.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        why = " ".join(done.stderr.split()).rstrip(".") or "no reason given"
        raise LaunchError(
            f"sbatch refused {job.file} with exit code {done.returncode}: {why}",
            hint="sinfo shows partitions and limits; other options of sbatch go in with --sbatch",
        )
    return done.stdout.strip().partition(";")[0]  # NUMBER;CLUSTER where clusters are federated
