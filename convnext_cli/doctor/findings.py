"""A finding: what was looked at, what is there, and what to do where that is not good."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["ok", "warning", "problem"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "problem")
"""From the best to the worst."""


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    topic: str
    level: Level
    found: str
    advice: str = ""
    """One command or one edit; empty where all is well."""
    hosts: tuple[str, ...] = ()
    """The nodes that it is about; empty: all."""


def find_worst(findings: Iterable[Finding]) -> Level:
    """The worst level there is; ok where there is none."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def merge_hosts(by_host: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """One list of what the nodes found: what all found alike once, the rest with its nodes."""
    merged: dict[Finding, list[str]] = {}
    for host, findings in by_host:
        for finding in findings:
            merged.setdefault(finding, []).append(host)
    topics = list(dict.fromkeys(finding.topic for finding in merged))
    return [
        finding if len(hosts) == len(by_host) else replace(finding, hosts=tuple(hosts))
        for finding, hosts in sorted(merged.items(), key=lambda pair: topics.index(pair[0].topic))
    ]
