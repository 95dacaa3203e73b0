"""What the caches of the literature share: exact tokens at both ends, what is between quantized; uniform levels."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from skv_export.spec.quantizer import rotate


@dataclass(frozen=True)
class TiledCache(ABC):
    """A cache whose tokens leave its exact part ``tile`` at a time, all in the model's own basis.

    Attributes:
        bits: Of a code.
        head_dim: Channels of a head.
        local_window_size: Tokens a query sees, itself included; 0 = all. Only these are held, as by our cache.
        num_sink_tokens: First tokens, never quantized.
        recent: Last tokens that are exact at any length.
        tile: Tokens that are quantized together, exact until the last of them has come.
    """

    bits: int
    head_dim: int
    local_window_size: int = 0
    num_sink_tokens: int = 0
    recent: int = 0
    tile: int = 1

    def quantized_tokens(self, length: int) -> int:
        """Whole tiles behind the recent tokens."""
        return max(0, length - self.num_sink_tokens - self.recent) // self.tile * self.tile

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        """Rounds to float16."""
        return x.half().float()

    def quantized(self, x: torch.Tensor) -> torch.Tensor:
        """Reads whole tiles back; what fills none stays as it is."""
        first = self.num_sink_tokens
        last = first + max(0, x.shape[1] - first) // self.tile * self.tile
        if last <= first:
            return x
        return torch.cat([x[:, :first], self.read(self.exact(x[:, first:last])), x[:, last:]], 1)

    @abstractmethod
    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Quantizes whole tiles ``[H, T, D]`` and reads them back."""

    @property
    @abstractmethod
    def stored_bits(self) -> float:
        """Bits of a quantized element: its code and its share of what is stored with the codes."""

    @property
    def fixed_bits(self) -> float:
        """Bits per channel of what is stored once per sequence, such as a basis."""
        return 0.0

    def effective_bits(self, context_length: int) -> float:
        """Codes and what goes with them, room for the exact tokens in float16, what is stored once."""
        seen = min(context_length, self.local_window_size or context_length)
        exact = min(seen, self.num_sink_tokens + self.recent + (self.tile if self.tile > 1 else 0))
        return ((seen - exact) * self.stored_bits + exact * 16 + self.fixed_bits) / seen


def tiles(x: torch.Tensor, count: int) -> torch.Tensor:
    """Cuts ``[H, T, D]`` into ``[H, T / count, count, D]``."""
    return x.reshape(len(x), -1, count, x.shape[-1])


def min_max(x: torch.Tensor, bits: int, dim: int = -1, clip: float = 1.0) -> torch.Tensor:
    """``2**bits`` levels from the smallest to the largest number along ``dim``, as read back.

    Args:
        x: What is quantized.
        bits: Of a code.
        dim: Numbers that share a scale and a minimum, both float16.
        clip: Multiplies both ends.
    """
    levels = 2**bits - 1
    low, high = x.amin(dim, keepdim=True) * clip, x.amax(dim, keepdim=True) * clip
    scale, offset = half((high - low) / levels), half(low)
    codes = ((x - offset) / torch.where(scale > 0, scale, torch.ones_like(scale))).round().clamp(0, levels)
    return codes * scale + offset


def half(x: torch.Tensor) -> torch.Tensor:
    """Rounds to float16 and back, saturating at its largest finite value."""
    return x.clamp(-65504.0, 65504.0).half().float()


@functools.cache
def hadamard(dim: int) -> torch.Tensor:
    """Normalized Walsh-Hadamard matrix ``[D, D]``, symmetric; of blocks, if D is no power of two."""
    return torch.from_numpy(rotate(np.eye(dim, dtype=np.float32), dim & -dim))
