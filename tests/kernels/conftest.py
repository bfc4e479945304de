"""Device code in Triton's interpreter, which takes kernels that were defined under its variable."""

import pytest
import triton


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not triton.knobs.runtime.interpret:
        skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 from the start: make test")
        for item in items:
            if "/tests/kernels/" in str(item.path):
                item.add_marker(skip)
