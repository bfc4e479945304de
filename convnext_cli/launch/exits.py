"""How the processes of a run ended, and whether the same command is run again.

```
0           done                                               final
2, 71, 74   a mistake, diverged, storage                       final
75, 76      stopped by a signal after saving, lost or hanging  again
no word     killed, alone or with its node; 128 + n in shells  again
other       a bug                                              final
```

A launcher knows one number for all of its processes, and that of the first that ended. So each
process leaves its own in a file (`runs/exit_code.py`). `slurm/multinode.sh` has the same rule.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

KILLED = 137
"""128 + SIGKILL: what a shell says of a process that left no word."""

_REASONS = (71, 74, 2, 75, 76)


def read_exit_codes(folder: Path) -> list[int]:
    """What the processes left; those that were killed left nothing."""
    texts = [path.read_text() for path in sorted(folder.iterdir())]
    return [int(text) for text in texts if text]


def choose_exit_code(codes: Sequence[int], *, num_ranks: int, launcher_code: int) -> int:
    """The exit code of the whole: the reason of whoever failed first.

    Args:
        codes: What the processes left.
        num_ranks: How many processes there were.
        launcher_code: What the launcher itself ended with.
    """
    for reason in _REASONS:
        if reason in codes:
            return reason
    if launcher_code and len(codes) < num_ranks:
        return KILLED  # the others failed for want of the one that left no word
    return max(codes, default=launcher_code)


def is_worth_another(code: int) -> bool:
    """Whether the same command may go on where this exit code left it."""
    return code in {75, 76} or code > 128  # the shell's word for a signal


def repeat(
    attempt: Callable[[], int],
    *,
    newest_step: Callable[[], int],
    restarts: int,
    say: Callable[[str], None],
) -> int:
    """Run attempts until one ends for good, or `restarts` in a row brought no new checkpoint.

    Returns:
        The exit code of the last attempt.
    """
    stalls = 0
    while True:
        before = newest_step()
        code = attempt()
        if not is_worth_another(code):
            return code
        step = newest_step()
        stalls = 0 if step > before else stalls + 1
        if stalls > restarts:
            say(f"exit code {code}; {stalls} attempts in a row ended at step {step}: giving up")
            return code
        say(f"exit code {code} at step {step}: starting again")
