"""SQuat (Wang et al., arXiv 2503.24358): errors of keys made orthogonal to the subspace of the prompt's queries.

As in the authors' code: ``Q`` are the first 5 right singular vectors of the prompt's queries of a KV head, each times
its singular value, and ``A = I + 0.001 Q^T Q``. Channels are quantized in blocks; after a block, whose errors are d,
the channels R that are left are moved by ``-A_RR^(-1) A_RB d``, which minimizes ``e^T A e`` over the errors e of a key.
Layout, levels and exact tokens are KIVI's (keys per channel in groups of 32 tokens, 128 exact; values per token),
blocks have 64 channels, half a head of 128.

What differs: a head of 64 has two blocks of 32; keys and queries are taken after RoPE (the authors have both forms).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from skv_export.evaluation.literature.kivi import KiviKeys

SUBSPACE, LAMBDA, BLOCK = 5, 0.001, 64


@dataclass(frozen=True)
class SquatKeys(KiviKeys):
    """Keys per channel, each block of channels after the errors of those before it.

    Attributes:
        prompt: Tokens that are exact until the queries are known.
        cost: ``[H, D, D]``: A, what an error costs.
    """

    prompt: int = 0
    cost: torch.Tensor = field(default_factory=lambda: torch.eye(1), repr=False)

    def fitted(self, queries: torch.Tensor, keys: torch.Tensor) -> SquatKeys:
        """Takes the subspace from a prompt's queries; those of the heads that share keys stand together."""
        together = queries.reshape(len(keys), -1, self.head_dim)
        _, s, vh = torch.linalg.svd(together, full_matrices=False)
        subspace = s[:, :SUBSPACE, None] * vh[:, :SUBSPACE]
        cost = torch.eye(self.head_dim, device=keys.device) + LAMBDA * subspace.mT @ subspace
        return SquatKeys(self.bits, self.head_dim, self.local_window_size, prompt=keys.shape[1], cost=cost)

    def quantized_tokens(self, length: int) -> int:
        """Whole tiles, once the prompt has run."""
        return 0 if length < self.prompt else super().quantized_tokens(length)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """Block by block of channels."""
        size = min(BLOCK, max(1, self.head_dim // 2))
        rest, read = x, []
        for start in range(0, self.head_dim, size):
            block, rest = rest[..., :size], rest[..., size:]
            read.append(super().read(block))
            if rest.shape[-1]:
                left, done = slice(start + size, None), slice(start, start + size)
                shift = torch.linalg.solve(self.cost[:, left, left], self.cost[:, left, done])
                rest = rest - (read[-1] - block) @ shift.mT
        return torch.cat(read, -1)
