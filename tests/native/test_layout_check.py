"""Which layouts are legal: native/layout_check.h and spec/layout.py agree, and kernels have room for all that are."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import native
import pytest

from skv_export.errors import SkvError
from skv_export.native.library import SkvLayout
from skv_export.spec.conformance import Case
from skv_export.spec.layout import MAX_WINDOW, CacheLayout
from skv_export.spec.recipe import GRANULARITIES, MAX_HEAD_DIM, MAX_KEPT_TOKENS, RECENT_TYPES, ROTATIONS, LayerConfig

LEGAL = CacheLayout.pair(LayerConfig(), 64)[0]
NAMES = {"granularity": GRANULARITIES, "rotation": ROTATIONS, "recent_type": RECENT_TYPES}
RANGES = {"num_sink_tokens": MAX_KEPT_TOKENS, "recent_tokens": MAX_KEPT_TOKENS, "local_window_size": MAX_WINDOW}


def candidates() -> Iterator[dict[str, Any]]:
    """Changes to a legal layout, in numbers as the header sees them: around every limit, and all group sizes."""
    for field in ("bits", "tile_tokens", "head_dim"):
        yield from ({field: value, "group_size": 32} for value in range(-1, 200))
    for granularity, bits in itertools.product(range(-1, 5), range(-1, 20)):
        yield {"granularity": granularity, "parameter_bits": bits}
    for field in ("rotation", "recent_type"):
        yield from ({field: value} for value in range(-1, 5))
    for field, most in RANGES.items():
        yield from ({field: value} for value in (-1, 0, 1, most - 1, most, most + 1))
    for head_dim in (1, 32, 64, 80, 96, 128, 160, 256, 320, 512, 1000, MAX_HEAD_DIM, MAX_HEAD_DIM + 1):
        yield from ({"head_dim": head_dim, "group_size": group} for group in range(-1, 1100))


def accepted_by_python(changes: dict[str, Any]) -> bool:
    names = {
        field: NAMES[field][v] if 0 <= v < len(NAMES[field]) else v for field, v in changes.items() if field in NAMES
    }
    try:
        dataclasses.replace(LEGAL, **changes | names)
    except SkvError:
        return False
    return True


def accepted_by_the_library(changes: dict[str, Any]) -> bool:
    layout, out = SkvLayout.of(LEGAL), (ctypes.c_int64 * 6)()
    for field, value in changes.items():
        setattr(layout, field, value)
    return native.library().skv_layout_sizes(ctypes.byref(layout), 1 << 20, 0, out) == 0


def test_python_and_the_header_take_the_same_layouts() -> None:
    found = {True: 0, False: 0}
    for changes in candidates():
        legal = accepted_by_python(changes)
        assert accepted_by_the_library(changes) == legal, changes
        found[legal] += 1
    assert found[True] > 100 and found[False] > 10_000


@pytest.mark.parametrize("granularity", ["token", "token_channel"])
@pytest.mark.parametrize("head_dim", [256, MAX_HEAD_DIM])
def test_kernels_have_room_for_the_most_groups(head_dim: int, granularity: str) -> None:
    config = LayerConfig(
        k_granularity=granularity, v_granularity=granularity, k_group_size=32, v_group_size=32, tile_tokens=32
    )
    case = Case("the most groups", config, head_dim=head_dim, past_lengths=(150,), num_heads=8, kv_num_heads=2)
    native.assert_attention_is_the_references(case)


@pytest.mark.parametrize("group", [1, 8, 16])
def test_a_group_below_the_smallest_is_refused(group: int) -> None:
    """The attention kernels keep one number per group, for groups of 32 channels or more."""
    with pytest.raises(SkvError, match=f"key cache: padded head_dim 256 .*; got {group}; expected 32 or 64 or"):
        dataclasses.replace(LEGAL, head_dim=256, granularity="token", group_size=group)
    assert not accepted_by_the_library({"head_dim": 256, "granularity": 1, "group_size": group})
    assert b"a multiple of 32" in native.library().skv_last_error()
