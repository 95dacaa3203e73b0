"""DecoQuant (Liu et al., arXiv 2405.12591): a block of the cache as a large tensor times a small one; few bits for it.

As in the authors' code. Keys after RoPE, or values, of a block's T tokens, all heads side by side, are a matrix of rows
of 16 neighbouring channels. Its decomposition into two tensors (matrix product operators) is ``U S^(1/2)``, as large as
the block, and ``S^(1/2) V^T``, 16 by 16, from its singular values. The large one is rounded per token, all heads
together, to ``2^b - 1`` levels around zero, the largest on the token's largest number; its scale and the small tensor
are float16.

What differs: a block is 128 tokens, exact until the last of them has come, where the authors decompose the whole
prompt once and do not say what becomes of the tokens after it: of blocks, the cache is append-only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from skv_export.evaluation.literature.tiled import TiledCache, half, tiles

TILE, COLUMNS = 128, 16


@dataclass
class Layer:
    """What a cache learns of its layer from the first tokens it reads.

    Attributes:
        kv_num_heads: Heads, which share a token's scale and a block's small tensor.
    """

    kv_num_heads: int = 1


@dataclass(frozen=True)
class DecoquantCache(TiledCache):
    """Keys or values.

    Attributes:
        layer: The cache's.
    """

    tile: int = TILE
    layer: Layer = field(default_factory=Layer, compare=False)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Block by block."""
        self.layer.kv_num_heads = len(x)
        blocks = tiles(x, TILE).permute(1, 2, 0, 3)
        large, small = decomposed(blocks.reshape(len(blocks), -1, COLUMNS))
        tokens = large.reshape(*blocks.shape[:2], -1)
        levels = 2 ** (self.bits - 1) - 1
        scale = half(tokens.abs().amax(-1, keepdim=True) / levels).clamp(min=2**-24)
        tokens = (tokens / scale).round().clamp(-levels, levels) * scale
        return (tokens.view_as(large) @ half(small)).view(blocks.shape).permute(2, 0, 1, 3).flatten(1, 2)

    @property
    def stored_bits(self) -> float:
        """Codes, a scale per token, and a small tensor per block."""
        return self.bits + (16 + 16 * COLUMNS**2 / TILE) / (self.layer.kv_num_heads * self.head_dim)


def decomposed(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``U S^(1/2)`` and ``S^(1/2) V^T`` of ``[..., rows, columns]``."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s.sqrt()
    return u * root[..., None, :], root[..., None] * vh
