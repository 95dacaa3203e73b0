"""KIVI (Liu et al., arXiv 2402.02750): keys per channel, values per token, min-max in groups of 32, the last 128 exact.

As in the authors' code: keys in groups of 32 tokens of a channel, up to 128 exact ones, quantized together when that
many have come; values in groups of 32 channels of a token, the last 128 tokens exact. No sinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skv_export.evaluation.literature.tiled import TiledCache, min_max, tiles

RESIDUAL, GROUP = 128, 32
"""Exact tokens, at most; numbers that share a scale and a minimum, both float16."""


@dataclass(frozen=True)
class KiviKeys(TiledCache):
    """Keys per channel."""

    tile: int = RESIDUAL

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Min-max over 32 tokens."""
        return min_max(tiles(x, GROUP), self.bits, dim=2).flatten(1, 2)

    @property
    def stored_bits(self) -> float:
        """Codes, a scale and a minimum per group."""
        return self.bits + 32 / GROUP


@dataclass(frozen=True)
class KiviValues(TiledCache):
    """Values per token."""

    recent: int = RESIDUAL

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Min-max over 32 channels; over all of a head that has no whole number of groups."""
        return min_max(x.reshape(*x.shape[:2], -1, self._group), self.bits).reshape(x.shape)

    @property
    def stored_bits(self) -> float:
        """Codes, a scale and a minimum per group."""
        return self.bits + 32 / self._group

    @property
    def _group(self) -> int:
        return GROUP if self.head_dim % GROUP == 0 else self.head_dim
