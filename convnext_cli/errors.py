"""Everything that a user can get wrong, as a tree.

```
UserError              2   what, where, found value; a hint that works
|- RecipeError         2   a recipe file, a key or a value in it
|- PlanError           2   numbers that do not fit together (batch, devices, steps)
|- DeviceError         2   a device or precision that this machine does not have
|- DataError           2   a data set, a shard or an image
|- CheckpointError     2   a checkpoint or weight file
|- RunError            2   a run directory
|- LaunchError         2   a launcher is not there, or refuses
|- StorageError        2   a place that cannot be written to
|  `- WriteError      74   the system refused a write: no space, no permission
|- Diverged           71   gradients or outputs are not finite
|- Stopped            75   a signal came; a checkpoint is written; run the same command again
`- Hung               76   a process is lost or stands still; run the same command again
   `- LostRank        76   another rank is lost, which says why by itself
```

Anything else that escapes is a bug: its traceback stays, exit code 1.
"""

import errno
import shlex
from pathlib import Path
from typing import ClassVar

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Of an `OSError`: no space is left, or none of this user's."""

HINT_NOTE = "hint: "
"""What a hint begins with in a traceback."""


class UserError(Exception):
    """A mistake that the user can mend; shown as one sentence and a hint, without a traceback.

    Args:
        message: What is wrong, where (file, key), and the value that was found.
        hint: One command or one edit that works.
    """

    exit_code: ClassVar[int] = 2
    of_one_rank: ClassVar[bool] = False
    """Whether a rank may meet it alone, and so tells it; what all meet alike rank 0 tells."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if hint is not None:  # a traceback has it too: all that comes of a loader's process
            self.add_note(f"{HINT_NOTE}{hint}")


def quote_path(path: str | Path) -> str:
    """A path or address as a shell takes it: every one in a command that is printed."""
    return shlex.quote(str(path))


class RecipeError(UserError):
    """A recipe cannot be found, read or accepted."""


class PlanError(UserError):
    """A recipe and a cluster do not fit together."""


class DeviceError(UserError):
    """A device, a number of devices or a precision is not there, or there is no room."""

    of_one_rank = True


class DataError(UserError):
    """A data set, a shard, a label or an image cannot be used."""

    of_one_rank = True


class CheckpointError(UserError):
    """A checkpoint or weight file cannot be read, trusted or matched to the model."""

    of_one_rank = True


class RunError(UserError):
    """A run directory is missing, incomplete or belongs to another run."""


class LaunchError(UserError):
    """Processes cannot be started elsewhere: no scheduler, or it refuses."""


class StorageError(UserError):
    """A destination cannot be written: it holds something else, or is no folder."""

    of_one_rank = True


class WriteError(StorageError):
    """The system refused a write: no space, no permission, no disk."""

    exit_code = 74


class Diverged(UserError):
    """The model gives outputs that are not finite, or gradients, again and again."""

    exit_code = 71


class Stopped(UserError):
    """A signal stopped the run after a checkpoint was written; the same command goes on."""

    exit_code = 75


class Hung(UserError):
    """Another process is lost, or this one stands still; the same command goes on."""

    exit_code = 76
    of_one_rank = True


class LostRank(Hung):
    """Another rank is lost; those that are left end with it."""

    of_one_rank = False
