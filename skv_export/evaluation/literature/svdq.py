"""SVDq (Hong et al., arXiv 2502.15304): keys in the basis of the prompt's singular vectors, bits by singular value.

The mean of the prompt's keys is subtracted, and the rest rotated by its right singular vectors, one basis per head. The
latent channels, in the order of their singular values, form eight equal parts; a part has the bits of a schedule, and
with 0 bits its channels are dropped. Min-max per latent channel. Tokens that come later go into the same basis. Bits of
a name's keys are the mean of its schedule: at 2 the paper's example ``(8, 4, 2, 1, 1, 0, 0, 0)``.

What differs, as the paper's own code was not at hand: the schedules at other widths are ours, of the same form; ranges
are those of 128 tokens of a channel; the two levels of one bit are the means of either half of a channel's numbers,
since levels at the ends of the range would lose more than the channel has. The sparsity that the paper combines it with
is left out. Values are KIVI's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from skv_export.evaluation.literature.tiled import TiledCache, half, min_max, tiles

SCHEDULES = {
    1: (4, 2, 2, 0, 0, 0, 0, 0),
    2: (8, 4, 2, 1, 1, 0, 0, 0),
    3: (8, 4, 4, 4, 2, 2, 0, 0),
    4: (8, 8, 4, 4, 4, 2, 2, 0),
}
"""Bits of the eight parts of the latent channels, by their mean."""
TILE = 128


@dataclass(frozen=True)
class SvdqKeys(TiledCache):
    """Keys in a latent space.

    Attributes:
        prompt: Tokens that are exact until there is a basis.
        mean: ``[H, 1, D]``, of the prompt's keys.
        basis: ``[H, D, D]``, singular vectors in columns, the largest first.
    """

    tile: int = TILE
    prompt: int = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(1), repr=False)
    basis: torch.Tensor = field(default_factory=lambda: torch.eye(1), repr=False)

    def fitted(self, queries: torch.Tensor, keys: torch.Tensor) -> SvdqKeys:
        """Takes mean and basis from a prompt's keys."""
        mean = keys.mean(1, keepdim=True)
        basis = torch.linalg.svd(keys - mean, full_matrices=True).Vh.mT
        return SvdqKeys(self.bits, self.head_dim, self.local_window_size, prompt=keys.shape[1], mean=mean, basis=basis)

    def quantized_tokens(self, length: int) -> int:
        """Whole tiles, once the prompt has run."""
        return 0 if length < self.prompt else super().quantized_tokens(length)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Into the latent space, part by part on its levels, and back."""
        latent = tiles((x - self.mean) @ self.basis, TILE)
        parts = torch.tensor_split(latent, 8, dim=-1)
        schedule = SCHEDULES[self.bits]
        read = [_on_levels(part, bits) for part, bits in zip(parts, schedule, strict=True)]
        return torch.cat(read, -1).flatten(1, 2) @ self.basis.mT + self.mean

    @property
    def stored_bits(self) -> float:
        """Codes, and a scale and a minimum per latent channel that is kept and tile."""
        schedule = SCHEDULES[self.bits]
        return (sum(schedule) + sum(b > 0 for b in schedule) * 32 / TILE) / len(schedule)

    @property
    def fixed_bits(self) -> float:
        """Mean, and the kept vectors of the basis, in float16."""
        kept = sum(b > 0 for b in SCHEDULES[self.bits]) / 8
        return 16 * (1 + kept * self.head_dim)


def _on_levels(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Tiles ``[H, n, T, C]`` of latent channels, as read back."""
    if bits == 0:
        return torch.zeros_like(x)
    if bits > 1:
        return min_max(x, bits, dim=2)
    above = x > x.mean(2, keepdim=True)
    high, low = (half((x * h).sum(2, keepdim=True) / h.sum(2, keepdim=True).clamp(min=1)) for h in (above, ~above))
    return torch.where(above, high, low)
