"""OSCAR (Zhou et al., arXiv 2605.17757): fixed rotations from what attention reads, then min-max per token.

As in the authors' code. Keys: ``U`` are the eigenvectors of the queries' second moment, the mean over a layer's KV
heads. Values: of the values' second moment, each token weighted by ``k^T C k``, C the queries' second moment of its
head (the mean of its squared scores). Both are followed by a Hadamard matrix and a permutation that puts the channels,
in the order of the eigenvalues, into bit-reversed places: ``U H P``, one rotation per layer. A token's range is clipped
to 0.96 of its ends for keys and 0.92 for values; scale and minimum per token and head in float16. The first 64 and the
last 256 tokens are exact. Rotations are fitted to the calibration text; they belong to the model and are not counted.

What differs: the calibration text is short; heads whose dimension is no power of two get Hadamard blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from skv_export.evaluation.decode_simulation import CacheFactory
from skv_export.evaluation.literature.from_text import Activations, Ropes
from skv_export.evaluation.literature.tiled import TiledCache, hadamard, min_max

SINKS, RECENT = 64, 256
CLIP_KEYS, CLIP_VALUES = 0.96, 0.92


@dataclass(frozen=True)
class OscarCache(TiledCache):
    """Keys or values.

    Attributes:
        clip: What is left of a token's range.
        rotation: ``[D, D]``.
    """

    num_sink_tokens: int = SINKS
    recent: int = RECENT
    clip: float = 1.0
    rotation: torch.Tensor = field(default_factory=lambda: torch.eye(1), repr=False)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Token by token."""
        return min_max(x @ self.rotation, self.bits, clip=self.clip) @ self.rotation.mT

    @property
    def stored_bits(self) -> float:
        """Codes, a scale and a minimum per token."""
        return self.bits + 32 / self.head_dim


def fit(k_bits: int, v_bits: int, seen: dict[int, Activations], ropes: Ropes) -> CacheFactory:
    """Returns the caches of a model whose layers saw this."""

    def make(index: int, head_dim: int, window: int) -> tuple[OscarCache, OscarCache]:
        layer = seen[index]
        scores = ((layer.keys @ layer.queries) * layer.keys).sum(-1, keepdim=True)
        weights = scores / scores.mean(1, keepdim=True)
        read = (layer.values * weights).mT @ layer.values / weights.shape[1]
        keys, values = (rotation(moment.mean(0)) for moment in (layer.queries, read))
        return (
            OscarCache(k_bits, head_dim, window, clip=CLIP_KEYS, rotation=keys),
            OscarCache(v_bits, head_dim, window, clip=CLIP_VALUES, rotation=values),
        )

    return make


def rotation(moment: torch.Tensor) -> torch.Tensor:
    """Returns ``U H P`` of a second moment ``[D, D]``: the eigenvectors' basis, mixed, in bit-reversed order."""
    dim = len(moment)
    values, vectors = torch.linalg.eigh(moment.double())
    width = (dim - 1).bit_length()
    reversed_ = [int(f"{i:0{width}b}"[::-1], 2) for i in range(1 << width)]
    places = torch.tensor([i for i in reversed_ if i < dim])
    order = torch.empty(dim, dtype=torch.long)
    order[places] = values.cpu().argsort(descending=True)
    mixed = vectors @ hadamard(dim).to(vectors)
    return mixed[:, order.to(mixed.device)].float()
