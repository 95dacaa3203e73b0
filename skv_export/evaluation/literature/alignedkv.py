"""AlignedKV (Tan et al., arXiv 2409.16546): a float16 cache of whose numbers a step reads the bits that its sum needs.

As in the authors' code. Numbers lie as 8 high bits (sign, exponent, two of the mantissa), 4 and 4 more. Keys: a term of
the dot product has the query's exponent plus the largest of its channel in the cache; where that is 4 below the largest
such sum of the head, 12 bits are read, where it is 8 below, 8. Values: the output's exponent is first estimated from
the heaviest of every 32nd token, high bits only, without signs and less one for that; a token's term has its weight's
exponent plus the channel's largest, and the channel that needs most decides for the token. Bits not read count as the
middle of what they could be. Queries that share a KV head read what the neediest of them does. Tokens that fill no
block of 64 yet are read whole.

**The cache is not made smaller: bits are those read**, the mean over the text last read. Values need the fewer the
longer the text is, so other lengths differ.

What differs: the steps of 4 and 8 are keys' in both tensors, as in the authors' later code; the first compares weights
on another scale. Largest exponents are those of the blocks before the query.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from skv_export.evaluation.decode_simulation import weigh
from skv_export.evaluation.literature.tiled import TiledCache, half

TILE, SAMPLES = 64, 32
STEPS = {16: 0, 12: 4, 8: 8}
"""Bits that are read, by how far a term's exponent is below the sum's, at least."""


@dataclass
class Reads:
    """Of the text last read.

    Attributes:
        bits: Of all quantized numbers, each as often as it was read.
        numbers: How many these are.
    """

    bits: float = 0.0
    numbers: int = 0

    def add(self, bits: torch.Tensor, numbers: int) -> None:
        """Counts the bits of so many numbers."""
        self.bits, self.numbers = self.bits + float(bits), self.numbers + numbers


@dataclass(frozen=True)
class AlignedCache(TiledCache):
    """Keys or values.

    Attributes:
        reads: What ``attend`` read of it.
    """

    tile: int = TILE
    reads: Reads = field(default_factory=Reads, compare=False)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """All bits: how many are read is the query's matter."""
        return x

    @property
    def stored_bits(self) -> float:
        """Those that were read; before any text, all."""
        return self.reads.bits / self.reads.numbers if self.reads.numbers else 16.0


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    caches: tuple[AlignedCache, AlignedCache],
    *,
    scale: float,
    softcap: float = 0.0,
    local_window_size: int = 0,
    head_sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``decode_simulation.attend``; queries that have the same blocks before them in one go."""
    heads, tokens, dim = key.shape
    grouped = query.reshape(heads, -1, tokens, dim)
    sink = None if head_sink is None else head_sink.float().reshape(heads, -1, 1, 1)
    keys, values = half(key), half(value)
    for cache in caches:
        cache.reads.bits, cache.reads.numbers = 0.0, 0
    out = torch.empty_like(grouped)
    for start in range(0, tokens, TILE):
        stop = min(start + TILE, tokens)
        q, own = grouped[:, :, start:stop], torch.arange(stop - start, device=query.device)
        old_keys, old_values = keys[:, :start], values[:, :start]
        k_bits = key_bits(q, old_keys)
        old = of_bits(q, k_bits[:, None], old_keys.mT)
        scores = torch.cat([old, q @ keys[:, None, start:stop].mT], -1)
        scores[..., own, start + own] = (q * key[:, None, start:stop]).sum(-1)
        weights = weigh(scores * scale, start, softcap, local_window_size, sink)
        v_bits = value_bits(weights[..., :start], old_values)
        block = of_bits(weights[..., :start], v_bits[:, None], old_values)
        block += weights[..., start:] @ values[:, None, start:stop]
        block += weights[..., own, start + own, None] * (value - values)[:, None, start:stop]
        out[:, :, start:stop] = block
        seen = _seen(start, stop, local_window_size).to(query.device)
        caches[0].reads.add((k_bits.sum(-1) * seen.sum(-1)).sum(), heads * dim * int(seen.sum()))
        caches[1].reads.add((v_bits * seen).sum() * dim, heads * dim * int(seen.sum()))
    return out.reshape(-1, tokens, dim)


def key_bits(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Bits ``[H, Q, D]`` of each channel of keys ``[H, S, D]`` for queries ``[H, N, Q, D]``."""
    if not keys.shape[1]:
        return query[:, 0].new_full(query[:, 0].shape, 16)
    terms = exponent(query) + exponent(keys).amax(1)[:, None, None]
    return _bits((terms.amax(-1, keepdim=True) - terms).amin(1))


def value_bits(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Bits ``[H, Q, S]`` of each token of values ``[H, S, D]`` for weights ``[H, N, Q, S]``."""
    if not values.shape[1]:
        return weights[:, 0]
    heaviest = weights.reshape(*weights.shape[:-1], -1, SAMPLES).max(-2)
    sampled = torch.zeros_like(weights).scatter_(
        -1, heaviest.indices * SAMPLES + torch.arange(SAMPLES, device=weights.device), heaviest.values
    )
    output = exponent(sampled @ cut(values, 8).abs()[:, None]) - 1
    least = (output - exponent(values).amax(1)[:, None, None]).amin(-1, keepdim=True) + _EXPONENT_OF_ONE
    return _bits((least - exponent(weights)).amin(1))


def of_bits(left: torch.Tensor, bits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Product ``[H, N, Q, C]`` of ``[H, N, Q, R]`` and a cache's ``[H, R, C]``, read with bits ``[H, 1, Q, R]``."""
    return torch.stack([(left * (bits == count)) @ cut(right, count)[:, None] for count in STEPS]).sum(0)


_EXPONENT_OF_ONE = 15
"""Of float16's bits."""


def cut(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Float16 numbers of which only the highest bits are known, those below a one and zeros."""
    dropped = 16 - bits
    whole = x.half().view(torch.int16)
    return (whole if not dropped else whole & -(1 << dropped) | 1 << (dropped - 1)).view(torch.float16).float()


def exponent(x: torch.Tensor) -> torch.Tensor:
    """The exponent's bits of float16 numbers."""
    return half(x).half().abs().view(torch.int16) >> 10


def _bits(below: torch.Tensor) -> torch.Tensor:
    """What is read, by how far terms are below the sum."""
    bits = below.new_full(below.shape, 16)
    for count, step in STEPS.items():
        bits[below >= step] = count
    return bits.float()


def _seen(start: int, stop: int, window: int) -> torch.Tensor:
    """Which of the tokens before ``start`` queries ``start ... stop-1`` see, ``[Q, S]``."""
    query, token = torch.arange(start, stop)[:, None], torch.arange(start)[None]
    return token > query - window if window else torch.ones(stop - start, start, dtype=torch.bool)
