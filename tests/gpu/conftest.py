"""Each test on the GPU begins with nothing that an earlier one left in the process."""

import faulthandler
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _fresh_process() -> Iterator[None]:
    """No compiled graphs, of which a function has at most eight, and no timer that ends pytest."""
    import torch

    torch.compiler.reset()
    yield
    faulthandler.cancel_dump_traceback_later()
