"""KVarN (Muller et al., arXiv 2606.03458): rotation, then variances made equal along both axes of a tile of 128 tokens.

As in the authors' reference for vLLM: each head's tile of 128 tokens is rotated by a Hadamard matrix over its channels.
By turns its columns and its rows are divided by their standard deviations, 16 times, in logarithms; of all states the
one with the least imbalance (the largest over the smallest deviation of the columns, plus that of the rows) stays. Then
min-max: of keys per channel, of values per token. The scale along that axis goes into the scale and the minimum; the
other is stored beside them. All float16. The first 128 tokens are exact, and those that fill no tile yet.

What differs: heads whose dimension is no power of two are rotated in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skv_export.evaluation.literature.tiled import TiledCache, hadamard, half, tiles

TILE, SINKS, ROUNDS = 128, 128, 16
_STD, _LOG = (1e-3, 1e3), (-0.3, 10.0)
"""Bounds of a standard deviation, and of the logarithm of a scale."""


@dataclass(frozen=True)
class KvarnCache(TiledCache):
    """Keys or values.

    Attributes:
        is_value: Values, not keys.
    """

    num_sink_tokens: int = SINKS
    tile: int = TILE
    is_value: bool = False

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Rotates, balances, quantizes, and back."""
        rotation = hadamard(self.head_dim).to(x.device)
        rotated = tiles(x @ rotation, TILE)
        per_token, per_channel = balance(rotated, channels_first=self.is_value)
        balanced = rotated / per_token / per_channel
        # What a row of codes shares, and what is stored for the other axis.
        dim, own, other = (3, per_token, per_channel) if self.is_value else (2, per_channel, per_token)
        levels = 2**self.bits - 1
        low, high = balanced.amin(dim, keepdim=True), balanced.amax(dim, keepdim=True)
        scale = ((high - low) / levels).clamp(min=1e-8)
        codes = ((balanced - low) / scale).round().clamp(0, levels)
        read = (codes * half(scale * own) + half(low * own)) * half(other)
        return read.flatten(1, 2) @ rotation

    @property
    def stored_bits(self) -> float:
        """Codes, a scale and a minimum per channel and a scale per token; for values the other way round."""
        shared, other = (self.head_dim, TILE) if self.is_value else (TILE, self.head_dim)
        return self.bits + 32 / shared + 16 / other


def balance(x: torch.Tensor, channels_first: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds scales with which the variances of a tile's tokens and channels are as equal as can be.

    Args:
        x: ``[..., T, D]``, one or more tiles.
        channels_first: Which axis each round begins with: tokens for keys, channels for values.

    Returns:
        Scales per token ``[..., T, 1]`` and per channel ``[..., 1, D]``.
    """
    logs = [torch.zeros_like(x[..., :, :1]), torch.zeros_like(x[..., :1, :])]
    best, least = [log.exp() for log in logs], imbalance(x)
    for _ in range(ROUNDS):
        for i in (1, 0) if channels_first else (0, 1):
            current = x / (logs[0] + logs[1]).exp()
            deviation = current.std(-1 - i, keepdim=True).clamp(*_STD)
            logs[i] = (logs[i] + deviation.log()).clamp(*_LOG)
        found = imbalance(x / (logs[0] + logs[1]).exp())
        better = (found <= least)[..., None, None]
        best = [torch.where(better, log.exp(), scale) for log, scale in zip(logs, best, strict=True)]
        least = torch.minimum(found, least)
    return best[0], best[1]


def imbalance(x: torch.Tensor) -> torch.Tensor:
    """Largest over smallest standard deviation of tokens, plus that of channels: 2 if all are equal."""
    ratios = [(s.amax(-1) / s.amin(-1).clamp(min=1e-8)) for s in (x.std(-1), x.std(-2))]
    return ratios[0] + ratios[1]
