"""Residual vector quantization (Kumar, arXiv 2410.15704): groups of 32 channels, 2,048 codes, round after round.

As in the author's code. A head's key, before RoPE, or value is divided by its standard deviation, which is stored in
float16. Its channels form groups of 32: of values those that stand together, of keys those ``D / 32`` apart. A group is
coded in rounds, each the nearest of 2,048 codebook entries to what the rounds before have left; one codebook per round
serves all groups and heads of a layer. Nothing is exact. Bits of a name are those of the nearest number of rounds, 11
bits each: 6 rounds for 2 bits, 9 for 3 (the paper's 8 are 2.75). Codebooks belong to the model and are not counted.

What differs: codebooks are the k-means alone with which the author begins; the moving average that follows it in
training is left out. The calibration text is short, so that an entry is the mean of a dozen vectors or fewer, where the
author's training has thousands: later rounds fit the text's own residuals, and gain less on others. Heads that are no
multiple of 32 have smaller groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from skv_export.evaluation.decode_simulation import CacheFactory
from skv_export.evaluation.literature.from_text import Activations, Ropes
from skv_export.evaluation.literature.rope import KeysBeforeRope
from skv_export.evaluation.literature.tiled import TiledCache, half

GROUP, ENTRIES, CODE_BITS = 32, 2048, 11
LLOYD, VECTORS = 1, 32768
"""Iterations of k-means per round (more lower the error on its own text only), and vectors that it looks at, at most.
"""
_CHUNK = 2048
"""Vectors whose distances are held at once."""


@dataclass(frozen=True)
class RvqCache(TiledCache):
    """Values.

    Attributes:
        codebooks: ``[rounds, entries, channels of a group]``.
    """

    codebooks: torch.Tensor = field(default_factory=lambda: torch.zeros(1), repr=False)

    @property
    def group(self) -> int:
        """Channels of a group."""
        return math.gcd(self.head_dim, GROUP)

    @property
    def rounds(self) -> int:
        """Codes of a group."""
        return max(1, round(self.bits * self.group / CODE_BITS))

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """Cuts the last dimension into groups, ``[..., D / group, group]``."""
        return x.reshape(*x.shape[:-1], -1, self.group)

    def together(self, groups: torch.Tensor) -> torch.Tensor:
        """Undoes ``grouped``."""
        return groups.flatten(-2)

    def scaled(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors ``[..., D]`` over their standard deviations, in groups, and these deviations."""
        scale = half(x.std(-1, keepdim=True))
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return self.grouped(x / scale), scale

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Vector by vector."""
        groups, scale = self.scaled(x)
        rest = groups.reshape(-1, self.group)
        for codebook in self.codebooks:
            rest = rest - codebook[nearest(rest, codebook)]
        return self.together(groups - rest.view_as(groups)) * scale

    @property
    def stored_bits(self) -> float:
        """Codes, and a standard deviation per vector."""
        return self.rounds * CODE_BITS / self.group + 16 / self.head_dim


@dataclass(frozen=True)
class RvqKeys(RvqCache, KeysBeforeRope):
    """Keys, whose groups take channels from all over the head."""

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """Channels that are as far apart as there are groups."""
        return x.reshape(*x.shape[:-1], self.group, -1).transpose(-1, -2)

    def together(self, groups: torch.Tensor) -> torch.Tensor:
        """Undoes ``grouped``."""
        return groups.transpose(-1, -2).flatten(-2)


def fit(k_bits: int, v_bits: int, seen: dict[int, Activations], ropes: Ropes) -> CacheFactory:
    """Returns the caches of a model whose layers saw this."""

    def make(index: int, head_dim: int, window: int) -> tuple[RvqKeys, RvqCache]:
        keys, values = RvqKeys(k_bits, head_dim), RvqCache(v_bits, head_dim)
        k_books = codebooks(keys.scaled(seen[index].keys_before_rope())[0], keys.rounds)
        v_books = codebooks(values.scaled(seen[index].values)[0], values.rounds)
        return (
            RvqKeys(k_bits, head_dim, window, codebooks=k_books, index=index, ropes=ropes),
            RvqCache(v_bits, head_dim, window, codebooks=v_books),
        )

    return make


def codebooks(groups: torch.Tensor, rounds: int) -> torch.Tensor:
    """K-means of vectors ``[..., channels]``, then of what it leaves of them, and so on.

    Each starts from some of the vectors; an entry that is nearest to none of them stays.

    Returns:
        ``[rounds, entries, channels]``.
    """
    flat = groups.reshape(-1, groups.shape[-1])
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:VECTORS]
    rest = flat[order.to(flat.device)]
    found = []
    for _ in range(rounds):
        codebook = rest[:ENTRIES].clone()
        for _ in range(LLOYD):
            chosen = nearest(rest, codebook)
            count = torch.bincount(chosen, minlength=len(codebook))[:, None]
            mean = torch.zeros_like(codebook).index_add_(0, chosen, rest) / count.clamp(min=1)
            codebook = torch.where(count > 0, mean, codebook)
        found.append(codebook)
        rest = rest - codebook[nearest(rest, codebook)]
    return torch.stack(found)


def nearest(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The entry of ``[entries, channels]`` nearest to each of ``[N, channels]``."""
    bias = -codebook.pow(2).sum(-1) / 2
    return torch.cat([torch.addmm(bias, part, codebook.mT).argmax(-1) for part in torch.split(x, _CHUNK)])
