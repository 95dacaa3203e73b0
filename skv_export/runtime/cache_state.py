"""What a cache holds of a sequence, apart from the buffers: copied, kept, written to files, and put back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skv_export.spec.layout import Bytes, CacheLayout

Key = tuple[int, str]
"""Names one tensor: layer, and ``key`` or ``value``."""


@dataclass(frozen=True)
class TensorState:
    """What one tensor holds of one sequence; bytes that no token needs are left out.

    Attributes:
        first: Number of the first tile.
        tiles: ``[N_kv, tiles, tile_bytes]``, in order.
        rows: ``[N_kv, R * row_bytes]``, the full-precision rows.
    """

    first: int
    tiles: Bytes
    rows: Bytes


@dataclass(frozen=True)
class SequenceState:
    """What a cache holds of one sequence, by itself or behind the states of what came before.

    Attributes:
        tokens: ``[length]``, int32, the tokens held, from the first on.
        longest: Most tokens in the buffers since the sequence was empty, as ``reference.rewind`` wants it.
        tensors: By layer and name.
        dropped: Those of the tokens that are not in the buffers; see ``Cache``.
        chosen: Tokens at the front of the buffers that were chosen; see ``Cache``.
        second_rope: Whether the keys have longrope's second set of frequencies.
    """

    tokens: NDArray[np.int32]
    longest: int
    tensors: Mapping[Key, TensorState]
    dropped: int = 0
    chosen: int = 0
    second_rope: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that the state takes."""
        return self.tokens.nbytes + sum(x.tiles.nbytes + x.rows.nbytes for x in self.tensors.values())


def held_tiles(layout: CacheLayout, block_bytes: int, length: int, longest: int) -> range:
    """The tiles of a block that hold something of its sequence: with a sliding window, what the ring has not forgotten.

    Args:
        layout: The tensor's layout.
        block_bytes: Bytes of one block.
        length: Tokens held.
        longest: Most tokens held since the block was empty.
    """
    end = layout.quantized_tokens(length) // layout.tile_tokens
    if not layout.local_window_size:
        return range(end)
    forgotten = layout.quantized_tokens(longest) // layout.tile_tokens - layout.tiles_in(block_bytes)
    return range(min(max(forgotten, 0), end), end)
