"""What a cache holds of a sequence, apart from the buffers: copied, kept, written to files, and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from skv_export.calibration.file import Calibration
from skv_export.errors import SkvError
from skv_export.model_folder.skv_config import LayerCache
from skv_export.runtime.state_buffers import States
from skv_export.spec.key_basis import KeyBasis
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
        states: Of recurrent layers, after all tokens.
    """

    tokens: NDArray[np.int32]
    longest: int
    tensors: Mapping[Key, TensorState]
    dropped: int = 0
    chosen: int = 0
    second_rope: bool = False
    states: States = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes that the state takes."""
        tensors = sum(x.tiles.nbytes + x.rows.nbytes for x in self.tensors.values())
        return self.tokens.nbytes + tensors + sum(x.nbytes for x in self.states.values())


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


def load_bases(path: Path, layers: Sequence[LayerCache]) -> Mapping[int, KeyBasis]:
    """Reads the constants of the layers whose keys are calibrated, by layer; without such a layer, nothing.

    Raises:
        SkvError: The file is missing or damaged, or lacks a layer.
    """
    calibrated = [i for i, layer in enumerate(layers) if layer.calibrated]
    bases = Calibration.load(path).bases if calibrated else {}
    for i in calibrated:
        if i not in bases:
            raise SkvError(f"{path}: layer {i} is missing", fix="Export the model again.")
        bases[i].check(layers[i].key, layers[i].num_key_value_heads)
    return {i: bases[i] for i in calibrated}


def parts(layout: CacheLayout, block: Bytes) -> tuple[Bytes, Bytes]:
    """Views of a block ``[N_kv, C]``: its tiles ``[N_kv, tiles, tile_bytes]``, and its full-precision rows."""
    tiles = layout.tiles_in(block.shape[1])
    found = block[:, : tiles * layout.tile_bytes].reshape(len(block), tiles, layout.tile_bytes)
    return found, block[:, block.shape[1] - layout.full_rows * layout.row_bytes :]
