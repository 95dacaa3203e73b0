"""Random sequences of append and rewind, held to a fresh run of the same tokens instead of to rewind's own rules."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from skv_export.spec import reference
from skv_export.spec.layout import CacheLayout

Block = np.ndarray
Append = Callable[[CacheLayout, Block, int, np.ndarray], None]
"""(layout, block, past length, new tokens), in place."""
Rewind = Callable[[CacheLayout, Block, int, int, int], None]
"""(layout, block, length, longest length, new length), in place."""

HEADS, MAX_LENGTH = 2, 300
LOSSY_ERROR = 0.6
"""Of a token that came back from 3-bit or finer codes, relative to it; another token in its place is 1.4 away."""


def layouts() -> dict[str, CacheLayout]:
    """Keys and values of every granularity, with and without a window, sinks and rounding, by name."""
    found = {}
    forms = (("channel", 16), ("channel", 8), ("token", 16), ("token_channel", 16))
    for is_value, (form, parameters), bits, window, (sinks, recent, tile) in itertools.product(
        (False, True), forms, (16, 4), (0, 20, 70), ((4, 32, 32), (0, 16, 32), (3, 17, 64))
    ):
        if bits == 16 and (form, parameters) != ("channel", 16):
            continue  # nothing is rounded: granularity means nothing
        name = f"{'V' if is_value else 'K'}{bits} {form} {parameters} window {window} sinks {sinks} recent {recent}"
        found[name] = CacheLayout(
            32, bits, form, "none", 32, sinks, recent, tile, "float" if bits == 16 else "float16", is_value, window,
            parameters,
        )  # fmt: skip
    return found


@dataclasses.dataclass
class Sequence:
    """One sequence's blocks, the tokens that they should hold, and which of them codes have stood in for."""

    layout: CacheLayout
    append_to: Append
    rewind_to: Rewind
    seed: int

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        rows, width = self.layout.shape(MAX_LENGTH)
        self.block = np.full((HEADS, rows * width), 0xFF, np.uint8)
        self.tokens = np.zeros((HEADS, 0, self.layout.head_dim), np.float32)
        self.longest = 0
        self.lossy: set[int] = set()
        self.row_of: dict[int, int] = {}  # full-precision row -> position that was written there last

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def append(self, count: int) -> None:
        new = self.rng.standard_normal((HEADS, count, self.layout.head_dim)).astype(np.float32)
        self.append_to(self.layout, self.block, self.length, new)
        for position in range(self.length, self.length + count):
            row = self.layout.full_row(position)
            # With a window, rows that were overwritten and written again may be taken for lost.
            self.row_of[row] = max(position, self.row_of.get(row, 0) if self.layout.local_window_size else 0)
        self.tokens = np.concatenate([self.tokens, new], axis=1)
        self.longest = max(self.longest, self.length)

    def rewind(self, length: int) -> None:
        self.rewind_to(self.layout, self.block, self.length, self.longest, length)
        first, end = (self.layout.num_sink_tokens + self.layout.quantized_tokens(n) for n in (length, self.length))
        for position in range(first, end):  # those that leave their tiles
            row = self.layout.full_row(position)
            if self.row_of[row] != position:
                self.lossy.add(position)
                self.row_of[row] = self.row_of[row] if self.layout.local_window_size else position
        self.longest = reference.longest_after_rewind(self.layout, self.longest, length)
        self.lossy = {p for p in self.lossy if p < length}
        self.tokens = self.tokens[:, :length]

    def floor(self) -> int:
        return reference.rewind_floor(self.layout, self.block.shape[1], self.length, self.longest)

    def check(self) -> None:
        """What the next token sees is what a fresh run to this length holds."""
        fresh = np.full_like(self.block, 0xFF)
        reference.append(self.layout, fresh, 0, self.tokens)
        (got, _), (want, _) = (reference.load(self.layout, block, self.length) for block in (self.block, fresh))
        sinks, tile = self.layout.num_sink_tokens, self.layout.tile_tokens
        tiled = sinks + self.layout.quantized_tokens(self.length)
        window = self.layout.local_window_size
        for position in range(max(0, self.length - window + 1) if window else 0, self.length):
            start = sinks + (position - sinks) // tile * tile
            with_it = range(start, start + tile) if sinks <= position < tiled else (position,)
            if self.layout.bits == 16 or self.lossy.isdisjoint(with_it):
                assert np.array_equal(got[:, position], want[:, position]), (self.length, self.longest, position)
            else:
                error = got[:, position] - self.tokens[:, position]
                assert np.linalg.norm(error) < LOSSY_ERROR * np.linalg.norm(self.tokens[:, position])


def check_random_walk(layout: CacheLayout, append: Append, rewind: Rewind, seed: int, steps: int = 24) -> None:
    """Appends and rewinds, as far as allowed, in random order; what is too far must be refused and change nothing.

    Raises:
        AssertionError: Something differs from a fresh run, or a rewind is refused that must be possible.
    """
    sequence = Sequence(layout, append, rewind, seed)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        room = MAX_LENGTH - sequence.length
        sequence.append(int(min(room, rng.choice([1, 2, 5, 17, 33, 80]))))
        sequence.check()
        for _ in range(rng.integers(0, 4)):
            floor = sequence.floor()
            assert floor <= max(0, sequence.longest - layout.recent_tokens)
            sequence.rewind(int(rng.integers(floor, sequence.length + 1)))
            sequence.check()
            floor = sequence.floor()
            if floor > 0:
                before = sequence.block.copy()
                with pytest.raises(Exception, match="rewind from"):
                    sequence.rewind(floor - 1)
                assert np.array_equal(before, sequence.block)
        if sequence.length >= MAX_LENGTH - 1:
            break


def check_speculation(layout: CacheLayout, append: Append, rewind: Rewind, seed: int) -> None:
    """Appends up to 4 tokens and takes back some of them, as speculative decoding does, up to the capacity.

    Raises:
        AssertionError: Something differs from a fresh run.
    """
    sequence = Sequence(layout, append, rewind, seed)
    rng = np.random.default_rng(seed)
    sequence.append(int(rng.integers(1, 60)))
    while sequence.length + 4 <= MAX_LENGTH:
        drafted = int(rng.integers(1, 5))
        sequence.append(drafted)
        sequence.rewind(sequence.length - int(rng.integers(0, drafted + 1)))
        if rng.integers(0, 4) == 0:
            sequence.check()
    sequence.check()
