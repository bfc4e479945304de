"""`convnext doctor`: look at the machines before a run spends them."""

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from convnext_cli.cli._console import console, print_json
from convnext_cli.cli._inputs import DataOption, JsonOption, RunsDirOption
from convnext_cli.doctor.findings import Finding, find_worst, merge_hosts
from convnext_cli.plan.cluster import read_local_rank, read_rank, read_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    *,
    data: DataOption = None,
    images: Annotated[int, typer.Option(help="Images that are read of each split.", min=1)] = 200,
    runs_dir: RunsDirOption = Path("runs"),
    cache_dir: Annotated[
        Path | None, typer.Option(help="Same as data.cache_dir (default: the user's cache).")
    ] = None,
    workers: Annotated[int, typer.Option(help="Loader processes a device.", min=0)] = 8,
    json_output: JsonOption = False,
) -> None:
    """Check software, GPUs, memory, disks, the job, the network and the data; changes nothing.

    Started on every node as training is (srun convnext doctor), it measures the network between
    them as well. Exit code 2 where something has to be mended first.

    Example: convnext doctor --data /data/imagenet
    """
    from convnext_cli.data.fetch import default_cache_dir
    from convnext_cli.doctor.machine import look_at_machine
    from convnext_cli.doctor.traffic import read_shards

    shape = read_shape()
    ranks = 1 if shape is None else shape[0] * shape[1]
    local_rank = read_local_rank()
    cache = (cache_dir or default_cache_dir()).expanduser()

    def look() -> list[Finding]:
        if local_rank != 0:
            return []  # every node's first process looks; the others have nothing to say
        found = look_at_machine(runs_dir=runs_dir, cache_dir=cache, workers=workers)
        if data is not None:
            found += read_shards(data, cache_dir=cache, images=images)
        return found

    if ranks > 1:
        findings = _look_together(look, local_rank=local_rank)
    else:
        advice = "over all nodes of a job: srun convnext doctor"
        findings = [
            *look(),
            Finding("all-reduce", "ok", f"not measured with one process ({advice})"),
        ]
    worst = find_worst(findings)
    if read_rank() == 0:
        _show(findings, json_output=json_output)
    if worst == "problem":
        raise typer.Exit(2)


def _look_together(look: Callable[[], list[Finding]], *, local_rank: int) -> list[Finding]:
    """What all ranks found, the same list on each; this one's where they do not come together."""
    from convnext_cli.doctor.traffic import join_ranks, make_unreached

    own: list[Finding] | None = None
    try:
        group = join_ranks(local_rank=local_rank)
        own = look()
        return _compare(own, group=group)
    except RuntimeError as error:  # of torch's networks, each of its own kind
        return [*(look() if own is None else own), make_unreached(error)]


def _compare(own: list[Finding], *, group: "ProcessGroup") -> list[Finding]:
    import torch
    from torch import distributed

    from convnext_cli.doctor.machine import judge_versions
    from convnext_cli.doctor.traffic import measure_all_reduce

    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    parts: list[tuple[str, list[Finding], str, float]] = [("", [], "", 0.0)] * (
        distributed.get_world_size()
    )
    distributed.barrier(group=group)
    distributed.all_gather_object(parts, (platform.node(), own, versions, time.time()), group=group)
    by_node = [(host, findings) for host, findings, _, _ in parts if findings]
    findings = merge_hosts(by_node)
    findings += judge_versions([(host, versions, clock) for host, _, versions, clock in parts])
    findings.append(measure_all_reduce())
    distributed.destroy_process_group()
    return findings


def _show(findings: list[Finding], *, json_output: bool) -> None:
    if json_output:
        rows = [
            {
                "number": number,
                "topic": finding.topic,
                "level": finding.level,
                "found": finding.found,
                "advice": finding.advice or None,
                "hosts": list(finding.hosts) or None,
            }
            for number, finding in enumerate(findings, start=1)
        ]
        print_json({"worst": find_worst(findings), "findings": rows})
        return
    for number, finding in enumerate(findings, start=1):
        where = f" ({', '.join(finding.hosts)})" if finding.hosts else ""
        console.print(
            Text.assemble(
                f"{number:2} ",
                (f"{finding.level:8}", _STYLES[finding.level]),
                f"{finding.topic}: {finding.found}{where}",
            ),
            soft_wrap=True,
        )
        if finding.advice:
            console.print(Text(f"{'':11} -> {finding.advice}"), soft_wrap=True)
    counts = {level: sum(f.level == level for f in findings) for level in _STYLES}
    console.print(
        f"\n{counts['problem']} problems, {counts['warning']} warnings, {counts['ok']} in order"
    )
