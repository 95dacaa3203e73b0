"""Random calls of kernels.h, legal and not: a legal one succeeds, any other is refused with a reason before it writes,
and nothing outside the buffers is touched.

What a caller says of its memory is true here, as the kernels can't know better; all else may be anything. Runs in the
sanitizers' process too (test_sanitized.py). SKV_FUZZ_CALLS=100000 runs more of each seed; a seed that found something
is added to SEEDS.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Sequence

import native
import numpy as np
import pytest

from skv_export.native.library import SkvAttention, SkvCache, SkvLayout, SkvTokens

pytestmark = pytest.mark.usefixtures("isa")

SEEDS = (0, 1, 2)
CALLS = int(os.environ.get("SKV_FUZZ_CALLS", "400"))
INT32 = (-(2**31), -1, 0, 1, 2, 3, 8, 16, 31, 32, 33, 64, 96, 1024, 1025, 4096, 4097, 2**30, 2**31 - 1)
INT64 = (-(2**63), -(2**31), -1, 0, 1, 15, 16, 2**31, 2**40, 2**62, 2**63 - 1)
FLOATS = (float("nan"), float("inf"), -1.0, -0.0, 0.0, 1e-45, 3e38)
TYPE_BYTES = {0: 2, 1: 4, 2: 2}
LEGAL = {
    "head_dim": (1, 8, 20, 32, 64, 80, 128, 256, 512),
    "bits": (1, 2, 3, 4, 5, 6, 8, 16),
    "granularity": (0, 1, 2),
    "rotation": (0, 1),
    "group_size": (32, 64, 128),
    "num_sink_tokens": (0, 3, 4),
    "recent_tokens": (0, 16, 32),
    "tile_tokens": (32, 32, 64, 128),
    "recent_type": (0, 1, 2),
    "is_value": (0, 1),
    "local_window_size": (0, 0, 7, 70),
    "parameter_bits": (16,),
}
SHARED = ("head_dim", "num_sink_tokens", "recent_tokens", "tile_tokens", "recent_type", "local_window_size")
"""What keys and values have in common."""


def sizes(layout: SkvLayout) -> tuple[int, int, int]:
    """Bytes of a tile, bytes of all full-precision rows, and D; of anything small where the layout says nonsense."""
    dim = (layout.head_dim + 31) // 32 * 32
    small = all(0 <= getattr(layout, name) <= 5000 for name in LEGAL if name != "local_window_size")
    if not small or not layout.group_size or dim > 1024 or not layout.tile_tokens:
        return 64, 64, 32
    row = dim * TYPE_BYTES.get(layout.recent_type, 4)
    codes = layout.tile_tokens * (row if layout.bits == 16 else dim * layout.bits // 8)
    parameters = 2 * (dim // layout.group_size) * layout.tile_tokens + dim + 16 if layout.granularity else 4 * dim
    rows = layout.num_sink_tokens + layout.recent_tokens + layout.tile_tokens
    return codes + parameters, rows * row, dim


class Fuzzer:
    """Makes calls from a seed, and counts by function what became of them."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.outcomes: Counter[tuple[str, bool]] = Counter()
        self.buffers: list[native.Guarded] = []
        self.spoiled = False

    # What calls are made of.

    def pick(self, choices: Sequence[int] | Sequence[float]) -> int | float:
        return choices[int(self.rng.integers(len(choices)))]

    def maybe(self, chance: float) -> bool:
        """Whether to spoil something, or to do the unusual."""
        return bool(self.rng.random() < chance)

    def spoil(self, holder: ctypes.Structure, fields: Sequence[str], values: Sequence[int] | Sequence[float]) -> None:
        setattr(holder, str(self.rng.choice(fields)), self.pick(values))
        self.spoiled = True

    def layout(self) -> SkvLayout:
        layout = SkvLayout(**{name: int(self.pick(choices)) for name, choices in LEGAL.items()})
        dim = (layout.head_dim + 31) // 32 * 32
        layout.group_size = int(self.pick([g for g in LEGAL["group_size"] if dim % g == 0]))
        if layout.granularity == 0 and self.maybe(0.5):
            layout.parameter_bits = 8
        return layout

    def spoil_layout(self, layout: SkvLayout) -> None:
        """One field becomes anything; often the size of groups, of which kernels have room for so many."""
        if self.maybe(0.4):
            self.spoil(layout, ["group_size"], (1, 2, 4, 8, 16))
        else:
            self.spoil(layout, list(LEGAL), INT32)

    def buffer(self, size: int, dtype: type = np.uint8) -> native.Guarded:
        """Random bytes; as floats, numbers of which a few are not finite."""
        if dtype is np.uint8:
            data = self.rng.integers(0, 256, size, np.uint8)
        else:
            data = self.rng.standard_normal(size).astype(dtype)
            if size and self.maybe(0.2):
                data[self.rng.integers(0, size, 3)] = (np.nan, np.inf, -np.inf)
        self.buffers.append(native.Guarded(data))
        return self.buffers[-1]

    def lengths(self, values: Sequence[int]) -> native.Guarded:
        self.buffers.append(native.Guarded(np.array(values, np.int32)))
        return self.buffers[-1]

    def cache(self, layout: SkvLayout, blocks: int) -> tuple[SkvCache, int]:
        """A cache of so many blocks, and the tokens that one holds; any number beyond where that is without end."""
        tile, rows, _ = sizes(layout)
        tiles = int(self.rng.integers(0, 4))
        block = (tiles * tile + rows + 15) // 16 * 16
        cache = SkvCache(layout, self.buffer(blocks * block).pointer, block)
        held = layout.num_sink_tokens + layout.recent_tokens + layout.tile_tokens - 1 + tiles * layout.tile_tokens
        if layout.local_window_size and tiles >= -(-layout.local_window_size // max(1, layout.tile_tokens)) + 1:
            held += 300
        return cache, min(max(held, 0), 1000)

    # Calls.

    def run(self, name: str, *arguments: object) -> None:
        before = [buffer.array.copy() for buffer in self.buffers]
        status = getattr(native.library(), name)(*arguments)
        assert status in (0, 1, 2, 3)
        reason = native.library().skv_last_error().decode()
        for buffer, was in zip(self.buffers, before, strict=True):
            buffer.check()
            assert status in (0, 3) or np.array_equal(buffer.array.view(np.uint8), was.view(np.uint8)), (name, reason)
        if status:
            assert self.spoiled, (name, reason)
            assert "got" in reason and "expected" in reason, (name, reason)
        self.outcomes[name, status == 0] += 1

    def call(self, name: str) -> None:
        self.buffers, self.spoiled = [], False
        getattr(self, name)()

    def attention(self) -> None:
        key, value = self.layout(), self.layout()
        for field in SHARED:
            setattr(value, field, getattr(key, field))
        value.group_size = key.group_size
        key.is_value, value.is_value = 0, 1
        if self.maybe(0.25):
            self.spoil_layout(key if self.maybe(0.5) else value)
        batch, tokens, kv_heads, groups = (
            int(self.rng.integers(low, high)) for low, high in ((0, 3), (0, 12), (1, 3), (1, 4))
        )
        (keys, held), (values, held_too) = (self.cache(layout, batch * kv_heads) for layout in (key, value))
        held = min(held, held_too)
        dtype, dim = int(self.rng.integers(0, 2)), min(max(key.head_dim, 1), 1024)
        numbers = (np.float16, np.float32)[dtype]
        strides = [heads * dim + int(self.pick((0, 0, 5))) for heads in (kv_heads * groups, kv_heads, kv_heads)]
        call = SkvAttention(
            keys, values,
            *(SkvTokens(self.buffer(batch * tokens * stride, numbers).pointer, stride) for stride in strides),
            output=self.buffer(batch * tokens * kv_heads * groups * dim, numbers).pointer,
            type=dtype, batch=batch, tokens=tokens, num_heads=kv_heads * groups, kv_num_heads=kv_heads,
        )  # fmt: skip
        totals = [int(self.rng.integers(0, held + 1)) for _ in range(batch)]
        if self.maybe(0.5):
            call.query_seqlens = self.lengths([int(self.rng.integers(0, min(tokens, n) + 1)) for n in totals]).pointer
        if self.maybe(0.3):
            call.head_sink = self.buffer(kv_heads * groups, numbers).pointer
        if self.maybe(0.5):
            call.not_finite = self.lengths([7]).pointer
        if batch and self.maybe(0.1):
            totals[0] = int(self.pick(INT32))
            self.spoiled = True
        call.seqlens_k = self.lengths([max(n - 1, -(2**31)) for n in totals]).pointer
        if self.maybe(0.3):
            self.spoil_call(call)
        self.run(f"skv_{self.rng.choice(['attention', 'append'])}", ctypes.byref(call), None)

    def spoil_call(self, call: SkvAttention) -> None:
        """Changes one thing that says no more of the memory than is there."""
        match int(self.rng.integers(6)):
            case 0:
                self.spoil(call, ["type"], [n for n in INT32 if n not in (0, 1)])
            case 1:
                self.spoil(call, ["scale", "softcap"], FLOATS)
            case 2:
                self.spoil(call, ["batch", "tokens", "num_heads", "kv_num_heads"], [n for n in INT32 if n <= 0])
            case 3:
                self.spoil(call, ["output", "seqlens_k"], [None])
            case 4:
                tokens = self.pick([call.query, call.key, call.value])
                self.spoil(tokens, ["data"], [None]) if self.maybe(0.5) else self.spoil(
                    tokens, ["token_stride"], INT64[:5]
                )
            case _:
                self.spoil_cache(self.pick([call.key_cache, call.value_cache]))

    def spoil_cache(self, cache: SkvCache) -> None:
        if self.maybe(0.5):
            self.spoil(cache, ["data"], [None, cache.data + 8])
        else:
            self.spoil(cache, ["block_bytes"], [n for n in INT64 if n <= cache.block_bytes])

    def one_cache(self) -> tuple[SkvCache, int, int]:
        """A cache that may be spoiled, its heads, and the tokens that a sequence holds at most."""
        layout, heads = self.layout(), int(self.rng.integers(1, 3))
        if self.maybe(0.25):
            self.spoil_layout(layout)
        cache, held = self.cache(layout, 2 * heads)
        if self.maybe(0.15):
            self.spoil_cache(cache)
        return cache, heads, held

    def dequantize(self) -> None:
        cache, heads, held = self.one_cache()
        length, dtype = int(self.rng.integers(0, held + 1)), int(self.rng.integers(0, 3))
        stride = min(max(cache.layout.head_dim, 1), 1024) + int(self.pick((0, 3)))
        out = self.buffer(length * stride * TYPE_BYTES[dtype]).pointer
        position = [heads, int(self.rng.integers(0, 2)), int(self.rng.integers(0, heads))]
        if self.maybe(0.2):
            position[int(self.rng.integers(3))] = int(self.pick([n for n in INT32 if n < 0]))
            self.spoiled = True
        rest: list[object] = [length, dtype, out, stride]
        if self.maybe(0.3):
            at = int(self.rng.integers(4))
            lengths = [n for n in INT64 if n < 0 or n > 2**31] if not cache.layout.local_window_size else INT64[:3]
            rest[at] = (self.pick(lengths), self.pick(INT32[:2] + INT32[4:]), None, self.pick(INT64[:4]))[at]
            self.spoiled = True
        self.run("skv_dequantize", ctypes.byref(cache) if not self.absent() else None, *position, *rest)

    def rewind(self) -> None:
        cache, heads, held = self.one_cache()
        longest = int(self.rng.integers(0, held + 1))
        length = int(self.rng.integers(0, longest + 1))
        wanted = [length, longest, max(0, length - int(self.rng.integers(0, 2)) * cache.layout.recent_tokens)]
        where = [heads, int(self.rng.integers(0, 2))]
        self.spoiled = True  # it may be too far back
        if self.maybe(0.3):
            wanted[int(self.rng.integers(3))] = int(self.pick(INT64))
        if self.maybe(0.1):
            where[int(self.rng.integers(2))] = int(self.pick([n for n in INT32 if n < 0]))
        self.run("skv_rewind", ctypes.byref(cache) if not self.absent() else None, *where, *wanted)

    def decode_tile(self) -> None:
        layout = self.layout()
        if self.maybe(0.3):
            self.spoil_layout(layout)
        tile, _, dim = sizes(layout)
        tokens = layout.tile_tokens if 0 < layout.tile_tokens <= 5000 else 32
        pointers = [ctypes.byref(layout), self.buffer(tile).pointer, self.buffer(4 * dim * tokens).pointer]
        if self.absent():
            pointers[int(self.rng.integers(3))] = None
        self.run("skv_decode_tile", *pointers)

    def layout_sizes(self) -> None:
        layout = self.layout()
        if self.maybe(0.3):
            self.spoil_layout(layout)
        length = int(self.pick(INT64)) if self.maybe(0.5) else int(self.rng.integers(0, 500))
        self.spoiled |= not 0 <= length <= 2**31
        out = self.buffer(48).pointer if not self.absent() else None
        self.run("skv_layout_sizes", ctypes.byref(layout), int(self.pick(INT64)), length, out)

    def absent(self) -> bool:
        """Whether a pointer is null this time."""
        absent = self.maybe(0.05)
        self.spoiled |= absent
        return absent


@pytest.mark.parametrize("seed", SEEDS)
def test_any_call_succeeds_or_is_refused(seed: int) -> None:
    fuzzer = Fuzzer(seed)
    for _ in range(CALLS):
        for name in ("attention", "attention", "dequantize", "rewind", "decode_tile", "layout_sizes"):
            fuzzer.call(name)
    for name in ("attention", "append", "dequantize", "rewind", "decode_tile", "layout_sizes"):
        for succeeded in (True, False):
            assert fuzzer.outcomes[f"skv_{name}", succeeded] > CALLS / 10, fuzzer.outcomes


# What it has found.


@pytest.mark.parametrize("group_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("granularity", [0, 1, 2])
def test_more_groups_than_kernels_have_room_for_are_refused(group_size: int, granularity: int) -> None:
    layout = SkvLayout(512, 4, granularity, 0, group_size, 0, 0, 32, 1, 1, 0, 16)
    tile, out = native.Guarded(np.zeros(32 * 512 * 4, np.uint8)), native.Guarded(np.zeros((32, 512), np.float32))
    with pytest.raises(native.NativeError, match=f"group_size; got {group_size}; expected"):
        native.check(native.library().skv_decode_tile(ctypes.byref(layout), tile.pointer, out.pointer))


@pytest.mark.parametrize("length", [-(2**63), -1, 2**31 + 1, 2**63 - 1])
def test_lengths_that_no_sequence_has_are_refused(length: int) -> None:
    layout = SkvLayout(64, 4, 0, 0, 64, 4, 32, 32, 0, 0, 70, 16)
    cache = native.Guarded(np.zeros(4 * 4096 + 68 * 128, np.uint8))
    out = native.Guarded(np.zeros(6, np.int64))
    held = SkvCache(layout, cache.pointer, cache.array.nbytes)
    for status in (
        native.library().skv_layout_sizes(ctypes.byref(layout), 4096, length, out.pointer),
        native.library().skv_rewind(ctypes.byref(held), 1, 0, length, max(length, 0), 0),
        native.library().skv_dequantize(ctypes.byref(held), 1, 0, 0, length, 1, out.pointer, 64),
    ):
        with pytest.raises(native.NativeError, match=f"length.*; got {length}.*expected"):
            native.check(status)
