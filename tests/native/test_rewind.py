"""skv_append and skv_rewind in any order against fresh runs, and the lengths that skv_rewind refuses."""

from __future__ import annotations

import native
import numpy as np
import pytest
import rewinding

from skv_export.spec.layout import CacheLayout

pytestmark = pytest.mark.usefixtures("isa")

LAYOUTS = rewinding.layouts()
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def append(layout: CacheLayout, block: np.ndarray, past: int, x: np.ndarray) -> None:
    native.append(layout, block, past, x, [x.shape[1]])


def rewind(layout: CacheLayout, block: np.ndarray, length: int, longest: int, new_length: int) -> None:
    native.rewind(layout, block, length, new_length, longest)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rewind_in_any_order_is_a_fresh_run(name: str) -> None:
    rewinding.check_random_walk(LAYOUTS[name], append, rewind, 0)
    rewinding.check_speculation(LAYOUTS[name], append, rewind, 1)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize(
    ("length", "longest", "new_length"),
    [(INT64_MIN, 100, 0), (100, 99, 90), (100, INT64_MAX, 90), (100, 100, INT64_MIN), (100, 100, INT64_MAX)],
)
def test_rewind_of_lengths_that_cannot_be_is_refused(length: int, longest: int, new_length: int, window: int) -> None:
    layout = LAYOUTS[f"V4 token 16 window {window} sinks 4 recent 32"]
    block = np.full((2, layout.block_bytes(200)), 0xFF, np.uint8)
    with pytest.raises(native.NativeError, match=r"rewind.*got.*expected"):
        rewind(layout, block, length, longest, new_length)
    assert (block == 0xFF).all()
