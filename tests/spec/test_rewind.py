"""The reference's rewind against fresh runs."""

from __future__ import annotations

import pytest
from rewinding import check_random_walk, check_speculation, layouts

from skv_export.errors import SkvError
from skv_export.spec.layout import CacheLayout
from skv_export.spec.reference import append, rewind

LAYOUTS = layouts()


def rewind_with_longest(layout: CacheLayout, block: object, length: int, longest: int, new_length: int) -> None:
    rewind(layout, block, length, new_length, longest)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_random_walk_is_a_fresh_run(name: str) -> None:
    for seed in range(2):
        check_random_walk(LAYOUTS[name], append, rewind_with_longest, seed)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "recent 17" not in name])
def test_speculative_decoding_is_a_fresh_run(name: str) -> None:
    check_speculation(LAYOUTS[name], append, rewind_with_longest, 0)


def test_without_the_longest_length_overwritten_rows_would_be_read() -> None:
    """The walk must be able to fail: each rewind believing that it is the first reads rows of later tokens."""
    failed = 0
    for name in ("K16 channel 16 window 0 sinks 0 recent 16", "V4 token 16 window 70 sinks 4 recent 32"):
        for seed in range(5):
            try:
                check_random_walk(LAYOUTS[name], append, lambda x, b, n, _, to: rewind(x, b, n, to), seed)
            except (AssertionError, SkvError):
                failed += 1
    assert failed > 3


def test_a_longest_length_below_the_length_is_refused() -> None:
    import numpy as np

    layout = LAYOUTS["K4 token 16 window 0 sinks 4 recent 32"]
    block = np.zeros((1, layout.block_bytes(200)), np.uint8)
    with pytest.raises(SkvError, match="longest length; got 99; expected at least the length, 100"):
        rewind(layout, block, 100, 90, 99)
