"""The kernels' tests run once for each instruction set of this processor, all in one process."""

from __future__ import annotations

from collections.abc import Iterator

import native
import pytest


@pytest.fixture(scope="module", params=native.instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels of one instruction set."""
    with native.instruction_set(request.param) as chosen:
        assert chosen == request.param
        yield
