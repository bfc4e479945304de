"""Numbers that come from the device while it goes on: nobody waits for what is still under way.

```
step n          the device is told to copy a number to pinned memory of the host
step n + LAG    the host reads it; the device is done with step n, or the host is far enough ahead
```
"""

import torch
from torch import Tensor

LAG_STEPS = 2
"""Steps that the host may be ahead of the device: enough for it never to be late with the next one,
and few enough that the batches under way take little memory."""


class Later:
    """A tensor on its way to the host.

    Args:
        value: Of any device and shape; on a CPU it is there at once.
    """

    def __init__(self, value: Tensor) -> None:
        self.lag_steps = LAG_STEPS if value.is_cuda else 0
        """How many steps later it is read."""
        # to pinned memory, as always where a copy from a GPU is not waited for
        self._host = value.detach().to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if value.is_cuda:
            # one that lets the processor do something else, such as load images
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> Tensor:
        """The value, on the host; waits for the step that it comes from."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._host
