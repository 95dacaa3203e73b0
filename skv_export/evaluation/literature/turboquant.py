"""TurboQuant (Zandieh et al., arXiv 2504.19874): a random rotation, then the best levels for a coordinate of a sphere.

A vector's length is stored in float16. Its direction, rotated by one random orthogonal matrix for all, has coordinates
whose density is that of a point on the sphere, proportional to ``(1 - x^2)^((D - 3) / 2)``; each is rounded to the
Lloyd-Max levels of that density. With ``prod`` one bit of the width is spent on what that rounds off: the signs of a
random Gaussian projection of the residual (QJL), and its length in float16, make inner products unbiased. Every token
is quantized when it comes; nothing is exact.

What differs: one width for all channels. The paper reaches 2.5 and 3.5 bits by giving outlier channels a bit more.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from skv_export.evaluation.literature.tiled import TiledCache, half

_SEED = 250419874
_CELLS = 1 << 15
"""Of the grid on which levels are computed."""


@dataclass(frozen=True)
class TurboQuantCache(TiledCache):
    """Keys or values.

    Attributes:
        prod: Spend the last bit on the residual's signs.
    """

    prod: bool = False

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Token by token."""
        norm = x.norm(dim=-1, keepdim=True)
        unit = x / norm.clamp(min=1e-20)
        rotation, projection = (m.to(x.device) for m in random_matrices(self.head_dim))
        levels = sphere_levels(self.head_dim, self.bits - self.prod).to(x.device)
        nearest = torch.bucketize(unit @ rotation, (levels[1:] + levels[:-1]) / 2)
        read = levels[nearest] @ rotation.T
        if self.prod:
            residual = unit - read
            signs = torch.where(residual @ projection.T >= 0, 1.0, -1.0)
            length = half(residual.norm(dim=-1, keepdim=True))
            read = read + math.sqrt(math.pi / 2) / self.head_dim * length * (signs @ projection)
        return half(norm) * read

    @property
    def stored_bits(self) -> float:
        """Codes and signs, the vector's length, and the residual's."""
        return self.bits + (32 if self.prod else 16) / self.head_dim


@functools.cache
def random_matrices(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random orthogonal matrix and a matrix of standard normal numbers, ``[D, D]``; always the same."""
    generator = torch.Generator().manual_seed(_SEED + dim)
    gaussian, projection = (torch.randn(dim, dim, generator=generator) for _ in range(2))
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign(), projection


@functools.cache
def sphere_levels(dim: int, bits: int) -> torch.Tensor:
    """Lloyd-Max levels ``[2**bits]``, ascending, of one coordinate of a uniform point on the sphere in ``dim``."""
    x = (torch.arange(_CELLS, dtype=torch.float64) + 0.5) / _CELLS * 2 - 1
    density = ((dim - 3) / 2 * torch.log1p(-x * x)).exp()
    return lloyd_max(x, density, bits).float()


def lloyd_max(x: torch.Tensor, weight: torch.Tensor, bits: int, rounds: int = 300) -> torch.Tensor:
    """Levels ``[2**bits]``, ascending, with the least squared error on ascending numbers ``x`` with weights.

    Lloyd's iteration (k-means in one dimension) from the middles of parts of equal weight.
    """
    mass, moment = (torch.cat([w.new_zeros(1), w.cumsum(0)]) for w in (weight, weight * x))
    count = 2**bits
    middles = (torch.arange(count, dtype=mass.dtype, device=mass.device) + 0.5) / count * mass[-1]
    levels = x[torch.searchsorted(mass[1:], middles).clamp(max=len(x) - 1)]
    for _ in range(rounds):
        ends = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(x))])
        share, sums = mass[ends].diff(), moment[ends].diff()
        levels = torch.where(share > 0, sums / share.clamp(min=1e-300), levels)
    return levels.sort().values
