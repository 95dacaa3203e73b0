"""The cache's bytes, layout version 1 (docs/spec.md, The cache's bytes): sizes, offsets, packing and unpacking, in
numpy.

``CacheLayout`` describes one tensor of one layer: keys or values. The cache of a sequence and KV head is one block of
bytes: tiles of ``tile_tokens`` quantized tokens, then, at the end, the full-precision rows (sinks, then a ring of
recent tokens). ``native/kv_layout.h`` is the mirror of this file; a test compares the two number by number.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from skv_export.errors import SkvError
from skv_export.spec.recipe import (
    BITS,
    GRANULARITIES,
    GROUP_MULTIPLE,
    MAX_HEAD_DIM,
    MAX_KEPT_TOKENS,
    PARAMETER_BITS,
    RECENT_TYPES,
    ROTATIONS,
    TILE_TOKENS,
    LayerConfig,
)

LAYOUT_VERSION = 1
CHANNEL_MULTIPLE = 32
"""head_dim is rounded up to a multiple of this in the cache; the added channels are zero."""
UNIT_CHANNELS = 32
"""Channels whose scales and offsets have common units, where these have 8 bits."""
WIDTH_MULTIPLE = 16
"""Blocks, planes and parameters start on a boundary of this many bytes."""
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bit width -> widths of the planes a code is split into, high bits first, so that no code straddles a byte."""
RECENT_DTYPES = {
    "float16": np.dtype(np.float16),
    "float": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

MAX_WINDOW = 1 << 30
_RANGES = {
    "head_dim": (1, MAX_HEAD_DIM),
    "num_sink_tokens": (0, MAX_KEPT_TOKENS),
    "recent_tokens": (0, MAX_KEPT_TOKENS),
    "local_window_size": (0, MAX_WINDOW),
}
_CHOICES = {
    "bits": BITS,
    "granularity": GRANULARITIES,
    "rotation": ROTATIONS,
    "tile_tokens": TILE_TOKENS,
    "recent_type": RECENT_TYPES,
    "parameter_bits": PARAMETER_BITS,
}

Bytes = NDArray[np.uint8]
Half = NDArray[np.float16]


@dataclass(frozen=True)
class CacheLayout:
    """The bytes of one cache tensor: all keys, or all values, of one layer.

    Attributes:
        head_dim: Channels per head, as the model has them.
        bits: 1 2 3 4 5 6 8, or 16 = not quantized.
        granularity: ``channel``, ``token`` or ``token_channel``.
        rotation: ``none`` or ``hadamard``.
        group_size: Channels that share a scale (not with ``channel``); divides ``padded_dim``, a multiple of 32.
        num_sink_tokens: First tokens in full precision (s).
        recent_tokens: Last tokens in full precision, at least (w).
        tile_tokens: Tokens per tile (T).
        recent_type: Number format of the full-precision rows.
        is_value: Values are packed along tokens, keys along channels.
        local_window_size: Tokens a query sees, itself included; 0 = all. Then the tiles are a ring.
        parameter_bits: Bits of each scale and offset: 16, or with ``channel`` 8.

    Raises:
        SkvError: A field is none of its choices or out of its range; ``native/layout_check.h`` has the same limits.
    """

    head_dim: int
    bits: int
    granularity: str
    rotation: str
    group_size: int
    num_sink_tokens: int
    recent_tokens: int
    tile_tokens: int
    recent_type: str
    is_value: bool
    local_window_size: int = 0
    parameter_bits: int = 16

    def __post_init__(self) -> None:
        tensor = "value" if self.is_value else "key"
        for field, (low, high) in _RANGES.items():
            value = getattr(self, field)
            if not low <= value <= high:
                raise SkvError(f"{tensor} cache: {field}", got=value, expected=f"{low} ... {high}")
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise SkvError(f"{tensor} cache: {field}", got=repr(value), expected=", ".join(map(str, choices)))
        if self.group_size < 1 or self.group_size % GROUP_MULTIPLE or self.padded_dim % self.group_size:
            sizes = [g for g in range(GROUP_MULTIPLE, self.padded_dim + 1, GROUP_MULTIPLE) if self.padded_dim % g == 0]
            raise SkvError(
                f"{tensor} cache: padded head_dim {self.padded_dim} is no multiple of the group size",
                got=self.group_size,
                expected=" or ".join(map(str, sizes)),
                fix=f"Leave --{tensor[0]}-group-size out to have the usual one.",
            )
        if self.parameter_bits == 8 and self.granularity != "channel":
            raise SkvError(f"{tensor} cache: parameter_bits with granularity {self.granularity}", got=8, expected=16)

    @classmethod
    def pair(cls, config: LayerConfig, head_dim: int, local_window_size: int = 0) -> tuple[CacheLayout, CacheLayout]:
        """Returns the layouts of a layer's keys and values."""
        padded = -(-head_dim // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE
        default_group = 64 if padded % 64 == 0 else 32
        common: dict[str, Any] = {
            "head_dim": head_dim,
            "num_sink_tokens": config.num_sink_tokens,
            "recent_tokens": config.recent_tokens,
            "tile_tokens": config.tile_tokens,
            "recent_type": config.recent_type,
            "local_window_size": local_window_size,
        }
        key = cls(
            bits=config.k_bits,
            granularity=config.k_granularity,
            rotation=config.k_rotation,
            group_size=config.k_group_size or default_group,
            is_value=False,
            parameter_bits=config.k_parameter_bits if config.k_granularity == "channel" else 16,
            **common,
        )
        value = cls(
            bits=config.v_bits,
            granularity=config.v_granularity,
            rotation=config.v_rotation,
            group_size=config.v_group_size or default_group,
            is_value=True,
            parameter_bits=config.v_parameter_bits if config.v_granularity == "channel" else 16,
            **common,
        )
        return key, value

    # Sizes of a tile.

    @cached_property
    def padded_dim(self) -> int:
        """D: channels per head in the cache."""
        return -(-self.head_dim // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE

    @cached_property
    def rotation_dim(self) -> int:
        """Size of one Hadamard block: the largest power of two that divides D."""
        return self.padded_dim & -self.padded_dim

    @cached_property
    def recent_dtype(self) -> np.dtype[np.generic]:
        """numpy's type of the full-precision rows."""
        return RECENT_DTYPES[self.recent_type]

    @cached_property
    def num_groups(self) -> int:
        """Scales per token, with granularities ``token`` and ``token_channel``."""
        return self.padded_dim // self.group_size

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of a tile's codes; with 16 bits, of its rows."""
        if self.bits == 16:
            return self.tile_tokens * self.row_bytes
        return self.tile_tokens * self.padded_dim * self.bits // 8

    @cached_property
    def parameter_bytes(self) -> int:
        """Bytes of a tile's scales, offsets and means."""
        if self.bits == 16:
            return 0
        if self.granularity == "channel":
            return 2 * self.padded_dim + (self.unit_bytes if self.parameter_bits == 8 else 2 * self.padded_dim)
        means = self.padded_dim + WIDTH_MULTIPLE if self.granularity == "token_channel" else 0
        return 2 * self.num_groups * self.tile_tokens + means

    @property
    def unit_bytes(self) -> int:
        """Bytes of the bfloat16 units of scales and offsets in 8 bits, two for each 32 channels."""
        return -(-4 * self.padded_dim // UNIT_CHANNELS // WIDTH_MULTIPLE) * WIDTH_MULTIPLE

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile; every part of it is a multiple of 16 bytes by itself, as D and T are multiples of 32."""
        return self.code_bytes + self.parameter_bytes

    # Sizes of a block.

    @property
    def row_bytes(self) -> int:
        """Bytes of one full-precision row."""
        return self.padded_dim * self.recent_dtype.itemsize

    @property
    def ring_tokens(self) -> int:
        """Rows of the recent ring: w + T."""
        return self.recent_tokens + self.tile_tokens

    @property
    def full_rows(self) -> int:
        """R: full-precision rows of a block, sinks first."""
        return self.num_sink_tokens + self.ring_tokens

    @property
    def window_tiles(self) -> int:
        """Tiles after which a sliding-window layer needs no more; 0 without a window."""
        return -(-self.local_window_size // self.tile_tokens) + 1 if self.local_window_size else 0

    def tiles_for(self, max_length: int) -> int:
        """Tiles that a block for ``max_length`` tokens has."""
        tiles = max(0, -(-(max_length - self.full_rows + 1) // self.tile_tokens))
        return min(tiles, self.window_tiles) if self.local_window_size else tiles

    def block_bytes(self, max_length: int) -> int:
        """Bytes needed to hold ``max_length`` tokens of one sequence and KV head."""
        return self.tiles_for(max_length) * self.tile_bytes + self.full_rows * self.row_bytes

    @property
    def width(self) -> int:
        """W, the last dimension of the cache tensor: a token's share of a tile, rounded up to 16 bytes."""
        per_token = -(-self.tile_bytes // self.tile_tokens)
        return -(-per_token // WIDTH_MULTIPLE) * WIDTH_MULTIPLE

    def shape(self, max_length: int) -> tuple[int, int]:
        """Returns the smallest ``(rows, W)`` whose block holds ``max_length`` tokens."""
        return -(-self.block_bytes(max_length) // self.width), self.width

    def shape_rule(self) -> dict[str, int]:
        """Returns the numbers from which a runtime in any language computes ``shape(max_length)``.

        tiles = max(0, ceil((max_length - full_rows + 1) / tile_tokens)), at most max_tiles where that is not 0;
        rows = ceil((tiles * tile_bytes + full_bytes) / width).
        """
        return {
            "width": self.width,
            "tile_bytes": self.tile_bytes,
            "full_rows": self.full_rows,
            "full_bytes": self.full_rows * self.row_bytes,
            "max_tiles": self.window_tiles,
        }

    def tiles_in(self, block_bytes: int) -> int:
        """Tiles in a block of this size.

        Raises:
            SkvError: The block is no multiple of 16 bytes, or too small for the full-precision rows.
        """
        rows = self.full_rows * self.row_bytes
        if block_bytes % WIDTH_MULTIPLE or block_bytes < rows:
            raise SkvError(
                "cache block: unusable size",
                got=f"{block_bytes} bytes",
                expected=f"at least {rows}, and a multiple of {WIDTH_MULTIPLE}",
                fix="Allocate the cache with CacheLayout.shape(max_length).",
            )
        return (block_bytes - rows) // self.tile_bytes

    def capacity(self, block_bytes: int) -> int | None:
        """Tokens that a block of this size holds; None = any number (a sliding window whose ring is complete)."""
        tiles = self.tiles_in(block_bytes)
        if self.local_window_size and tiles >= self.window_tiles:
            return None
        return tiles * self.tile_tokens + self.full_rows - 1

    def effective_bits(self, context_length: int) -> float:
        """Bits per element at this length: codes, parameters and full-precision rows, all counted."""
        return 8 * self.block_bytes(context_length) / (context_length * self.head_dim)

    # Which token is where.

    def quantized_tokens(self, length: int) -> int:
        """n_q: tokens held in tiles when ``length`` tokens have been appended."""
        past_recent = length - self.num_sink_tokens - self.recent_tokens
        return max(0, past_recent // self.tile_tokens * self.tile_tokens)

    def full_row(self, position: int) -> int:
        """Full-precision row in which the token at ``position`` stands while it is a sink or recent."""
        sinks = self.num_sink_tokens
        return position if position < sinks else sinks + (position - sinks) % self.ring_tokens

    # Codes and parameters of a tile.

    def pack_tile(self, codes: Bytes, scale: Half | Bytes, offset: Half | Bytes | None) -> Bytes:
        """Packs one or more tiles.

        Args:
            codes: ``[..., T, D]``, unpacked integers.
            scale: ``channel``: ``[..., D]``, in 8 bits ``pack_channels`` with the offsets; else ``[..., D/g, T]``.
            offset: ``channel``: ``[..., D]``, in 8 bits None; ``token``: None; ``token_channel``: ``pack_means``.

        Returns:
            ``[..., tile_bytes]``.
        """
        parts = [self._pack_plane(codes, shift, width) for shift, width in self._planes()]
        parts += [_bytes(p) for p in (scale, offset) if p is not None]
        lead = codes.shape[:-2]
        return np.concatenate([p.reshape(*lead, -1) for p in parts], axis=-1)

    def unpack_tile(self, tile: Bytes) -> tuple[Bytes, Half | Bytes, Half | Bytes | None]:
        """Inverse of ``pack_tile``."""
        codes = np.zeros((*tile.shape[:-1], self.tile_tokens, self.padded_dim), np.uint8)
        start = 0
        for shift, width in self._planes():
            end = start + self.tile_tokens * self.padded_dim * width // 8
            codes |= self._unpack_plane(tile[..., start:end], width) << np.uint8(shift)
            start = end
        if self.parameter_bits == 8:
            return codes, tile[..., start : self.tile_bytes], None
        if self.granularity == "channel":
            parameters = np.ascontiguousarray(tile[..., start : self.tile_bytes]).view("<f2")
            return codes, parameters[..., : self.padded_dim], parameters[..., self.padded_dim :]
        means = start + 2 * self.num_groups * self.tile_tokens
        scale = np.ascontiguousarray(tile[..., start:means]).view("<f2")
        scale = scale.reshape(*tile.shape[:-1], self.num_groups, self.tile_tokens)
        return codes, scale, tile[..., means : self.tile_bytes] if self.granularity == "token_channel" else None

    def pack_channels(self, scale: Bytes, offset: NDArray[np.int8], units: NDArray[np.float32]) -> Bytes:
        """Bytes of scales and offsets in 8 bits, each ``code * unit``.

        Args:
            scale: ``[..., D]``.
            offset: ``[..., D]``.
            units: ``[..., 2, D/32]``, of the scales and of the offsets; exact in bfloat16.

        Returns:
            ``[..., parameter_bytes]``: scale ``[D]``, offset ``[D]``, bfloat16 units ``[2][D/32]``, zeros.
        """
        d, lead = self.padded_dim, scale.shape[:-1]
        packed = np.zeros((*lead, self.parameter_bytes), np.uint8)
        packed[..., :d], packed[..., d : 2 * d] = scale, offset.view(np.uint8)
        held = _bytes(units.astype(ml_dtypes.bfloat16).view(np.uint16)).reshape(*lead, -1)
        packed[..., 2 * d : 2 * d + held.shape[-1]] = held
        return packed

    def unpack_channels(self, packed: Bytes) -> tuple[Bytes, NDArray[np.int8], NDArray[np.float32]]:
        """Inverse of ``pack_channels``."""
        d = self.padded_dim
        held = np.ascontiguousarray(packed[..., 2 * d : 2 * d + 4 * d // UNIT_CHANNELS])
        units = held.view("<u2").astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
        offset = np.ascontiguousarray(packed[..., d : 2 * d]).view(np.int8)
        return packed[..., :d], offset, units.reshape(*packed.shape[:-1], 2, d // UNIT_CHANNELS)

    def pack_means(self, codes: NDArray[np.int8], unit: Half) -> Bytes:
        """Bytes ``[..., D + 16]`` of means ``codes * unit``: int8 ``[..., D]``, float16 ``[...]``, zeros."""
        means = np.zeros((*codes.shape[:-1], self.padded_dim + WIDTH_MULTIPLE), np.uint8)
        means[..., : self.padded_dim] = codes.view(np.uint8)
        means[..., self.padded_dim : self.padded_dim + 2] = _bytes(unit[..., None])
        return means

    def unpack_means(self, means: Bytes) -> tuple[NDArray[np.int8], Half]:
        """Inverse of ``pack_means``."""
        unit = np.ascontiguousarray(means[..., self.padded_dim : self.padded_dim + 2]).view("<f2")
        return np.ascontiguousarray(means[..., : self.padded_dim]).view(np.int8), unit[..., 0]

    def _planes(self) -> list[tuple[int, int]]:
        """Pairs (shift of the plane's bits in the code, width of the plane)."""
        widths = PLANES[self.bits]
        return [(sum(widths[i + 1 :]), width) for i, width in enumerate(widths)]

    def _pack_plane(self, codes: Bytes, shift: int, width: int) -> Bytes:
        # Keys: uint32 [D*p/32][T]. Values: uint8 [T/4][D*p/8][4].
        unit, word = (8, np.dtype("u1")) if self.is_value else (32, np.dtype("<u4"))
        per_word = unit // width
        lead, t, d = codes.shape[:-2], self.tile_tokens, self.padded_dim
        fields = (codes.astype(np.uint32) >> shift) & ((1 << width) - 1)
        fields = fields.reshape(*lead, t, d // per_word, per_word) << (width * np.arange(per_word, dtype=np.uint32))
        words = np.bitwise_or.reduce(fields, axis=-1).astype(word)
        if self.is_value:
            words = words.reshape(*lead, t // 4, 4, d // per_word)
        return _bytes(words.swapaxes(-1, -2))

    def _unpack_plane(self, packed: Bytes, width: int) -> Bytes:
        unit, word = (8, np.dtype("u1")) if self.is_value else (32, np.dtype("<u4"))
        per_word = unit // width
        lead, t, d = packed.shape[:-1], self.tile_tokens, self.padded_dim
        words = np.ascontiguousarray(packed).view(word)
        inner = (t // 4, d // per_word, 4) if self.is_value else (d // per_word, t)
        words = words.reshape(*lead, *inner).swapaxes(-1, -2).reshape(*lead, t, d // per_word, 1)
        fields = (words >> (width * np.arange(per_word)).astype(word)) & word.type((1 << width) - 1)
        return fields.reshape(*lead, t, d).astype(np.uint8)


def layout_fields() -> tuple[str, ...]:
    """Names of the layout's fields, in the order of ``SkvLayout`` in ``native/kv_layout.h``."""
    return tuple(f.name for f in dataclasses.fields(CacheLayout))


def cache_bytes(layouts: list[tuple[CacheLayout, CacheLayout]], kv_num_heads: list[int], max_length: int) -> int:
    """Bytes of a whole model's cache for one sequence of ``max_length`` tokens, as allocated."""
    return sum(
        heads * math.prod(layout.shape(max_length))
        for pair, heads in zip(layouts, kv_num_heads, strict=True)
        for layout in pair
    )


def _bytes(array: NDArray[np.generic]) -> Bytes:
    """Little-endian bytes of an array, the last axis flattened into bytes."""
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return array.view(np.uint8)
