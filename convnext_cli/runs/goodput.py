"""How much of a run's time survived: goodput over all attempts, and what interruptions cost.

```
goodput = time of the steps that are part of the final run / time from the first start to the end
```

What is not goodput: starts (loading, compiling), validation and saving, steps that were taken
again, and the waits between attempts. Read from `events.jsonl` and `metrics.jsonl` alone.
"""

import statistics
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from convnext_cli.errors import RunError, quote_path
from convnext_cli.runs.compare import ENDS, STARTS, last_step, number, time_of
from convnext_cli.runs.layout import RunDir
from convnext_cli.runs.record import read_json, read_jsonl

_FEW_ROWS = 3
"""Below so many, the first one's compilation would stand for a speed."""


@dataclass(frozen=True)
class Attempt:
    """One process, or set of ranks, from its start to its end."""

    first_step: int
    last_step: int
    """The last one that is known of it."""
    seconds: float
    """Wall time, as far as it is known of one that was killed."""
    start_seconds: float
    """Until the first step could be taken."""
    lost_steps: int
    """Taken again by the next attempt; at least, in steps of the log's interval."""
    waited_seconds: float
    """From its end to the start of the next one."""
    ended: str
    """finished, running, killed, or what stopped it."""


@dataclass(frozen=True)
class Goodput:
    """The times of a run."""

    attempts: tuple[Attempt, ...]
    wall_seconds: float
    """From the first start to the last sign of life."""
    step_seconds: float
    """Mean time of a step that is kept: of the medians between changes of speed."""
    kept_steps: int
    lost_steps: int
    goodput: float
    """Share of the wall time in steps that survive."""


def measure_goodput(run: RunDir) -> Goodput:
    """Read the times of a run.

    Raises:
        RunError: A file of the run cannot be read, or the run has not started.
    """
    events, rows = (  # those of another hand may lack their time
        [row for row in read_jsonl(path) if time_of(row)] for path in (run.events, run.metrics)
    )
    starts = [place for place, event in enumerate(events) if event.get("event") in STARTS]
    if not starts:
        raise RunError(
            f"{run.root} has no times: no start is written in {run.events}",
            hint=f"see how far it is: convnext runs show {quote_path(run.root)}",
        )
    parts = [events[a:b] for a, b in zip(starts, [*starts[1:], len(events)], strict=True)]
    attempts, kept = [], last_step(run)
    step_seconds = _measure_step(
        rows, read_json(run.plan), begins=[_whole(part[0], "step") for part in parts], kept=kept
    )
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        times = [_time(event) for event in part]
        if following is None and rows:
            times.append(_time(rows[-1]))
        last, lost = kept, 0
        if following:
            last = max(_whole(event, "step") for event in part)
            # the rows know of one that was killed, the events of one that went back
            lost = max(_whole(following[0], "lost_steps"), last - _whole(following[0], "step"))
        attempts.append(
            Attempt(
                first_step=_whole(part[0], "step"),
                last_step=last,
                seconds=_lasted(times),
                start_seconds=next(
                    (_lasted([times[0], _time(e)]) for e in part if e.get("event") == "ready"), 0.0
                ),
                lost_steps=lost,
                waited_seconds=_lasted([times[-1], _time(following[0])]) if following else 0.0,
                ended=_end(part, last=following is None),
            )
        )
    wall = sum(attempt.seconds + attempt.waited_seconds for attempt in attempts)
    return Goodput(
        attempts=tuple(attempts),
        wall_seconds=wall,
        step_seconds=step_seconds,
        kept_steps=kept,
        lost_steps=sum(attempt.lost_steps for attempt in attempts),
        goodput=min(1.0, kept * step_seconds / wall) if wall else 0.0,
    )


def _measure_step(
    rows: list[dict[str, object]], plan: dict[str, object], *, begins: list[int], kept: int
) -> float:
    """The mean time of the steps that are kept, in seconds; 0 where no row has a speed.

    A speed changes where an attempt has other devices, and where images grow. The median leaves out
    rows in which something was compiled or saved.
    """
    rates = [
        (_whole(row, "step"), rate)
        for row in rows
        if (rate := number(row, "speed/images_per_second"))
    ]
    images, sizes = plan.get("global_images"), plan.get("train_sizes", [])
    if not (rates and kept and isinstance(images, int) and isinstance(sizes, list)):
        return 0.0
    cuts = sorted({0, kept, *begins, *(size["first_step"] for size in sizes)})
    cuts = [cut for cut in cuts if cut <= kept]
    seconds = 0.0
    for begin, end in pairwise(cuts):
        found = [rate for step, rate in rates if begin < step <= end]
        if len(found) < _FEW_ROWS:
            found = [rate for _, rate in rates]
        seconds += (end - begin) * images / statistics.median(found)
    return seconds / kept


def _end(part: list[dict[str, object]], *, last: bool) -> str:
    for event in reversed(part):
        if event.get("event") in ENDS:
            return str(event.get("why") or event["event"])
    return "running or killed" if last else "killed"


def _whole(row: dict[str, object], key: str) -> int:
    value = row.get(key, 0)
    return value if isinstance(value, int) else 0


def _lasted(times: list[float]) -> float:
    """Seconds from the first to the last; where the clock was set back, time stands still."""
    return sum(max(0.0, later - earlier) for earlier, later in pairwise(times))


def _time(row: dict[str, object]) -> float:
    return datetime.fromisoformat(str(row["time"])).timestamp()
