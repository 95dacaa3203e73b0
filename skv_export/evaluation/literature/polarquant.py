"""PolarQuant (Wu et al., arXiv 2502.00527): pairs of channels of a key as radius and angle, each min-max per channel.

As in the authors' code. After RoPE, a head's channels i and ``i + D / 2``, which it turns together, are a point in the
plane. Its radius and its angle in [0, 2 pi) fall into ``2^b`` equal cells between the least and the largest of 128
tokens of the pair, and are read as the middle of their cell. Scale and minimum of both are float16. Up to 128 tokens
are exact, quantized together when that many have come. Bits of a name's keys are those of the radius and those of the
angle, so those of a number. No sinks.

What differs: values are KIVI's, where the paper leaves them as they are. Pairs are halves of the head under every RoPE,
also where it turns neighbours or a part of the channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from skv_export.evaluation.literature.tiled import TiledCache, half, tiles

TILE = 128


@dataclass(frozen=True)
class PolarKeys(TiledCache):
    """Keys in polar coordinates."""

    tile: int = TILE

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Tile by tile."""
        first, second = tiles(x, TILE).chunk(2, -1)
        radius = in_cells(torch.hypot(first, second), self.bits)
        angle = in_cells(torch.atan2(second, first) % (2 * math.pi), self.bits)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], -1).flatten(1, 2)

    @property
    def stored_bits(self) -> float:
        """Codes, and a scale and a minimum of radius and angle per pair of channels and tile."""
        return self.bits + 32 / TILE


def in_cells(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers ``[H, n, T, C]`` as the middles of ``2**bits`` equal cells of each channel's range in a tile."""
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    scale, offset = half((high - low) / 2**bits), half(low)
    codes = ((x - offset) / torch.where(scale > 0, scale, torch.ones_like(scale))).floor().clamp(0, 2**bits - 1)
    return (codes + 0.5) * scale + offset
